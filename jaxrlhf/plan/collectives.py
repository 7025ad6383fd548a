"""Collectives of a compiled program, read from XLA's text: how often, and how many bytes between which cards."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

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
    """One kind of collective along the same mesh axes, all its calls together; per device."""

    count: float
    sent: float  # bytes, in a ring


def collectives_of(text: str, mesh: Mapping[str, int], unknown_trips: int) -> dict[str, Exchange]:
    """The collectives of a compiled module by kind and axes ("all-reduce over tensor"), the largest first.

    Each loop counts as often as it runs: `unknown_trips` where the text does not say; each branch counts once.
    """
    bodies = {name: (bool(entry), body.splitlines()) for entry, name, body in _COMPUTATION.findall(text)}
    done: dict[str, dict[str, np.ndarray]] = {}

    def counted(name: str) -> dict[str, np.ndarray]:
        if name not in done:
            found = done[name] = collections.defaultdict(lambda: np.zeros(2))
            for line in bodies.get(name, (False, ()))[1]:
                if (match := _COLLECTIVE.match(line)) and (read := _read(match, mesh)):
                    found[read[0]] += (1.0, read[1])
                trips = _TRIPS.search(line)
                times = (int(trips[1]) if trips else unknown_trips) if " while(" in line else 1
                for inner in (*_CALLED.findall(line), *re.findall(r"[\w.\-]+", " ".join(_BRANCHES.findall(line)))):
                    for key, counts in counted(inner).items():
                        found[key] += times * counts
        return done[name]

    (entry,) = (name for name, (is_entry, _) in bodies.items() if is_entry)
    return largest_first({key: Exchange(*map(float, counts)) for key, counts in counted(entry).items()})


def largest_first(found: Mapping[str, Exchange]) -> dict[str, Exchange]:
    return dict(sorted(found.items(), key=lambda item: -item[1].sent))


def _read(found: re.Match, mesh: Mapping[str, int]) -> tuple[str, float] | None:
    """(kind and axes, bytes that a device sends) of a line; None within one device."""
    shapes, kind, start, rest = found.groups()
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    arrays = [_SIZES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in arrays]
    if start and kind != "all-reduce":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :] if kind in ("all-gather", "reduce-scatter") else arrays[:1]
    group = first_group(rest, math.prod(mesh.values()))
    if (size := len(group)) == 1:
        return None
    # Devices are numbered with the last axis fastest.
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    axes = "+".join(name for name, place in zip(mesh, places) if len(set(place)) > 1)
    of_buffer = {"all-reduce": 2 * (size - 1) / size, "reduce-scatter": size - 1, "collective-permute": 1}
    return f"{kind} over {axes}", of_buffer.get(kind, (size - 1) / size) * sum(arrays)


def first_group(attributes: str, devices: int) -> list[int]:
    """Numbers of the devices of the first group that exchange with each other; in each spelling XLA has."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        moved = [pair for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1]]
        return [int(n) for n in moved[0]] if moved else [0]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*\{(.*?)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2] or f"[{math.prod(axes.values())}]").reshape(tuple(axes.values()))
        picked: list[slice | int] = [0] * len(axes)
        # An axis may be taken in part: 'x':(before)size are `size` groups of what is left of it.
        for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3]):
            rest = axes[name] // (int(before or 1) * int(part or axes[name]))
            picked[list(axes).index(name)] = slice(0, rest * int(part or axes[name]), rest)
        return ids[tuple(picked)].reshape(-1).tolist()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(iota[2]).reshape([int(n) for n in iota[1].split(",")])[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in listed[1].split(",")]
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"groups of devices in a spelling that is not known: {attributes[:200]}")
    return list(range(devices))  # no groups given: all devices


def _iota(text: str) -> np.ndarray:
    """`[8,4]T(1,0)`: numbers from 0, in this shape, transposed; without T as they are."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    sizes = [int(n) for n in shape[1].split(",")]
    order = [int(n) for n in shape[2].split(",")] if shape[2] else range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1)
