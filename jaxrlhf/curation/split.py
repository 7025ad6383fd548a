"""Splits a data file into parts, such as training, validation and test. This is the command `jaxrlhf data split`.

The file is read twice: once to decide, once to write. Rows of a group go to one part. Groups are placed one by one:
large groups first, and among groups of one size those with rare labels first. Each goes to the part that lacks most
rows of its labels (iterative stratification, Sechidis et al. 2011). When all rows of a label are placed, the number
that a part still lacks counts for the other labels too. Otherwise many rare labels would all end in the largest part.
The seed shuffles groups of one size and label.
"""

import contextlib
import json
import os
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxrlhf.curation.reading import open_source, parse_fields
from jaxrlhf.curation.similarity import THRESHOLD, Sketches, clusters
from jaxrlhf.curation.writing import check_output, jsonl_writer
from jaxrlhf.data.fields import has_field
from jaxrlhf.data.sources import Row, stream_rows
from jaxrlhf.errors import UserError

PARTS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Part:
    """A part that was written. `labels` counts the values of the column `stratify`."""

    name: str
    path: str
    rows: int
    labels: Mapping[str, int]


def split(
    path: str,
    out: str,
    *,
    parts: Mapping[str, float] = PARTS,
    stratify: str | None = None,
    group: str | None = None,
    near: bool = False,
    similarity: float = THRESHOLD,
    seed: int = 0,
    kind: str | None = None,
    settings: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Part]:
    """Writes the rows to `out`/NAME.jsonl for each part, in their order, and returns the parts.

    parts     share of the rows of each part; the shares are positive and their sum is 1
    stratify  column whose values have the same shares in each part as in the file
    group     column; rows with the same value go to one part
    near      rows with equal or nearly equal prompts go to one part, so that no part knows the prompts of another
    kind, settings  as in `check`; `kind` is used only with `near`

    Raises UserError, and writes nothing, if a part would be empty or a row has no value in a column.
    """
    check_parts(parts)
    files = {name: os.path.join(out, f"{name}.jsonl") for name in parts}
    if os.path.isdir(out):
        for file in files.values():
            check_output(file, overwrite)
    source = open_source(path, kind, settings) if near else None
    fields = parse_fields(path, settings)
    labels: list[str] = []
    keys: dict[str, int] = {}
    groups: list[int] = []
    sketches = Sketches()
    for number, row in enumerate(stream_rows(fields) if source is None else source.rows):
        labels.append("" if stratify is None else _value(row, stratify))
        groups.append(number if group is None else keys.setdefault(_value(row, group), number))
        if source is not None:
            sketches.add(source.read(row).subject)
    pairs = [(groups[number], number) for number in range(len(groups))]
    joined = clusters(len(groups), [*pairs, *sketches.pairs(similarity, equal=True)])
    placed = place(labels, joined, list(parts.values()), seed)
    names = list(parts)
    counts = [Counter(label for label, part in zip(labels, placed) if part == i) for i in range(len(names))]
    for name, count in zip(names, counts):
        if not count:
            raise UserError(
                f"{path}: part {name} would be empty: the file has {len(labels)} rows in {len(set(groups))} groups; "
                "give the part a larger share, or more rows"
            )
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: the folder cannot be made: {error.strerror}; give another --out") from None
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(jsonl_writer(file, overwrite)) for file in files.values()]
        for row, part in zip(stream_rows(fields), placed):
            writers[part](row)
    shown = [dict(sorted(count.items())) if stratify is not None else {} for count in counts]
    return [Part(n, files[n], count.total(), values) for n, count, values in zip(names, counts, shown)]


def place(labels: Sequence[str], groups: Sequence[int], shares: Sequence[float], seed: int) -> list[int]:
    """Returns the number of the part of each row. `groups` holds the first row of the group of each row."""
    members: dict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(groups):
        members[first].append(row)
    order = list(members)
    random.Random(seed).shuffle(order)
    totals = Counter(labels)

    def rarest(first: int) -> tuple[int, str]:
        return min((totals[labels[row]], labels[row]) for row in members[first])

    order.sort(key=lambda first: (-len(members[first]), rarest(first)))
    lacking = {label: [share * total for share in shares] for label, total in totals.items()}
    left = Counter(labels)
    carried = [0.0] * len(shares)  # rows that a part lacks of the labels that have all been placed
    placed = [0] * len(labels)
    for first in order:
        content = Counter(labels[row] for row in members[first])

        def want(part: int, content: Counter = content, carried: list[float] = carried) -> float:
            lacks = ((label, lacking[label][part] + carried[part]) for label in content)
            # Rounded: sums of binary fractions must not decide between parts that lack the same.
            return round(sum(content[label] * lack / totals[label] for label, lack in lacks), 9)

        best = max(range(len(shares)), key=want)
        for row in members[first]:
            placed[row] = best
            label = labels[row]
            lacking[label][best] -= 1
            left[label] -= 1
            if not left[label]:
                carried = [carry + lack for carry, lack in zip(carried, lacking[label])]
    return placed


def parse_parts(text: str) -> dict[str, float]:
    """Returns the parts of a text such as `train=0.8,validation=0.1,test=0.1`."""
    parts: dict[str, float] = {}
    for item in text.split(","):
        name, _, share = item.strip().partition("=")
        try:
            if name in parts:
                raise ValueError
            parts[name] = float(share)
        except ValueError:
            raise UserError(
                f"--parts: must be NAME=SHARE,NAME=SHARE with different names and numbers as shares, not {text!r}"
            ) from None
    check_parts(parts)
    return parts


def check_parts(parts: Mapping[str, float]) -> None:
    """Raises UserError unless the shares are positive and their sum is 1."""
    shown = ",".join(f"{name}={share:g}" for name, share in parts.items())
    if any(not name.replace("-", "_").isidentifier() for name in parts):
        raise UserError(f"parts {shown}: a name must be a word, because it names a file")
    if not all(share > 0 for share in parts.values()) or abs(sum(parts.values()) - 1) > 1e-6:
        raise UserError(f"parts {shown}: the shares must be positive, and their sum must be 1")


def _value(row: Row, column: str) -> str:
    if not has_field(row, column):
        raise UserError(f"{row.where}: the row has no {column!r}; its fields are: {', '.join(row.values)}")
    value = row.values[column]
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
