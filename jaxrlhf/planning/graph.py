"""What of a computation becomes a kernel that writes to memory, and what that kernel reads.

XLA's compiler for a card fuses elementwise work into what uses it. The rules here say where it cannot:

- products, reductions, scans, sorts, scatters, loops and collectives write their results;
- what a product, loop or collective takes must have been written (transposes and casts of something written may stay);
- a value with several users is written where reading it is cheaper than reading again what it is made of.

Everything else is computed again by each of its users. That is what XLA does on the whole, not in each case.
"""

import dataclasses
import functools

from jaxrlhf.planning.hlo import Computation, Instruction, Module

Key = tuple[str, int]  # an instruction's name and the number of the leaf of its result

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
LOOPS = ("while", "conditional", "call")
_BARRIERS = ("opt-barrier", "optimization-barrier")
_VIEWS = ("bitcast", "reshape", "copy", *_BARRIERS)
_WRITES = (
    "dot", "convolution", "reduce", "reduce-window", "sort", "scatter", "dynamic-update-slice", "custom-call", "fft",
    "cholesky", "triangular-solve", "rng-bit-generator", "topk", *COLLECTIVES, *LOOPS,
)  # fmt: skip
_WANTS_WRITTEN = ("dot", "convolution", "sort", "reduce-window", "custom-call", "topk", *COLLECTIVES, *LOOPS)
_KEPT_IN_PRODUCT = ("transpose", "convert", "slice", "dynamic-slice", "broadcast")
_SLICES = ("slice", "dynamic-slice", "gather")
_SMALL = 1 << 16  # bytes; whether such values are written or not does not matter


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, or one loop: what it reads of what was written before, and what it writes."""

    instruction: Instruction
    reads: dict[Key, int]  # bytes read of each
    writes: dict[Key, int]  # bytes of each result, as it lies in memory
    written: int  # bytes that are written; fewer than the results have where one is updated in place
    in_place: dict[Key, Key]  # results that may take the memory of what they are made from
    after: frozenset[Key]  # what must be there first without being read: behind an optimization barrier
    order: int  # place in the text


class Graph:
    """The kernels of one computation."""

    def __init__(self, module: Module, computation: Computation):
        self.module, self.computation = module, computation
        self.order = {name: i for i, name in enumerate(computation.instructions)}
        self.users: dict[Key, list[Instruction]] = {}
        self.live = self._live()
        self.outputs = self.leaves(computation.root)
        self._written: set[Key] = set()
        self._decide()
        self.kernels = [self._kernel(name) for name in self._kernel_names()]

    # ------------------------------------------------------------ values

    def instruction(self, name: str) -> Instruction:
        return self.computation.instructions[name]

    def leaves(self, name: str) -> list[Key]:
        """The leaves of a value, each as what it is another name for."""
        return [self.origin((name, i)) for i in range(len(self.instruction(name).arrays))]

    @functools.cache  # noqa: B019  (a graph lives as long as its analysis)
    def origin(self, key: Key) -> Key:
        """The value that this one is another name for: views, tuples and their elements are seen through."""
        instruction, leaf = self.instruction(key[0]), key[1]
        if instruction.op == "get-tuple-element":
            return self.origin((instruction.operands[0], instruction.numbers("index")[0]))
        if instruction.op == "tuple":
            return self.origin((instruction.operands[leaf], 0))
        if instruction.op in _VIEWS or self._marker(instruction):
            single = len(instruction.operands) == 1
            return self.origin((instruction.operands[0], leaf) if single else (instruction.operands[leaf], 0))
        return key

    @staticmethod
    def _marker(instruction: Instruction) -> bool:
        """Whether it only says something about its operand."""
        return instruction.op == "custom-call" and any(
            f'custom_call_target="{target}"' in instruction.attributes
            for target in ("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")
        )

    def bytes(self, key: Key) -> int:
        return self.instruction(key[0]).arrays[key[1]].bytes

    def operands(self, instruction: Instruction) -> list[Key]:
        """All leaves that it takes."""
        return [key for name in instruction.operands for key in self.leaves(name)]

    def _live(self) -> list[str]:
        """Names of what the result depends on, in the order of the text; notes users on the way."""
        seen, stack = set(), [self.computation.root]
        while stack:
            name = stack.pop()
            if name in seen:
                continue
            seen.add(name)
            instruction = self.instruction(name)
            if instruction.op in ("parameter", "constant"):
                continue
            stack += instruction.operands
            if instruction.op not in ("tuple", "get-tuple-element", *_VIEWS) and not self._marker(instruction):
                for key in dict.fromkeys(self.operands(instruction)):
                    self.users.setdefault(key, []).append(instruction)
        return sorted(seen, key=self.order.__getitem__)

    # ------------------------------------------------------------ what is written

    def written(self, key: Key) -> bool:
        """Whether the value lies in memory of its own."""
        op = self.instruction(key[0]).op
        return op == "parameter" or op in _WRITES or key in self._written

    def _decide(self) -> None:
        results = set(self.outputs)
        for name in self.live:
            key = (name, 0)
            if self.origin(key) != key or self.written(key) or self.instruction(name).op in ("tuple", "constant"):
                continue
            if key in results or any(self._must_be_written(key, user) for user in self.users.get(key, ())):
                self._written.add(key)
            elif len(self.users.get(key, ())) > 1 and self.bytes(key) > _SMALL:
                self.sources.cache_clear()
                reduced = any(user.op == "reduce" for user in self.users[key])
                if sum(self.sources(key).values()) >= (1.0 if reduced else 1.1) * self.bytes(key):
                    self._written.add(key)
        self.sources.cache_clear()

    def _must_be_written(self, key: Key, user: Instruction) -> bool:
        if user.op not in _WANTS_WRITTEN or self.bytes(key) == 0:
            return False
        return not (user.op in ("dot", "convolution") and self._kept(key))

    def _kept(self, key: Key) -> bool:
        """Whether a product can read it as a transpose or cast of something that is written."""
        if self.written(key):
            return True
        instruction = self.instruction(key[0])
        return instruction.op in _KEPT_IN_PRODUCT and self._kept(self.origin((instruction.operands[0], 0)))

    @functools.cache  # noqa: B019
    def sources(self, key: Key) -> dict[Key, int]:
        """What is read from memory to have the value: bytes by written value."""
        if self.written(key):
            return {key: self.bytes(key)}
        instruction = self.instruction(key[0])
        return {} if instruction.op in ("constant", "iota") else self._reads(instruction)

    # ------------------------------------------------------------ kernels

    def _kernel_names(self) -> list[str]:
        marked = {name for name, _ in self._written}
        return [name for name in self.live if name in marked or (self.instruction(name).op in _WRITES
                and not self._marker(self.instruction(name)))]

    def _kernel(self, name: str) -> Kernel:
        instruction = self.instruction(name)
        keys = [(name, leaf) for leaf in range(len(instruction.arrays))]
        writes = {key: self.bytes(key) for key in keys}
        if instruction.op not in _WRITES:  # fused work that is written
            reads = self._reads(instruction)
            same = [s for s in reads if self.instruction(s[0]).op == "parameter" and self.bytes(s) == writes[keys[0]]]
            in_place = dict(zip(keys, same))
            return Kernel(instruction, reads, writes, instruction.bytes, in_place, self._after(name), self.order[name])
        reads, in_place, written = {}, {}, instruction.bytes
        if instruction.op in ("dynamic-update-slice", "scatter"):
            target, *rest = (self.origin((operand, 0)) for operand in instruction.operands)
            for operand in rest:
                reads |= self.sources(operand)
            update = rest[0] if instruction.op == "dynamic-update-slice" else rest[-1]
            if self.written(target):
                in_place, written = {keys[0]: target}, self.bytes(update)
            else:
                reads |= self.sources(target)
        elif instruction.op == "while":
            in_place = dict(zip(keys, self.operands(instruction)))
            reads = {operand: 0 for operand in self.operands(instruction)}
            written = 0
        else:
            reads = self._reads(instruction)
            if instruction.op in ("conditional", "call"):
                reads, written = dict.fromkeys(reads, 0), 0
        return Kernel(instruction, reads, writes, written, in_place, self._after(name), self.order[name])

    def _after(self, name: str) -> frozenset[Key]:
        """What the barriers between the kernel and its sources hold it back for.

        `jax.checkpoint` ties what a layer computes again to the gradient that arrives there: without this, all layers
        could be computed again at once.
        """
        barriers = {b for operand in self.instruction(name).operands for b in self._barriers(operand)}
        return frozenset(source for b in barriers for leaf in self.leaves(b) for source in self.sources(leaf))

    @functools.cache  # noqa: B019
    def _barriers(self, name: str) -> frozenset[str]:
        """The nearest barriers that the value of this name lies behind."""
        instruction = self.instruction(name)
        if instruction.op in _BARRIERS:
            return frozenset([name])
        through = instruction.op in ("tuple", "get-tuple-element", *_VIEWS) or self._marker(instruction)
        if instruction.op in ("parameter", "constant") or (not through and self.written((name, 0))):
            return frozenset()
        return frozenset(b for operand in instruction.operands for b in self._barriers(operand))

    def _reads(self, instruction: Instruction) -> dict[Key, int]:
        """What an instruction has read from memory for its operands: bytes by written value."""
        found: dict[Key, int] = {}
        for operand in self.operands(instruction):
            for source, count in self.sources(operand).items():
                if instruction.op in _SLICES:
                    count = min(count, instruction.bytes)
                found[source] = max(found.get(source, 0), count)
        return found
