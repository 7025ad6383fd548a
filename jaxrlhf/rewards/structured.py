"""Rewards for structured completions: JSON, and lists of named entities. Part of `library`."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxrlhf.rewards.columns import abstains_without, check_choice, check_texts

FENCED = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)
KINDS = {"any": object, "object": dict, "array": list}


def json_validity(
    completions: Sequence[str], *, required: Sequence[str] = (), kind: str = "any", fenced: bool = False
) -> list[float]:
    """1 if the whole completion is JSON (RFC 8259: no NaN) with all keys of `required` at its top level; else 0.

    kind: any, object or array. `fenced` accepts JSON in a Markdown code fence as well.
    """
    check_choice("kind", kind, tuple(KINDS))
    check_texts("required", required)

    def score(text: str) -> float:
        try:
            value = parse_json(text, fenced)
        except ValueError:
            return 0.0
        has_keys = not required or (isinstance(value, dict) and all(key in value for key in required))
        return float(isinstance(value, KINDS[kind]) and has_keys)

    return [score(text) for text in completions]


def parse_json(text: str, fenced: bool = False) -> Any:
    """Parses a text as JSON; with `fenced`, the content of its only code fence. Raises ValueError."""
    if fenced and len(blocks := FENCED.findall(text)) == 1:
        text = blocks[0]
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:  # a long row of opening brackets
        raise ValueError("nested too deep") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@abstains_without("entities")
def span_f1(completions: Sequence[str], entities: Sequence[Any], *, ignore_case: bool = False) -> list[float]:
    """F1 between the named entities in the completion and the named entities in the column `entities`.

    An entity is right if type and text both match. Types ignore case, and runs of blanks in the text count as one
    blank. Repeated entities count separately. Column and completion have one of two formats. The first is one line
    "type: text" per entity, with or without a list mark. The second is JSON: a list of {"type": ..., "text": ...}, a
    list of [type, text], or an object that maps each type to a list of texts. The column may also hold the JSON as a
    value instead of text. The score is 1 if neither completion nor column has an entity.
    """
    references = []
    for i, value in enumerate(entities):
        spans = _parse_text(value) if isinstance(value, str) else _parse_value(value)
        if spans is None:
            raise ValueError(f'column entities, row {i} is not a list of "type: text" or JSON: {str(value)[:60]!r}')
        references.append(_normal(spans, ignore_case))
    predictions = [_normal(_parse_text(text, lenient=True) or [], ignore_case) for text in completions]
    return [_f1(prediction, reference) for prediction, reference in zip(predictions, references)]


Spans = list[tuple[str, str]]


def _parse_text(text: str, lenient: bool = False) -> Spans | None:
    """The entities of a text; None if its format is unknown. `lenient` skips lines that are not entities."""
    try:
        return _parse_value(parse_json(text, fenced=True))
    except ValueError:
        return _parse_value([line for line in text.splitlines() if line.strip()], lenient)


def _parse_value(value: Any, lenient: bool = False) -> Spans | None:
    if isinstance(value, dict):
        single = _span(value)
        value = [single] if single else [(kind, text) for kind, texts in value.items() for text in _listed(texts)]
    if not _is_list(value):
        return None
    spans = [_span(item) for item in value]
    if not lenient and None in spans:
        return None
    return [span for span in spans if span is not None]


def _span(item: Any) -> tuple[str, str] | None:
    if isinstance(item, dict):
        item = (item.get("type", item.get("label")), item.get("text"))
    elif isinstance(item, str):
        kind, colon, text = re.sub(r"^\s*(?:[-*•]|\d+[.)])\s+", "", item).partition(":")
        item = (kind, text) if colon else ()
    if not _is_list(item) or len(item) != 2 or not all(isinstance(part, str) and part.strip() for part in item):
        return None
    return item[0], item[1]


def _listed(value: Any) -> Any:
    return value if _is_list(value) else [value]


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _normal(spans: Spans, ignore_case: bool) -> Counter:
    texts = ((kind, text.casefold() if ignore_case else text) for kind, text in spans)
    return Counter((" ".join(kind.casefold().split()), " ".join(text.split())) for kind, text in texts)


def _f1(prediction: Counter, reference: Counter) -> float:
    total = prediction.total() + reference.total()
    return 2 * (prediction & reference).total() / total if total else 1.0
