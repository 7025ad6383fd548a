"""Rewards for structured completions, which are JSON or lists of named entities. `library` lists these rewards."""

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
    """Returns 1 if the whole completion is JSON and its top level has all keys of `required`, else 0.

    NaN is not JSON (RFC 8259). `kind` is the type of the top level: any, object or array. If `fenced` is set, JSON in a
    Markdown code fence is also accepted.
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
    """Parses a text as JSON. Raises ValueError if the text is not JSON.

    If `fenced` is set and the text has exactly one code fence, the content of this fence is parsed.
    """
    if fenced and len(blocks := FENCED.findall(text)) == 1:
        text = blocks[0]
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:  # a long row of opening brackets
        raise ValueError("the JSON text is nested too deeply") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


@abstains_without("entities")
def span_f1(completions: Sequence[str], entities: Sequence[Any], *, ignore_case: bool = False) -> list[float]:
    """Returns the F1 between the named entities of the completion and those of the column `entities`.

    An entity is right if its type and its text match. Case is ignored in types. Several blanks in a row count as one.
    An entity that occurs twice counts twice. If neither completion nor column has an entity, the score is 1.

    Column and completion have one of two formats. The first format has one line "type: text" per entity, with or
    without a list mark such as "-". The second format is JSON: a list of {"type": ..., "text": ...}, a list of
    [type, text], or an object that maps each type to a list of texts. The column may also hold such a list or object
    instead of JSON text.
    """
    rows = read_entities(completions, entities, ignore_case)
    return [_f1(prediction, reference) for prediction, reference in zip(*rows)]


def read_entities(
    completions: Sequence[str], entities: Sequence[Any], ignore_case: bool = False
) -> tuple[list[Counter], list[Counter]]:
    """Returns the entities (type, text) of the completions and those of the column, as `span_f1` reads them."""
    references = []
    for i, value in enumerate(entities):
        spans = _parse_text(value) if isinstance(value, str) else _parse_value(value)
        if spans is None:
            raise ValueError(
                f'column entities, row {i} must be lines of the form "type: text" or JSON, not {str(value)[:60]!r}'
            )
        references.append(_normal(spans, ignore_case))
    return [_normal(_parse_text(text, lenient=True) or [], ignore_case) for text in completions], references


Spans = list[tuple[str, str]]


def _parse_text(text: str, lenient: bool = False) -> Spans | None:
    """Returns the entities of a text, or None if the text has another format.

    If `lenient` is set, lines without an entity are skipped.
    """
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
