"""Removes faulty rows and odd characters from a data file. This is the command `jaxrlhf data clean`.

Rows are written one by one as they are read, so they keep their order. Of equal rows the first is kept. `near` reads
the file twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.curation.characters import cleaned
from jaxrlhf.curation.reading import Content, open_source
from jaxrlhf.curation.similarity import THRESHOLD, Sketches
from jaxrlhf.curation.writing import check_output, jsonl_writer
from jaxrlhf.data.report import LoadReport
from jaxrlhf.data.sources import Row
from jaxrlhf.data.tokenizers import Tokenizer
from jaxrlhf.errors import UserError


@dataclass
class Cleaned:
    """What was done. `report` counts the rows and the reasons for dropping them."""

    report: LoadReport
    changed: int = 0  # rows that were kept with other characters

    def __str__(self) -> str:
        report = self.report
        lines = [f"{report.path}: kept {report.kept:,} of {report.rows:,} rows, {self.changed:,} of them changed"]
        for reason, count in sorted(report.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"  {count:>7,}  dropped: {reason}; first {report.first[reason]}")
        return "\n".join(lines)


def clean(
    path: str,
    out: str,
    *,
    near: bool = False,
    similarity: float = THRESHOLD,
    tokenizer: Tokenizer | None = None,
    tokens: tuple[int, int | None] = (0, None),
    chars: tuple[int, int | None] = (0, None),
    kind: str | None = None,
    settings: Sequence[str] = (),
    overwrite: bool = False,
) -> Cleaned:
    """Writes the usable rows to `out` as JSON Lines and returns what was done.

    Every text of a row, at any depth, gets Unicode's form NFC and the line end \\n, and loses control characters. Lines
    that hold no row, rows that no stage can use, duplicates, and pairs with equal responses are dropped.

    near    also drops near-duplicates of earlier rows
    tokens, chars  (least, most) length of a row: prompt and longest response; `tokens` needs the tokenizer
    kind, settings  as in `check`

    Raises UserError, and writes nothing, if no row is left.
    """
    check_output(out, overwrite)
    report = LoadReport(path, 0)
    result = Cleaned(report)

    def skip(error: UserError) -> None:
        report.rows += 1
        where, _, what = str(error).split("; ")[0].partition(": ")
        report.drop(what.partition(" (")[0], where)

    fault = _length_fault(tokenizer, tokens, chars)
    nearly = _near_duplicates(path, kind, settings, similarity, fault) if near else set()
    source = open_source(path, kind, settings, skip)
    seen: set[int] = set()
    with jsonl_writer(out, overwrite) as write:
        for row in source.rows:
            report.rows += 1
            better = Row(_cleaned(row.values), row.where)
            try:
                content = source.read(better)
                reason = _fault(content, seen) or fault(better, content)
            except UserError as error:
                report.refuse(row, str(error))
                continue
            if reason is None and row.where in nearly:
                reason = "nearly equal to an earlier row"
            if reason is not None:
                report.drop(reason, row.where)
                continue
            result.changed += better.values != row.values
            write(better)
        report.check()
    return result


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, dict):
        return {key: _cleaned(inner) for key, inner in value.items()}
    return [_cleaned(inner) for inner in value] if isinstance(value, list) else value


def _fault(content: Content, seen: set[int]) -> str | None:
    if content.key in seen:
        return "equal to an earlier row"
    seen.add(content.key)
    if len(content.responses) == 2 and content.responses[0].strip() == content.responses[1].strip():
        return "chosen and rejected are equal"
    return None


def _length_fault(
    tokenizer: Tokenizer | None, tokens: tuple[int, int | None], chars: tuple[int, int | None]
) -> Callable[[Row, Content], str | None]:
    def fault(row: Row, content: Content) -> str | None:
        size = len(content.prompt) + max(map(len, content.responses), default=0)
        reason = _outside(size, chars, "characters")
        if reason is None and tokenizer is not None:
            place, sizes = f"{row.where}: ", []
            for prompt, response in content.pairs:
                if response is None:
                    sizes.append(len(tokenizer.encode_prompt(tokenizer.chats.rendered_prompt(prompt, place))))
                else:
                    pair = tokenizer.chats.rendered_pair(prompt, response, place)
                    sizes.append(sum(map(len, tokenizer.encode_pair(*pair))))
            reason = _outside(max(sizes), tokens, "tokens")
        return reason

    return fault


def _outside(size: int, limits: tuple[int, int | None], unit: str) -> str | None:
    least, most = limits
    if size < least:
        return f"fewer than {least} {unit}"
    return f"more than {most} {unit}" if most is not None and size > most else None


def _near_duplicates(
    path: str, kind: str | None, settings: Sequence[str], similarity: float, fault: Callable[[Row, Content], str | None]
) -> set[str]:
    """Returns the places of rows that are nearly equal to an earlier row that is kept."""
    source = open_source(path, kind, settings, lambda error: None)
    sketches, places, seen = Sketches(), [], set()
    for row in source.rows:
        better = Row(_cleaned(row.values), row.where)
        try:
            content = source.read(better)
            if _fault(content, seen) or fault(better, content):
                continue
        except UserError:
            continue
        if not content.others:
            sketches.add(*content.texts)
            places.append(row.where)
    return {places[later] for _, later in sketches.pairs(similarity)}
