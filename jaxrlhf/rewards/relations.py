"""F1 of relations between entities. `library` lists this reward."""

from collections.abc import Sequence
from typing import Any

from jaxrlhf.rewards.columns import check_choice, check_texts
from jaxrlhf.rewards.matching import ITEM, MATCHES, NONE, Unreadable, f1, is_list, normal_label
from jaxrlhf.rewards.structured import parse_json


def relation_f1(
    completions: Sequence[str],
    relations: Sequence[Any],
    *,
    match: str = "strict",
    ignore_case: bool = False,
    symmetric: Sequence[str] = (),
) -> list[float | None]:
    """Returns the F1 of the relations of the completion and those of the column `relations`.

    Both are JSON lists of {"head": ..., "relation": ..., "tail": ...} or [head, relation, tail], or lines
    "head | relation | tail". The column may also hold such a list instead of JSON text. A head or tail is a text, or an
    object with `text` and `label`; then the label must match too. `none` or `[]` means no relation. A completion with
    another form scores 0. A repeated relation lowers precision.

    `match` "strict": a relation is right if head, relation and tail match. "partial": a pair with the same relation
    counts as a fraction, common words divided by all words, averaged over head and tail. `symmetric` names relations
    in which head and tail may be swapped. Case is ignored in relations and labels, and with `ignore_case` also in
    texts.
    """
    check_choice("match", match, tuple(MATCHES))
    check_texts("symmetric", symmetric)
    both_ways = {normal_label(name) for name in symmetric}
    scores: list[float | None] = []
    for i, (answer, gold) in enumerate(zip(completions, relations)):
        if gold is None:
            scores.append(None)
            continue
        try:
            wanted = _relations(gold, ignore_case, both_ways)
        except Unreadable as error:
            raise ValueError(f"column relations, row {i} cannot be used: {error}") from None
        try:
            found = _relations(answer, ignore_case, both_ways)
        except Unreadable:
            scores.append(0.0)
        else:
            scores.append(f1(found, wanted, MATCHES[match]))
    return scores


def _relations(value: Any, ignore_case: bool, both_ways: set[str]) -> list[tuple]:
    """Returns relations as (relation, (head label, head words), (tail label, tail words))."""
    if isinstance(value, str):
        if NONE.fullmatch(value):
            return []
        try:
            value = parse_json(value, fenced=True)
        except ValueError:
            value = [ITEM.sub("", line).split("|") for line in value.splitlines() if line.strip()]
            if not value:
                raise Unreadable("it is empty; write none or [] if there is no relation") from None
    value = [value] if isinstance(value, dict) else value
    if not is_list(value):
        raise Unreadable(f"it must be a list of relations, not a {type(value).__name__}")
    return [_relation(item, ignore_case, both_ways) for item in value]


def _relation(item: Any, ignore_case: bool, both_ways: set[str]) -> tuple:
    shown = f"{item!r:.60}"
    if isinstance(item, str):
        item = item.split("|")
    if isinstance(item, dict):
        item = (item.get("head"), item.get("relation", item.get("label", item.get("type"))), item.get("tail"))
    if not is_list(item) or len(item) != 3 or not isinstance(item[1], str) or not item[1].strip():
        raise Unreadable(f"the relation {shown} does not have the form head | relation | tail")
    ends = []
    for end in (item[0], item[2]):
        text, label = (end.get("text"), end.get("label", end.get("type", ""))) if isinstance(end, dict) else (end, "")
        if not isinstance(text, str) or not text.strip() or not isinstance(label, str):
            raise Unreadable(f"a head or tail of the relation {shown} has no text")
        ends.append((normal_label(label), tuple((text.casefold() if ignore_case else text).split())))
    name = normal_label(item[1])
    return (name, *(sorted(ends) if name in both_ways else ends))
