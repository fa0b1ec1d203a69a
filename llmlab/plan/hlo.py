"""The text of a compiled program (optimized HLO), read into computations and instructions, with how often each runs.

The compiler's own `cost_analysis()` counts the body of a loop once, however often it runs, and a collective inside a
loop is one line of the text. What a step really does is the text times the trip counts:

    entry           once
    while           body x trip count; loops inside loops multiply
    fusion, call    what they call, as often as they run
    conditional     every branch, an upper bound
    async-start     what it calls, once for the whole of start, update and done

A loop's trip count is what the compiler recorded (`known_trip_count`), else what its condition says: compiled for TPU,
`counter < n` with a constant n is all that is left.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

_ITEM_BITS = {
    "pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "f4e2m1fn": 4, "s8": 8, "u8": 8,
    "s16": 16, "u16": 16, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
    "c64": 64, "c128": 128,
}  # fmt: skip

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# A kernel's metadata may break a line and begin the next with a brace; a computation of another thread says which.
_END = re.compile(r"^\}(, execution_thread=\S+)?\s*$")
_CALLED = re.compile(r"\b(calls|body|condition|to_apply)=%([\w.\-]+)")
UNEVEN = "sum_of_further_rounds"
"""Function whose loop runs only where experts are used unevenly (llmlab.nn.moe.exchange). Here they are used evenly."""
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Shape:
    """An array's type."""

    dtype: str
    """As HLO writes it: "bf16", "s32", "pred"."""
    dims: tuple[int, ...]
    """Its dimensions."""
    fast: bool = False
    """Whether it lives on the chip (a memory space of its own in the layout) and not in the main memory."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes, without padding to tiles."""
        bits = _ITEM_BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32)
        return -(-self.size * bits // 8)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; several where it is a tuple."""
    arguments: str
    """What stands between the parentheses: operands, or the value of a constant."""
    attributes: str
    """What follows."""
    is_root: bool = False

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions whose results it takes."""
        return tuple(_NAME.findall(self.arguments)) if self.opcode not in ("constant", "parameter") else ()

    @cached_property
    def called(self) -> dict[str, str]:
        """The computations it names: calls, body, condition, to_apply."""
        return dict(_CALLED.findall(self.attributes))

    @cached_property
    def branches(self) -> tuple[str, ...]:
        """The computations of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if listed:
            return tuple(_NAME.findall(listed[1]))
        return tuple(re.findall(r"(?:true|false)_computation=%([\w.\-]+)", self.attributes))

    @property
    def source(self) -> str:
        """Where in the program it comes from, as jax names it: "jit(step)/while/body/dot_general"; "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """A named list of instructions."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Parameter number to instruction."""
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name of an instruction to those that take its result."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Types of its operands, in order, tuples flattened."""
        found = [self.instructions[name].shapes for name in instruction.operands if name in self.instructions]
        return [shape for shapes in found for shape in shapes]


@dataclass(frozen=True)
class Run:
    """An instruction with how often one execution of the program runs it."""

    instruction: Instruction
    computation: Computation
    times: int
    fusion: Instruction | None
    """The fusion that it is part of, None outside."""
    caller: str
    """The computation that holds that fusion; without one, its own."""


@dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str
    unknown_loops: list[str] = field(default_factory=list)
    """Sources of loops whose trip count does not show, which count once; filled by `runs`."""

    @classmethod
    def parse(cls, text: str | None) -> "Module":
        """The module that `compiled.as_text()` printed.

        Raises:
            ValueError: it is none; None is what jax gives where the compiler's version is not the one it knows.
        """
        computations: dict[str, Computation] = {}
        entry, current = "", None
        for line in (text or "").splitlines():
            if current is None:
                if header := _HEADER.match(line):
                    current = computations[header[2]] = Computation(header[2])
                    entry = header[2] if header[1] else entry
            elif _END.match(line):
                current = None
            elif instruction := parse_instruction(line):
                current.instructions[instruction.name] = instruction
        if not entry:
            raise ValueError("this text has no ENTRY computation: it is no HLO module")
        return cls(computations, entry)

    def runs(self) -> Iterator[Run]:
        """Every instruction that runs, also those inside fusions, with how often it does."""
        self.unknown_loops.clear()
        yield from self._walk(self.entry, 1, None, self.entry)

    def _walk(self, name: str, times: int, fusion: Instruction | None, caller: str) -> Iterator[Run]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Run(instruction, computation, times, fusion, caller if fusion else name)
            called = instruction.called
            if instruction.opcode == "while":
                trips = self.trip_count(instruction, computation)
                if trips is None and UNEVEN in instruction.source:
                    continue
                if trips is None:
                    self.unknown_loops.append(instruction.source or instruction.name)
                yield from self._walk(called["body"], times * (1 if trips is None else trips), fusion, caller)
            elif instruction.opcode == "fusion":
                inside = fusion or instruction
                yield from self._walk(called["calls"], times, inside, caller if fusion else name)
            elif instruction.opcode in ("async-start", "call"):
                target = called.get("calls") or called.get("to_apply")
                if target is not None:
                    yield from self._walk(target, times, fusion, caller)
            for branch in instruction.branches:
                yield from self._walk(branch, times, fusion, caller)

    def trip_count(self, loop: Instruction, computation: Computation) -> int | None:
        """How often a while loop runs, or None where it does not show."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called["condition"]]
        start = self._tuple_of(loop, computation)
        compare, inside = condition.root, condition
        bind: dict[int, str] = {}
        if compare.opcode == "fusion":  # the comparison of a fusion, whose parameters are the condition's values
            bind = dict(enumerate(compare.operands))
            inside = self.computations[compare.called["calls"]]
            compare = inside.root
        if compare.opcode != "compare":
            return None
        sides = []
        for operand in compare.operands:
            instruction = inside.instructions[operand]
            if instruction.opcode == "parameter" and bind:
                instruction = condition.instructions[bind[int(instruction.arguments)]]
            sides.append(instruction)
        direction = re.search(r"direction=(\w+)", compare.attributes)
        return self._trips(sides[0], sides[1], direction[1] if direction else "", start, loop, computation)

    def _trips(
        self,
        left: Instruction,
        right: Instruction,
        direction: str,
        start: tuple[str, ...],
        loop: Instruction,
        computation: Computation,
    ) -> int | None:
        """Trips of `left direction right` where one side is the counter, which goes up by a constant."""
        if direction in ("GT", "GE"):
            left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
        index, limit = _element(left), self._value(right, start, computation)
        if index is None or limit is None or direction not in ("LT", "LE", "NE"):
            return None
        first = self._constant(start[index], computation) if index < len(start) else 0
        step = self._step(self.computations[loop.called["body"]], index)
        if first is None or step is None or step < 1:
            return None
        return max(0, -(-(limit + (direction == "LE") - first) // step))

    def _value(self, side: Instruction, start: tuple[str, ...], computation: Computation) -> int | None:
        """A constant, or an element of the loop's tuple that begins as one (and is taken not to change)."""
        if side.opcode == "constant":
            return _integer(side.arguments)
        index = _element(side)
        return self._constant(start[index], computation) if index is not None and index < len(start) else None

    def _tuple_of(self, loop: Instruction, computation: Computation) -> tuple[str, ...]:
        """Names of the elements of the tuple that a loop begins with."""
        first = computation.instructions[loop.operands[0]]
        while first.opcode in ("copy", "bitcast", "opt-barrier") and first.operands:
            first = computation.instructions[first.operands[0]]
        return first.operands if first.opcode == "tuple" else ()

    def _constant(self, name: str, computation: Computation) -> int | None:
        instruction = computation.instructions.get(name)
        while instruction is not None and instruction.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
            instruction = computation.instructions.get(instruction.operands[0])
        return _integer(instruction.arguments) if instruction is not None and instruction.opcode == "constant" else None

    def _step(self, body: Computation, index: int) -> int | None:
        """What the counter goes up by in a trip; 1 where the addition does not show."""
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return 1
        after = body.instructions.get(body.root.operands[index])
        while after is not None and after.opcode in ("copy", "bitcast"):
            after = body.instructions.get(after.operands[0])
        if after is None or after.opcode != "add":
            return 1
        steps = [self._constant(name, body) for name in after.operands]
        return next((step for step in steps if step is not None), 1)


def parse_instruction(line: str) -> Instruction | None:
    """The instruction on a line of a computation, or None where there is none."""
    line = re.sub(r"/\*.*?\*/", "", line.strip())
    is_root = line.startswith("ROOT ")
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    return Instruction(
        name=name.lstrip("%"),
        opcode=rest[:opening],
        shapes=shapes_of(kind),
        arguments=rest[opening + 1 : closing],
        attributes=rest[closing + 1 :].lstrip(", "),
        is_root=is_root,
    )


def shapes_of(kind: str) -> tuple[Shape, ...]:
    """The arrays of a type, tuples flattened."""
    return tuple(
        Shape(dtype, tuple(int(size.lstrip("<=")) for size in dims.split(",") if size), "S(" in layout)
        for dtype, dims, layout in _SHAPE.findall(kind)
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.finditer(r"[()]", text[opening:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return opening + match.start()
    raise ValueError(f"a parenthesis is not closed in {text[:200]!r}")


def _element(instruction: Instruction) -> int | None:
    """Which element of a tuple it takes, or None where it does something else."""
    found = re.search(r"index=(\d+)", instruction.attributes)
    return int(found[1]) if instruction.opcode == "get-tuple-element" and found else None


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text.strip()) else None
