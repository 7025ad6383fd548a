"""XLA's text of a program, read: computations, instructions, shapes, and how often each loop turns.

What is read is the program of one device, as the partitioner has left it: shapes are a device's share, collectives
stand where it put them, and dtypes are the program's own (later passes change those on a CPU).
"""

import dataclasses
import functools
import math
import re

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_LINE = re.compile(r"^\s*(ROOT\s+)?%?([\w.-]+) = ")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.-]+)\s*\(.*->.*\{\s*$")
_CALLED = re.compile(r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_LITERAL = ("constant", "parameter")  # what stands in their parentheses is no name
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """Dtype and dimensions of one array."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.elements * _BITS.get(self.dtype, 32) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str  # the opcode, such as dot
    arrays: tuple[Array, ...]  # its result: one array, or the leaves of a tuple
    operands: tuple[str, ...]  # names; of a constant or parameter its literal
    attributes: str  # the rest of the line

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def called(self) -> dict[str, str]:
        """Computations by role: body, condition, to_apply, ...; branches as branch0, branch1, ..."""
        found = dict(_CALLED.findall(self.attributes))
        if branches := _BRANCHES.search(self.attributes):
            names = [name.strip().lstrip("%") for name in branches[1].split(",")]
            found |= {f"branch{i}": name for i, name in enumerate(names)}
        return found

    def numbers(self, attribute: str) -> tuple[int, ...]:
        """The whole numbers of an attribute like `lhs_contracting_dims={1,2}` or `index=3`."""
        given = re.search(rf"\b{attribute}=(?:\{{([\d,\s]*)\}}|(\d+))", self.attributes)
        return tuple(int(n) for n in re.findall(r"\d+", given[1] or given[2] or "")) if given else ()


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in an order in which they can run."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        """Names of the parameters by number."""
        return {int(i.operands[0]): i.name for i in self.instructions.values() if i.op == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    aliases: dict[int, int]  # result's leaf -> number of the parameter whose memory it takes over

    @property
    def main(self) -> Computation:
        return self.computations[self.entry]


def parse(text: str) -> Module:
    """The module of an HLO text; raises ValueError where it is none."""
    computations: dict[str, Computation] = {}
    entry = name = root = ""
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("}"):
            computations[name] = Computation(name, instructions, root)
        elif (header := _HEADER.match(line)) and " = " not in line.split("->")[0]:
            name, root, instructions = header[2], "", {}
            entry = name if header[1] else entry
        elif match := _LINE.match(line):
            instruction = _instruction(match[2], line[match.end() :])
            for operand in instruction.operands if instruction.op not in _LITERAL else ():
                if "#" in operand and operand not in instructions:
                    instructions[operand] = _element(operand, instructions)
            instructions[match[2]] = instruction
            root = match[2] if match[1] else root
    if not entry:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    given = re.search(r"input_output_alias=\{(.*?)\}\s*(?:,\s*\w+=|$)", text.split("\n", 1)[0])
    pairs = re.findall(r"\{(\d*)\}:\s*\((\d+)", given[1]) if given else []
    return Module(computations, entry, {int(leaf or 0): int(number) for leaf, number in pairs})


def _instruction(name: str, rest: str) -> Instruction:
    kind, rest = _until_closed(rest) if rest.startswith("(") else rest.split(" ", 1)
    op, rest = rest.strip().split("(", 1)
    given, attributes = _until_closed("(" + rest)
    if op in _LITERAL:
        operands: tuple[str, ...] = (given[1:-1],)
    else:
        operands = tuple(part.split()[-1].lstrip("%") for part in _split(given[1:-1]))
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(kind)
    )
    return Instruction(name, op, arrays, operands, attributes)


def _element(name: str, instructions: dict[str, Instruction]) -> Instruction:
    """`tuple.3#1`, as newer texts write the element of a tuple where it is used: as if it had a line of its own."""
    whole, index = name.split("#")
    array = instructions[whole].arrays[int(index)]
    return Instruction(name, "get-tuple-element", (array,), (whole,), f", index={index}")


def _until_closed(text: str) -> tuple[str, str]:
    """The text up to the parenthesis that closes its first one, and what follows."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: position + 1], text[position + 1 :]
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")


def _split(text: str) -> list[str]:
    """Parts between the commas that stand outside of any bracket."""
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


# ---------------------------------------------------------------- loops


def trips(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a while loop turns: exactly, or at most where it may stop early; None where the text does not say.

    A loop counts up to a constant, from a number that is known when it starts; it goes on while that, and perhaps
    something else, is true.
    """
    condition = module.computations[loop.called["condition"]]
    bounds = []
    for instruction in _conjuncts(condition, condition.root):
        if instruction.op != "compare" or "direction=LT" not in instruction.attributes:
            continue
        counter, limit = (condition.instructions[name] for name in instruction.operands)
        end, index = _scalar(condition, limit.name), counter.numbers("index")
        if counter.op == "get-tuple-element" and end is not None and index:
            start = _loop_start(computation, loop, index[0])
            if start is not None:
                bounds.append(max(int(end - start), 0))
    return min(bounds, default=None)


def _conjuncts(computation: Computation, name: str) -> list[Instruction]:
    """What must all be true for the value of this name to be so."""
    instruction = computation.instructions[name]
    if instruction.op == "and":
        return [found for operand in instruction.operands for found in _conjuncts(computation, operand)]
    return [instruction]


def _loop_start(computation: Computation, loop: Instruction, index: int) -> float | None:
    start = computation.instructions[loop.operands[0]]
    return _scalar(computation, start.operands[index]) if start.op == "tuple" else None


def _scalar(computation: Computation, name: str) -> float | None:
    """The value of a scalar that is made of constants; None where it is not."""
    instruction = computation.instructions[name]
    if instruction.op == "constant":
        try:
            return float(instruction.operands[0])
        except ValueError:
            return None
    if instruction.op in ("copy", "convert", "bitcast", "reshape", "broadcast"):
        return _scalar(computation, instruction.operands[0])
    if instruction.op in ("add", "subtract"):
        left, right = (_scalar(computation, operand) for operand in instruction.operands)
        return None if left is None or right is None else left + right * (1 if instruction.op == "add" else -1)
    return None
