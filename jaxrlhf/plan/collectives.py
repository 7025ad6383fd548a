"""Collectives of a compiled program, read from XLA's text: how often, how many bytes, between which cards."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", re.M | re.S)
_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"^ +(?:ROOT )?%?[\w.\-]+ = (.*?) ({_KINDS})(-start)?\((.*)$", re.M)
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange within groups of devices, all its turns together; per device."""

    kind: str  # such as all-gather
    axes: str  # mesh axes that its groups run along
    size: int  # devices in a group
    count: float  # how often
    bytes: float  # of the whole buffer: what an all-gather makes, what the others take
    wire: float  # that a device sends in a ring


def collectives_of(text: str, mesh: Mapping[str, int], turns: int) -> list[Collective]:
    """Those of a compiled module, each loop as often as it turns: `turns` where the text does not say how often.

    Of branches all count, as if each were taken once.
    """
    bodies = {name: (bool(entry), body) for entry, name, body in _COMPUTATION.findall(text)}
    done: dict[str, collections.Counter] = {}

    def counted(name: str) -> collections.Counter:
        if name not in done:
            done[name] = collections.Counter()
            body = bodies.get(name, (False, ""))[1]
            for found in _COLLECTIVE.finditer(body):
                done[name][_read(found, mesh)] += 1
            for line in body.splitlines():
                trips = _TRIPS.search(line)
                times = (int(trips[1]) if trips else turns) if " while(" in line else 1
                called = [*_CALLED.findall(line), *re.findall(r"[\w.\-]+", " ".join(_BRANCHES.findall(line)))]
                for inner in called:
                    for key, count in counted(inner).items():
                        done[name][key] += times * count
        return done[name]

    total = collections.Counter()
    for name, (entry, _) in bodies.items():
        if entry:
            total = counted(name)
    return merged([Collective(*key, count, size * count, wire * count) for (*key, size, wire), count in total.items()])


def merged(found: list[Collective]) -> list[Collective]:
    """One for each kind and axes, the largest first; those within one device are left out."""
    sums: dict[tuple, Collective] = {}
    for c in found:
        if c.size > 1 and c.count:
            old = sums.get((c.kind, c.axes, c.size), dataclasses.replace(c, count=0.0, bytes=0.0, wire=0.0))
            sums[c.kind, c.axes, c.size] = dataclasses.replace(
                c, count=old.count + c.count, bytes=old.bytes + c.bytes, wire=old.wire + c.wire
            )
    return sorted(sums.values(), key=lambda c: -c.wire)


def _read(found: re.Match, mesh: Mapping[str, int]) -> tuple[str, str, int, float, float]:
    """(kind, axes, devices in a group, bytes of the whole buffer, bytes that a device sends)."""
    shapes, kind, start, rest = found.groups()
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
    arrays = [_SIZES.get(t, 4) * math.prod(int(n) for n in dims.split(",") if n) for t, dims in arrays]
    if start and kind != "all-reduce":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :] if kind in ("all-gather", "reduce-scatter") else arrays[:1]
    group = first_group(rest, math.prod(mesh.values()))
    size, given = len(group), float(sum(arrays))
    whole = given * size if kind == "reduce-scatter" else given
    passes = {"all-reduce": 2, "collective-permute": size / max(size - 1, 1)}.get(kind, 1)
    return kind, _axes_of(group, mesh), size, whole, passes * whole * (size - 1) / size


def first_group(attributes: str, devices: int) -> list[int]:
    """Numbers of the devices of the first group that exchange with each other; in each spelling XLA has."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        moved = [pair for pair in re.findall(r"(\d+),(\d+)", pairs[1]) if pair[0] != pair[1]]
        return [int(n) for n in moved[0]] if moved else [0]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*\{(.*?)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2], math.prod(axes.values())).reshape(tuple(axes.values()))
        picked: list[slice | int] = [0] * len(axes)
        # An axis may be taken in part: 'x':(before)size are `size` groups of what is left of it.
        for name, before, part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3]):
            rest = axes[name] // (int(before or 1) * int(part or axes[name]))
            picked[list(axes).index(name)] = slice(0, rest * int(part or axes[name]), rest)
        return ids[tuple(picked)].reshape(-1).tolist()
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        shape = [int(n) for n in iota[1].split(",")]
        return _iota(iota[2], math.prod(shape)).reshape(shape)[0].tolist()
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return [int(n) for n in listed[1].split(",")]
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"groups of devices in a spelling that is not known: {attributes[:200]}")
    return list(range(devices))  # no groups given: all devices


def _iota(text: str | None, size: int) -> np.ndarray:
    """`[8,4]T(1,0)`: numbers from 0, in this shape, transposed; none: as they are."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text or f"[{size}]")
    numbers = np.arange(size).reshape([int(n) for n in shape[1].split(",")])
    return (numbers.transpose([int(n) for n in shape[2].split(",")]) if shape[2] else numbers).reshape(-1)


def _axes_of(group: list[int], mesh: Mapping[str, int]) -> str:
    """Names of the mesh axes along which the devices of a group differ; devices are numbered with the last fastest."""
    places = np.array(np.unravel_index(group, tuple(mesh.values())))
    return "+".join(name for name, place in zip(mesh, places) if len(set(place)) > 1) or "none"
