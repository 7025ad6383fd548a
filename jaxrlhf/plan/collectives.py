"""Collectives of a compiled program. XLA's text of the program says how often they run and how many bytes they send."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"^ +(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(-start)?\((.*)$")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All calls of one kind of collective over the same mesh axes, for one device."""

    count: float  # number of calls
    sent: float  # bytes that the device sends if the collective uses a ring


def collectives_of(text: str, mesh: Mapping[str, int], unknown_trips: Sequence[float]) -> dict[str, Exchange]:
    """Returns the collectives of a compiled module, the largest first.

    A key is a kind with its mesh axes, such as "all-reduce over tensor". The body of a loop counts once per iteration.
    If the text does not give the number of iterations of a loop, it is assumed to be `unknown_trips[i]`, where i is the
    number of such loops around it, or 1 if `unknown_trips` is too short. Each branch of a conditional counts once.
    """
    bodies = {name: (bool(entry), body.splitlines()) for entry, name, body in _COMPUTATION.findall(text)}
    totals: dict[tuple[str, int], dict[str, np.ndarray]] = {}

    def count(name: str, depth: int) -> dict[str, np.ndarray]:
        """Returns the counts of a computation inside of `depth` loops without a number of iterations."""
        if (name, depth) not in totals:
            total = totals[name, depth] = collections.defaultdict(lambda: np.zeros(2))
            for line in bodies.get(name, (False, ()))[1]:
                if (match := _COLLECTIVE.match(line)) and (exchange := _exchange(match, mesh)):
                    total[exchange[0]] += (1.0, exchange[1])
                trips = _TRIPS.search(line)
                unknown = " while(" in line and not trips
                times = float(trips[1]) if trips else (*unknown_trips[depth:], 1.0)[0] if unknown else 1.0
                for inner in (*_CALLED.findall(line), *re.findall(r"[\w.\-]+", " ".join(_BRANCHES.findall(line)))):
                    for key, counts in count(inner, depth + unknown).items():
                        total[key] += times * counts
        return totals[name, depth]

    (entry,) = (name for name, (is_entry, _) in bodies.items() if is_entry)
    return largest_first({key: Exchange(*map(float, counts)) for key, counts in count(entry, 0).items()})


def largest_first(exchanges: Mapping[str, Exchange]) -> dict[str, Exchange]:
    return dict(sorted(exchanges.items(), key=lambda item: -item[1].sent))


def _exchange(match: re.Match, mesh: Mapping[str, int]) -> tuple[str, float] | None:
    """Returns (kind and mesh axes as text, bytes that a device sends) of a collective.

    Returns None if each group of the collective has one device.
    """
    shapes, kind, start, attributes = match.groups()
    sizes = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    sizes = [_SIZES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in sizes]
    if start and kind != "all-reduce":  # (operands, results)
        sizes = sizes[len(sizes) // 2 :] if kind in ("all-gather", "reduce-scatter") else sizes[:1]
    group = first_group(attributes, math.prod(mesh.values()))
    if (size := len(group)) == 1:
        return None
    # Along the last axis of the mesh, device numbers are consecutive.
    positions = np.array(np.unravel_index(group, tuple(mesh.values())))
    axes = "+".join(name for name, position in zip(mesh, positions) if len(set(position)) > 1)
    share = {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1, "collective-permute": 1}
    return f"{kind} over {axes}", share.get(kind, (size - 1) / size) * sum(sizes)


def first_group(attributes: str, devices: int) -> list[int]:
    """Returns the device numbers of the first group of a collective. All notations that XLA prints are read."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return next(([int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", pairs[1]) if a != b), [0])
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*\{(.*?)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2] or f"[{math.prod(axes.values())}]").reshape(tuple(axes.values()))
        index: list[slice | int] = [0] * len(axes)
        # A group may span a part of an axis. The text 'x':(before)size splits the axis x into before x size x rest. The
        # group then spans `size`.
        for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3]):
            rest = axes[name] // (int(before or 1) * int(part or axes[name]))
            index[list(axes).index(name)] = slice(0, rest * int(part or axes[name]), rest)
        return ids[tuple(index)].reshape(-1).tolist()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in listed[1].split(",")]
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"replica_groups has an unknown notation: {attributes[:200]}")
    return list(range(devices))


def _iota(text: str) -> np.ndarray:
    """Returns the numbers that a text such as `[8,4]T(1,0)` means.

    The numbers are counted from 0, arranged in the shape [8,4], transposed by (1,0) and then flattened.
    """
    shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    sizes = [int(n) for n in shape.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(n) for n in order.split(",")] if order else None).reshape(-1)
