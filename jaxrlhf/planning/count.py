"""What one device does in a program: arithmetic, bytes to and from memory, collectives, and memory while it runs.

Counted in the partitioned program, kernel by kernel as `graph` draws them, each loop as often as it turns.
"""

import dataclasses
import heapq
import math
import re

import numpy as np

from jaxrlhf.planning.graph import COLLECTIVES, LOOPS, Graph, Kernel, Key
from jaxrlhf.planning.hlo import Computation, Instruction, Module, trips


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange within groups of devices, all its turns together; per device."""

    kind: str  # such as all-gather
    axes: str  # mesh axes that its groups run along
    size: int  # devices in a group
    hosts: int  # hosts that a group spans
    count: float  # how often
    bytes: float  # of the whole buffer: what an all-gather makes, what the others take
    wire: float  # that a device sends in a ring


@dataclasses.dataclass
class Count:
    """Per device and call of the program."""

    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # read from and written to memory
    peak: float = 0.0  # largest sum of what lies in memory beside the arguments, outputs included
    outputs: float = 0.0  # bytes of results that take over no argument's memory
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0  # loops that were counted once because the text does not say how often they turn

    @property
    def temporaries(self) -> float:
        """Beside arguments and outputs."""
        return self.peak - self.outputs

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(collective.wire for collective in self.collectives)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How devices are numbered: the mesh's axes, the last one fastest, and devices per host."""

    shape: dict[str, int]
    per_host: int = 8


def count(module: Module, layout: Layout) -> Count:
    """Counts of the program whose text the module is."""
    found = _Counter(module, layout).computation(module.main, donated=set(module.aliases.values()))
    shapes = [array.bytes for array in module.main.instructions[module.main.root].arrays]
    found.outputs = sum(size for leaf, size in enumerate(shapes) if leaf not in module.aliases)
    found.collectives = _merged(found.collectives)
    return found


class _Counter:
    def __init__(self, module: Module, layout: Layout):
        self.module, self.layout = module, layout
        self._done: dict[str, Count] = {}

    def computation(self, computation: Computation, donated: set[int] | None = None) -> Count:
        """`donated`: numbers of parameters whose memory results may take over; None: by position, as in a loop."""
        if computation.name in self._done:
            return self._done[computation.name]
        graph = Graph(self.module, computation)
        total, inner = Count(), {}
        for kernel in graph.kernels:
            one = self._kernel(graph, kernel)
            inner[kernel.instruction.name] = one.peak
            total.flops += one.flops
            total.bytes += one.bytes
            total.collectives += one.collectives
            total.unknown_loops += one.unknown_loops
        total.peak = _Memory(graph, inner, self._reusable(graph, donated)).peak()
        if computation is self.module.main:
            copied = self._copied(graph)
            total.peak += copied
            total.bytes += 2 * copied
        self._done[computation.name] = total
        return total

    def _copied(self, graph: Graph) -> int:
        """Bytes of results that are an argument, or another result, as it is: each has memory of its own."""
        own = [key for leaf, key in enumerate(graph.outputs) if leaf not in self.module.aliases]
        given = [key for key in own if graph.instruction(key[0]).op == "parameter"]
        again = [key for key in set(own) - set(given) for _ in range(own.count(key) - 1)]
        return sum(graph.bytes(key) for key in (*given, *again))

    def _kernel(self, graph: Graph, kernel: Kernel) -> Count:
        instruction = kernel.instruction
        if instruction.op in LOOPS:
            return self._loop(graph, instruction)
        found = Count(bytes=sum(kernel.reads.values()) + kernel.written)
        if instruction.op == "dot":
            taken = graph.instruction(instruction.operands[0]).arrays[0].shape
            summed = math.prod(taken[i] for i in instruction.numbers("lhs_contracting_dims"))
            found.flops = 2.0 * instruction.arrays[0].elements * summed
        elif instruction.op in COLLECTIVES:
            found.collectives = [_collective(graph, instruction, self.layout)]
        return found

    def _loop(self, graph: Graph, instruction: Instruction) -> Count:
        """Of a while loop: its body as often as it turns; of branches: the most that any takes."""
        called = {role: self.module.computations[name] for role, name in instruction.called.items()}
        if instruction.op != "while":
            branches = [self.computation(c) for c in called.values()]
            most = max(branches, key=lambda branch: (branch.flops, branch.bytes))
            return dataclasses.replace(most, peak=max(branch.peak for branch in branches))
        body, turns = self.computation(called["body"]), trips(self.module, graph.computation, instruction)
        times = 1 if turns is None else turns
        return Count(
            flops=body.flops * times,
            bytes=body.bytes * times,
            peak=body.peak,
            collectives=[
                dataclasses.replace(c, count=c.count * times, bytes=c.bytes * times, wire=c.wire * times)
                for c in body.collectives
            ],
            unknown_loops=body.unknown_loops + (turns is None),
        )

    def _reusable(self, graph: Graph, donated: set[int] | None) -> dict[Key, Key]:
        """Results -> the parameter's value whose memory they take over."""
        parameters = graph.computation.parameters
        if donated is None:
            values = [(parameters[0], leaf) for leaf in range(len(graph.outputs))] if len(parameters) == 1 else []
            return {out: value for out, value in zip(graph.outputs, values) if out != value}
        pairs = ((graph.outputs[leaf], (parameters[n], 0)) for leaf, n in self.module.aliases.items())
        return {out: value for out, value in pairs if out != value}


# ---------------------------------------------------------------- memory


class _Memory:
    """Runs the kernels of a computation in an order that keeps little in memory, and notes the largest sum.

    A greedy order, as XLA's scheduler has one: of the kernels that can run, the one that frees most. The order of the
    text is tried too, and the better one counts, as there.
    """

    def __init__(self, graph: Graph, inner: dict[str, float], reusable: dict[Key, Key]):
        self.graph, self.inner, self.reusable = graph, inner, reusable
        self.kernels = graph.kernels
        self.maker = {key: i for i, kernel in enumerate(self.kernels) for key in kernel.writes}
        self.readers: dict[Key, set[int]] = {}
        for i, kernel in enumerate(self.kernels):
            for key in kernel.reads:
                self.readers.setdefault(key, set()).add(i)
            for key in kernel.in_place.values():
                self.readers.setdefault(key, set()).add(i)
        self.kept = set(graph.outputs)

    def peak(self) -> float:
        """The largest sum of what lies in memory beside parameters."""
        return min((self._run(greedy) for greedy in (True, False)), default=0.0)

    def _run(self, greedy: bool) -> float:
        users: dict[int, set[int]] = {}
        waits = []
        for i, kernel in enumerate(self.kernels):
            makers = {self.maker[key] for key in self._needs(i) | kernel.after if key in self.maker}
            waits.append(len(makers))
            for maker in makers:
                users.setdefault(maker, set()).add(i)
        left = {key: len(readers) for key, readers in self.readers.items()}
        self.taken: dict[Key, float] = {}  # bytes by value, of those that lie in memory of their own
        now = peak = 0.0
        ready = [(self._rank(i, left, greedy), i) for i, n in enumerate(waits) if n == 0]
        heapq.heapify(ready)
        done: set[int] = set()
        while ready:
            rank, i = heapq.heappop(ready)
            if i in done:
                continue
            current = self._rank(i, left, greedy)
            if current > rank:  # what it frees has changed since it was put there
                heapq.heappush(ready, (current, i))
                continue
            done.add(i)
            for key, old in self._taken_over(i, left).items():
                self.taken[key] = self.taken.pop(old)
            made = self._made(i, left)
            peak = max(peak, now + sum(made.values()) + self.inner.get(self.kernels[i].instruction.name, 0.0))
            self.taken |= made
            now += sum(made.values())
            for key in self._needs(i):
                left[key] -= 1
                if left[key] == 0 and key not in self.kept:
                    now -= self.taken.pop(key, 0.0)
                elif left[key] == 1:  # its last reader frees it now
                    for reader in self.readers[key]:
                        if waits[reader] == 0 and reader not in done:
                            heapq.heappush(ready, (self._rank(reader, left, greedy), reader))
            for key in self.kernels[i].writes:
                if not self.readers.get(key) and key not in self.kept:
                    now -= self.taken.pop(key, 0.0)
            for user in users.get(i, ()):
                waits[user] -= 1
                if waits[user] == 0:
                    heapq.heappush(ready, (self._rank(user, left, greedy), user))
        return peak

    def _needs(self, i: int) -> set[Key]:
        kernel = self.kernels[i]
        return set(kernel.reads) | set(kernel.in_place.values())

    def _rank(self, i: int, left: dict[Key, int], greedy: bool) -> float:
        """What running it adds to memory; the order of the text decides between equals."""
        if not greedy:
            return self.kernels[i].order
        over = self._taken_over(i, left)
        freed = sum(
            self.taken.get(key, 0.0)
            for key in self._needs(i)
            if left[key] == 1 and key not in self.kept and key not in over.values()
        )
        made = sum(size for key, size in self._made(i, left).items() if key not in over)
        return made - freed + self.kernels[i].order * 1e-6

    def _taken_over(self, i: int, left: dict[Key, int]) -> dict[Key, Key]:
        """Results -> operands that nobody else wants any more, whose memory they take over."""
        first = {old: key for key, old in reversed(self.kernels[i].in_place.items())}
        return {key: old for old, key in first.items() if old in self.taken and left[old] == 1 and old not in self.kept}

    def _made(self, i: int, left: dict[Key, int]) -> dict[Key, float]:
        """Memory that its results take anew."""
        kernel, made = self.kernels[i], {}
        for key, size in kernel.writes.items():
            if key in self.taken:
                continue
            old, over = kernel.in_place.get(key), self.reusable.get(key)
            passed = old is not None and self._parameter(old) and (over == old or self._invariant(kernel, key))
            made[key] = 0.0 if over is not None or passed else size
        return made

    def _invariant(self, kernel: Kernel, key: Key) -> bool:
        """Whether a loop hands this part of its state on as it is."""
        if kernel.instruction.op != "while":
            return False
        body = self.graph.module.computations[kernel.instruction.called["body"]]
        result = body.instructions[body.root]
        if result.op != "tuple":
            return False
        last = body.instructions[result.operands[key[1]]]
        same = last.op == "get-tuple-element" and last.numbers("index") == (key[1],)
        return same and last.operands[0] == body.parameters[0]

    def _parameter(self, key: Key) -> bool:
        return self.graph.instruction(key[0]).op == "parameter"


# ---------------------------------------------------------------- collectives


def _collective(graph: Graph, instruction: Instruction, layout: Layout) -> Collective:
    groups = groups_of(instruction.attributes, math.prod(layout.shape.values()))
    size = groups.shape[1]
    taken = sum(graph.bytes(key) for key in graph.operands(instruction))
    ring = (size - 1) / size
    whole, sent = {
        "all-gather": (instruction.bytes, instruction.bytes * ring),
        "all-reduce": (taken, 2 * taken * ring),
        "reduce-scatter": (taken, taken * ring),
        "all-to-all": (taken, taken * ring),
        "collective-permute": (taken, taken if size > 1 else 0),
    }[instruction.op]
    hosts = max(len(set(group // layout.per_host)) for group in groups[:64])
    return Collective(instruction.op, _axes_of(groups, layout), size, int(hosts), 1.0, float(whole), float(sent))


def groups_of(attributes: str, devices: int) -> np.ndarray:
    """Numbers of the devices that exchange with each other, i[groups, devices in one]; in each spelling XLA has."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        found = np.array([[int(n) for n in pair] for pair in re.findall(r"\{(\d+),(\d+)", "{" + pairs[1])])
        moved = found[found[:, 0] != found[:, 1]]
        return moved if len(moved) else np.arange(devices)[:, None]
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\))?\s*\{(.*?)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        ids = _iota(mesh[2], math.prod(axes.values())) if mesh[2] else np.arange(math.prod(axes.values()))
        along = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[3])
        return _along(ids.reshape(*axes.values()), [(list(axes).index(name), *part) for name, *part in along])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        shape = [int(n) for n in iota[1].split(",")]
        return _iota(iota[2], math.prod(shape)).reshape(shape)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if "replica_groups=" in attributes and "replica_groups={}" not in attributes:
        raise ValueError(f"groups of devices in a spelling that is not known: {attributes[:200]}")
    return np.arange(devices)[None]  # no groups given: all devices


def _iota(text: str, size: int) -> np.ndarray:
    """`[8,4]T(1,0)`: numbers from 0, in this shape, transposed."""
    shape = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    numbers = np.arange(size).reshape([int(n) for n in shape[1].split(",")])
    return (numbers.transpose([int(n) for n in shape[2].split(",")]) if shape[2] else numbers).reshape(-1)


def _along(ids: np.ndarray, axes: list[tuple[int, str, str]]) -> np.ndarray:
    """Groups that run along these axes; an axis may be cut in (before, size, after) and taken in part."""
    sizes, taken = [], []
    cuts = {axis: (int(before or 1), int(size or ids.shape[axis])) for axis, before, size in axes}
    for axis, size in enumerate(ids.shape):
        before, part = cuts.get(axis, (1, 1))
        taken.append(len(sizes) + 1)
        sizes += [before, part, size // (before * part)]
    split = ids.reshape(sizes)
    grouped = np.moveaxis(split, [taken[axis] for axis in cuts], range(-len(cuts), 0))
    return grouped.reshape(-1, math.prod(part for _, part in cuts.values()))


def _axes_of(groups: np.ndarray, layout: Layout) -> str:
    """Names of the mesh axes along which the devices of a group differ."""
    names, shape = list(layout.shape), list(layout.shape.values())
    places = np.array(np.unravel_index(groups[0], shape))
    differing = [name for name, place in zip(names, places) if len(set(place)) > 1]
    return "+".join(differing) or "none"


def _merged(collectives: list[Collective]) -> list[Collective]:
    """One for each kind, axes and span; those within one device are left out."""
    found: dict[tuple, Collective] = {}
    for c in collectives:
        if c.size == 1 or not c.count:
            continue
        key = (c.kind, c.axes, c.size, c.hosts)
        old = found.get(key, dataclasses.replace(c, count=0.0, bytes=0.0, wire=0.0))
        found[key] = dataclasses.replace(
            old, count=old.count + c.count, bytes=old.bytes + c.bytes, wire=old.wire + c.wire
        )
    return sorted(found.values(), key=lambda c: -c.wire)
