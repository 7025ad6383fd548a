"""F1 of entities by their place in a text. `library` lists this reward.

`structured.span_f1` compares lists of entity texts and has no places.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.rewards.columns import check_choice, check_texts
from jaxrlhf.rewards.matching import ITEM, MATCHES, NONE, Unreadable, bare, f1, is_list, normal_label
from jaxrlhf.rewards.structured import parse_json

FORMATS = ("auto", "json", "lines", "bio", "inline")
TAG = re.compile(r"O|[BI]-\S+")
INLINE = re.compile(r"\[([^\[\]]+)\]\(([^()\s][^()]*)\)")
MARKS = re.compile(r"(\[[^\[\]]+\]\([^()\s][^()]*\))")  # INLINE as one group, for `re.split`


@dataclass(frozen=True)
class Entity:
    """One entity. It has no place if only its text is given."""

    label: str
    text: str  # with single blanks
    start: int | None = None  # in characters of the source text
    end: int | None = None


@dataclass(frozen=True)
class Source:
    """The text in which entities are marked, and the places (start, end) of its tokens in characters."""

    text: str | None
    tokens: Sequence[tuple[int, int]] = ()

    def entity(self, label: str, start: int, end: int) -> Entity:
        """Returns the entity at a place of the text."""
        if self.text is not None and not 0 <= start < end <= len(self.text):
            raise Unreadable(f"the place {start} to {end} is not in the text of {len(self.text)} characters")
        return Entity(normal_label(label), bare("" if self.text is None else self.text[start:end]), start, end)


def entity_f1(
    completions: Sequence[str],
    entities: Sequence[Any],
    tokens: Sequence[Any] | None = None,
    text: Sequence[Any] | None = None,
    *,
    format: str = "auto",
    match: str = "strict",
    ignore_case: bool = False,
    tags: Sequence[str] = (),
) -> list[float | None]:
    """Returns the F1 of the entities of the completion and those of the column `entities`.

    The column holds one of these forms, or its JSON:
    - BIO tags (IOB2), one per entry of the column `tokens`; a tag is text, or an index in the option `tags`
    - objects with `start`, `end` and `label`; places are characters of the column `text`, `end` is exclusive
    - objects with `text` and `label`, or lines "LABEL: text"
    If the data has no column `text`, the text is the tokens with blanks between them.

    `format` is the form of completions. "json" is a list of objects as in the column, or an object label -> list of
    texts. "lines" has one "LABEL: text" per line. "bio" has one tag per token, as tags only, as "token/TAG", or as one
    "token TAG" per line. "inline" repeats the text with entities written as [text](LABEL). "auto" is the first of json,
    bio, inline and lines that fits. `none` or `[]` means no entity. A completion with another form scores 0, also if
    the row has no entity.

    `match` "strict": an entity is right if label and both ends match, as in seqeval's strict mode. If any entity of
    the row has no place, entities are right if label and text match. An entity of the column matches only one of the
    completion, so a repeated entity lowers precision. "partial": a pair with the same label counts the overlap of its
    places divided by their union, in characters. If any entity of the row has no place, the words of the texts are
    compared instead. Case is ignored in labels, and with `ignore_case` also in texts.
    """
    check_choice("format", format, FORMATS)
    check_choice("match", match, tuple(MATCHES))
    check_texts("tags", tags)
    scores: list[float | None] = []
    for i, (answer, gold) in enumerate(zip(completions, entities)):
        if gold is None:
            scores.append(None)
            continue
        try:
            source = _source(None if tokens is None else tokens[i], None if text is None else text[i])
            wanted = _gold(gold, source, tags)
        except Unreadable as error:
            raise ValueError(f"column entities, row {i} cannot be used: {error}") from None
        try:
            found = _answer(answer, source, format)
        except Unreadable:
            scores.append(0.0)
        else:
            scores.append(f1(*_comparable(found, wanted, ignore_case), MATCHES[match]))
    return scores


# ---------------------------------------------------------------- the columns


def _source(tokens: Any, text: Any) -> Source:
    if text is not None and not isinstance(text, str):
        raise Unreadable(f"the column text must hold text, not a {type(text).__name__}")
    if tokens is None:
        return Source(text)
    if not is_list(tokens) or not all(isinstance(token, str) and token for token in tokens):
        raise Unreadable("the column tokens must hold a list of texts")
    text = " ".join(tokens) if text is None else text
    places, at = [], 0
    for token in tokens:
        at = text.find(token, at)
        if at < 0:
            raise Unreadable(f"the token {token!r} is not in the column text")
        places.append((at, at + len(token)))
        at += len(token)
    return Source(text, places)


def _gold(value: Any, source: Source, names: Sequence[str]) -> list[Entity]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return _lines(value)
    if is_list(value) and value and all(type(tag) is int for tag in value):
        if not all(0 <= tag < len(names) for tag in value):
            raise Unreadable("its tags are numbers; the option tags must list the names, such as [O, B-PER, I-PER]")
        value = [names[tag] for tag in value]
    if is_list(value) and value and all(isinstance(tag, str) for tag in value):
        if not all(TAG.fullmatch(tag) for tag in value):
            return _lines("\n".join(value))
        for before, tag in zip(["O", *value], value):
            if tag[0] == "I" and before[2:] != tag[2:]:
                raise Unreadable(f"the tag {tag} follows {before}; tags must be IOB2, where each entity starts with B-")
        return _from_tags(value, source)
    return _from_json(value, source)


# ---------------------------------------------------------------- the answer


def _answer(answer: str, source: Source, format: str) -> list[Entity]:
    """Returns the entities of a completion. Raises Unreadable if it has another form."""
    if NONE.fullmatch(answer):
        return []
    if format != "auto":
        return READERS[format](answer, source)
    for name in ("json", "bio", "inline", "lines"):
        try:
            return READERS[name](answer, source)
        except Unreadable:
            continue
    raise Unreadable("the answer has no known form")


def _read_json(answer: str, source: Source) -> list[Entity]:
    try:
        value = parse_json(answer, fenced=True)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    return _from_json(value, source)


def _from_json(value: Any, source: Source) -> list[Entity]:
    if isinstance(value, dict) and not {"label", "type"} & set(value):
        if not all(is_list(texts) for texts in value.values()):
            raise Unreadable('an object must have the form {"LABEL": ["text", ...]}')
        value = [{"label": label, "text": text} for label, texts in value.items() for text in texts]
    elif isinstance(value, dict):
        value = [value]
    if not is_list(value):
        raise Unreadable(f"it must be a list of entities, not a {type(value).__name__}")
    return [_entity(item, source) for item in value]


def _entity(item: Any, source: Source) -> Entity:
    if not isinstance(item, dict):
        raise Unreadable(f"an entity must be an object with text and label, or start, end and label, not {item!r:.40}")
    label, text = item.get("label", item.get("type")), item.get("text")
    if not isinstance(label, str) or not label.strip():
        raise Unreadable(f"the entity {item!r:.60} has no label")
    if type(item.get("start")) is int and type(item.get("end")) is int:
        entity = source.entity(label, item["start"], item["end"])
        if entity.text or not isinstance(text, str):
            return entity
        return Entity(entity.label, bare(text), entity.start, entity.end)
    if not isinstance(text, str) or not text.strip():
        raise Unreadable(f"the entity {item!r:.60} has neither text nor start and end")
    return Entity(normal_label(label), bare(text))


def _lines(answer: str, source: Source | None = None) -> list[Entity]:
    if not answer.strip():
        raise Unreadable("it is empty; write none or [] if there is no entity")
    found = []
    for line in filter(str.strip, answer.splitlines()):
        label, colon, text = ITEM.sub("", line).partition(":")
        if not colon or not label.strip() or not text.strip():
            raise Unreadable(f"the line {line[:40]!r} does not have the form LABEL: text")
        found.append(Entity(normal_label(label), bare(text)))
    return found


def _read_tags(answer: str, source: Source) -> list[Entity]:
    words = [source.text[start:end] for start, end in source.tokens] if source.text is not None else []
    rows = [line.split() for line in answer.splitlines() if line.strip()]
    if not all(len(row) == 2 for row in rows) or not rows or all(TAG.fullmatch(row[0]) for row in rows):
        rows = [item.rsplit("/", 1) if not TAG.fullmatch(item) else [item] for row in rows for item in row]
    tags = [row[-1] for row in rows]
    if not words or len(tags) != len(words) or not all(map(TAG.fullmatch, tags)):
        raise Unreadable(f"there must be one BIO tag for each of the {len(words)} tokens")
    if any(len(row) == 2 and row[0] != word for row, word in zip(rows, words)):
        raise Unreadable("a word before a tag differs from the token of the row")
    return _from_tags(tags, source)


def _from_tags(tags: Sequence[str], source: Source) -> list[Entity]:
    """Returns the entities of IOB2 tags. An I- tag that continues no entity of its label is ignored."""
    if len(tags) != len(source.tokens):
        raise Unreadable(f"there are {len(tags)} tags for {len(source.tokens)} entries of the column tokens")
    found: list[tuple[str, int, int]] = []
    inside = None  # label of the entity that the next I- continues
    for tag, (start, end) in zip(tags, source.tokens):
        kind, _, label = tag.partition("-")
        if kind == "B":
            found.append((label, start, end))
        elif kind == "I" and label == inside:
            found[-1] = (label, found[-1][1], end)
        inside = label if kind == "B" or (kind == "I" and label == inside) else None
    return [source.entity(*place) for place in found]


def _read_inline(answer: str, source: Source) -> list[Entity]:
    if source.text is None:
        marks = INLINE.findall(answer)
        if not marks:
            raise Unreadable("there is no [text](LABEL)")
        return [Entity(normal_label(label), bare(text)) for text, label in marks]
    # Blanks of the text and of the answer may differ, so places are counted without blanks.
    places = [i for i, character in enumerate(source.text) if not character.isspace()]
    found, at, plain = [], 0, ""
    for piece in re.split(MARKS, answer):
        mark = INLINE.fullmatch(piece)
        letters = "".join((mark[1] if mark else piece).split())
        if mark and letters and at + len(letters) <= len(places):
            found.append((mark[2], places[at], places[at + len(letters) - 1] + 1))
        plain, at = plain + letters, at + len(letters)
    if plain != "".join(source.text.split()):
        raise Unreadable("the answer, with its entity marks removed, must be the text of the row")
    return [source.entity(*place) for place in found]


READERS: Mapping[str, Callable[[str, Source], list[Entity]]] = {
    "json": _read_json,
    "bio": _read_tags,
    "inline": _read_inline,
    "lines": _lines,
}

# ---------------------------------------------------------------- the score


def _comparable(found: list[Entity], wanted: list[Entity], ignore_case: bool) -> tuple[list[tuple], list[tuple]]:
    """Returns the entities as (label, place), or all as (label, words) if an entity has no place."""
    both = [*found, *wanted]
    if all(entity.start is not None for entity in both):
        return [(e.label, e.start, e.end) for e in found], [(e.label, e.start, e.end) for e in wanted]
    texts = [e.text.casefold() if ignore_case else e.text for e in both]
    if not all(texts):
        raise ValueError("entities have places but no text; the data needs the column text or tokens")
    keys = [(e.label, ("", tuple(text.split()))) for e, text in zip(both, texts)]
    return keys[: len(found)], keys[len(found) :]
