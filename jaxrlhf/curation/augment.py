"""Writes changed copies of rows, for more varied training data. This is the command `jaxrlhf data augment`.

Every row keeps its columns. A new column, `source` by default, has the same value in a row and in its copies, so that
`jaxrlhf data split --group source` never puts them into two parts. The seed and the number of a row decide its copies.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.curation.reading import Source, open_source
from jaxrlhf.curation.writing import check_output, jsonl_writer
from jaxrlhf.data.chats import content_text
from jaxrlhf.data.sources import Row, open_bytes
from jaxrlhf.errors import UserError, one_line

BLOCK = 64  # rows that are changed together
Rewrite = Callable[[Sequence[str], Sequence[int]], list[str]]
"""Returns a new text for each text; the seeds decide the choice."""
_BLANKS = re.compile(r"(\s+)")


@dataclass(frozen=True)
class Methods:
    """How a copy differs. The methods are applied in this order; a share of 0 leaves a method out."""

    rewrite: Rewrite | None = None  # a paraphrase or a translation and back, see `rewriting`
    rewrite_at_once: bool = False  # passes all rows to one call of `rewrite`, because each call loads a model
    synonyms: dict[str, list[str]] | None = None
    synonym_share: float = 0.2  # of the words that have synonyms
    swap: float = 0.0  # of the words: changes places with the next word
    dropout: float = 0.0  # of the words: is left out
    templates: Sequence[Callable[[dict[str, Any]], str]] = ()  # of each copy one; they read the columns and `text`


def augment(
    path: str,
    out: str,
    methods: Methods,
    *,
    copies: int = 1,
    column: str = "source",
    seed: int = 0,
    kind: str | None = None,
    settings: Sequence[str] = (),
    overwrite: bool = False,
) -> tuple[int, int]:
    """Writes each row and its changed copies. Returns (number of rows, number of copies).

    The prompt is changed, or the text of a row without a prompt. In a chat only the last user turn is changed. A copy
    that equals its row or another copy is left out.

    copies    copies per row
    column    column that holds the row's number in a row and its copies; a value that a row already has is kept
    kind, settings  as in `check`

    Raises UserError for a row that no stage can use.
    """
    check_output(out, overwrite)
    source = open_source(path, kind, settings)
    rows = written = 0
    with jsonl_writer(out, overwrite) as write:
        for block in _blocks(_numbered(source, column), None if methods.rewrite_at_once else BLOCK):
            chosen = [(number, row, copy) for number, row in block for copy in range(copies)]
            texts = [_text(row, source)[1] for _, row, _ in chosen]
            changed = _changed(texts, chosen, methods, seed)
            for (_, row), new in zip(block, _parts(changed, copies)):
                old = _text(row, source)[1]
                write(row)
                rows += 1
                for copy, text in enumerate(dict.fromkeys(text for text in new if text.strip() and text != old), 1):
                    write(_with_text(row, source, text, copy))
                    written += 1
    return rows, written


def _numbered(source: Source, column: str) -> Iterator[tuple[int, Row]]:
    for number, row in enumerate(source.rows, 1):
        source.read(row)  # raises UserError for a row that no stage can use
        named = number if row.values.get(column) is None else row.values[column]
        yield number, Row(row.values | {column: named}, row.where)


def _blocks(rows: Iterator[tuple[int, Row]], size: int | None) -> Iterator[list[tuple[int, Row]]]:
    while block := list(itertools.islice(rows, size)):
        yield block


def _parts(texts: list[str], size: int) -> Iterator[list[str]]:
    return (texts[start : start + size] for start in range(0, len(texts), size))


def _changed(texts: list[str], chosen: Sequence[tuple[int, Row, int]], methods: Methods, seed: int) -> list[str]:
    """Returns the changed text of each copy."""
    rngs = [random.Random(f"{seed} {number} {copy}") for number, _, copy in chosen]
    if methods.rewrite is not None:
        texts = methods.rewrite(texts, [rng.getrandbits(31) for rng in rngs])
    return [_perturbed(text, row, methods, rng) for text, (_, row, _), rng in zip(texts, chosen, rngs)]


def _perturbed(text: str, row: Row, methods: Methods, rng: random.Random) -> str:
    if methods.synonyms:
        text = replace_synonyms(text, methods.synonyms, methods.synonym_share, rng)
    if methods.swap:
        text = swap_words(text, methods.swap, rng)
    if methods.dropout:
        text = drop_words(text, methods.dropout, rng)
    if methods.templates:
        template = rng.choice(methods.templates)
        try:
            text = template(row.values | {"text": text})
        except Exception as error:  # a template is a program
            raise UserError(f"{row.where}: the template fails: {one_line(error)}") from None
    return text


def drop_words(text: str, share: float, rng: random.Random) -> str:
    """Returns the text without some of its words. Each word is dropped with probability `share`; at least one stays."""
    words = _BLANKS.split(text)  # words at even places, blanks between them
    kept = [i for i in range(0, len(words), 2) if rng.random() >= share or not words[i]]
    kept = kept if any(words[i] for i in kept) else [rng.randrange(0, len(words), 2)]
    return "".join(words[i] + (words[i + 1] if i + 1 < len(words) and i != kept[-1] else "") for i in kept)


def swap_words(text: str, share: float, rng: random.Random) -> str:
    """Returns the text in which each word has changed places with the next word with probability `share`."""
    words = _BLANKS.split(text)
    i = 0
    while i + 2 < len(words):
        if rng.random() < share:
            words[i], words[i + 2] = words[i + 2], words[i]
            i += 2  # no word moves twice
        i += 2
    return "".join(words)


def replace_synonyms(text: str, synonyms: dict[str, list[str]], share: float, rng: random.Random) -> str:
    """Returns the text. Each word is replaced by a synonym, if it has any, with probability `share`; capitals stay."""

    def replaced(match: re.Match) -> str:
        others = synonyms.get(match[0].lower())
        if not others or rng.random() >= share:
            return match[0]
        other = rng.choice(others)
        return other[:1].upper() + other[1:] if match[0][:1].isupper() else other

    return re.sub(r"\w+", replaced, text)


def read_synonyms(path: str) -> dict[str, list[str]]:
    """Returns the synonyms of each word. A line of the file holds words with the same meaning, separated by commas."""
    synonyms: dict[str, list[str]] = {}
    try:
        with open_bytes(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the file of synonyms cannot be read: {one_line(error)}") from error
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.split(",")]
        if not line.strip() or line.startswith("#"):
            continue
        if len(words) < 2 or not all(words):
            raise UserError(f"{path}:{number}: a line must have several words, separated by commas, not {line[:60]!r}")
        for word in words:
            known = synonyms.setdefault(word.lower(), [])
            known += [other for other in words if other.lower() != word.lower() and other not in known]
    return synonyms


def compiled_template(text: str) -> Callable[[dict[str, Any]], str]:
    """Returns the jinja template. It runs in a sandbox and may use a row's columns. It must use `text`, its text."""
    from jaxrlhf.data.templates import compiled

    if not re.search(r"\btext\b", text):
        raise UserError(f"template {text[:60]!r}: must write {{{{ text }}}}, the text of the row")
    return compiled(text, f"template {text[:60]!r}")


# ---------------------------------------------------------------- the text of a row


def _text(row: Row, source: Source) -> tuple[str, str]:
    """Returns (name of the field to change, the text to change in this field)."""
    fields = source.fields
    names = (fields.prompt_field, fields.messages_field, fields.text_field)
    for name in names[1:2] if source.kind == "chats" else names:
        value = row.values.get(name)
        if isinstance(value, str) and name != fields.messages_field:
            return name, value
        if isinstance(value, list) and (turn := _last_user(value)) is not None:
            return name, content_text(value[turn])
    raise UserError(f"{row.where}: the row has no text to augment; give it a prompt, a turn of the user, or a text")


def _last_user(messages: list[dict[str, Any]]) -> int | None:
    turns = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    return turns[-1] if turns else None


def _with_text(row: Row, source: Source, text: str, copy: int) -> Row:
    name, _ = _text(row, source)
    value: Any = text
    if not isinstance(row.values[name], str):
        value = list(row.values[name])
        turn = _last_user(value)
        value[turn] = value[turn] | {"content": text}
    values = row.values | {name: value}
    if isinstance(values.get("id"), str | int):
        values["id"] = f"{values['id']}-{copy}"
    return Row(values, row.where)


