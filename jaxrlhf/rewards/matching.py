"""What the rewards entity_f1 and relation_f1 share: how items are compared, and how lists of them are read."""

import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

NONE = re.compile(r"\W*(none|no entities|no relations)\W*", re.IGNORECASE)
ITEM = re.compile(r"^\s*(?:[-*•]\s+|\d+[.)]\s+)?")


class Unreadable(ValueError):
    """An answer or a value of a column has none of the formats."""


def _words(left: tuple, right: tuple) -> float:
    """Returns the share of common words, 0 if the labels differ."""
    if left[0] != right[0]:
        return 0.0
    one, other = Counter(left[1]), Counter(right[1])
    return (one & other).total() / (one | other).total()


def f1(found: Sequence[Hashable], wanted: Sequence[Hashable], match: Callable) -> float:
    """Returns the F1 of the found items, 1 if both lists are empty. `match` is one of `MATCHES`."""
    return 2 * match(found, wanted) / (len(found) + len(wanted)) if found or wanted else 1.0


def _strict(found: Sequence[Hashable], wanted: Sequence[Hashable]) -> float:
    return (Counter(found) & Counter(wanted)).total()


def _partial(found: Sequence[tuple], wanted: Sequence[tuple]) -> float:
    """Returns the sum of the overlaps of pairs. The pairs with the largest overlap are formed first."""
    overlaps = [(_overlap(a, b), i, j) for i, a in enumerate(found) for j, b in enumerate(wanted) if a[0] == b[0]]
    total, left, right = 0.0, set(), set()
    for share, i, j in sorted(overlaps, key=lambda pair: (-pair[0], *pair[1:])):
        if share > 0 and i not in left and j not in right:
            total += share
            left.add(i)
            right.add(j)
    return total


def _overlap(a: tuple, b: tuple) -> float:
    if isinstance(a[1], int):
        common = min(a[2], b[2]) - max(a[1], b[1])
        return max(common, 0) / (max(a[2], b[2]) - min(a[1], b[1]))
    return sum(map(_words, a[1:], b[1:])) / len(a[1:])


# Each returns the number of matching items, in which a partial match is a fraction.
MATCHES: Mapping[str, Callable] = {"strict": _strict, "partial": _partial}


def normal_label(label: str) -> str:
    """Returns a label in lower case, with single blanks."""
    return " ".join(label.casefold().split())


def bare(text: str) -> str:
    """Returns a text with single blanks and none at its ends."""
    return " ".join(text.split())


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))
