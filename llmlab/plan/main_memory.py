"""Bytes between a chip's main memory and its compute units, of one instruction of a compiled program.

What an instruction outside of fusions reads and writes moves, a fusion's inside being free. Arrays that the compiler
keeps in fast memory do not count. Slices count as what is read of them, and an array that is updated in place counts as
the update, also where that happens within a fusion or in fusions within it: a layer's weights are a slice of those of
all layers, and the loop over layers would else seem to read all of them in every turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmlab.plan.hlo import Computation, Instruction, Shape

# Nothing is read or written: names for what there is already, or work that its parts do.
_FREE = frozenset(
    [
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "while",
        "conditional",
        "call",
        "after-all",
        "opt-barrier",
        "partition-id",
        "replica-id",
        "add-dependency",
        "async-update",
        "async-done",
        "copy-done",
        "all-gather-done",
        "all-reduce-done",
        "collective-permute-done",
        "custom-call-done",
        "domain",
        "iota",
    ]
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# Within a fusion these are the array itself, seen in another way: who slices what they give has sliced the array.
_VIEWS = frozenset({"bitcast", "copy", "convert", "reshape", "transpose"})
Computations = Mapping[str, Computation]


def traffic(instruction: Instruction, inside: Computation, computations: Computations) -> int:
    """Bytes that an instruction outside of fusions reads from main memory and writes to it."""
    opcode = instruction.opcode
    if opcode in _FREE:
        return 0
    operands = [inside.instructions[name] for name in instruction.operands if name in inside.instructions]
    if opcode == "fusion":
        return _fusion_traffic(instruction, operands, computations)
    if opcode == "dynamic-update-slice":
        return 2 * _slow(operands[1].shapes) if not instruction.shapes[0].fast else 0
    if opcode in _SLICES:
        return _slow(instruction.shapes) + (_sizes(instruction.shapes) if not operands[0].shapes[0].fast else 0)
    if opcode in ("copy-start", "all-gather-start", "collective-permute-start"):  # (source, result, ...), either order
        return _slow(instruction.shapes[:2])
    if opcode == "custom-call" and "AllocateBuffer" in instruction.attributes:
        return 0
    return _slow(instruction.shapes) + sum(_slow(operand.shapes) for operand in operands)


def _fusion_traffic(fusion: Instruction, operands: Sequence[Instruction], computations: Computations) -> int:
    body = computations[fusion.called["calls"]]
    names = body.root.operands if body.root.opcode == "tuple" else (body.root.name,)
    results = [_source(_Place(name, body), computations) for name in names]
    updates = [place for place in results if place.instruction.opcode == "dynamic-update-slice"]
    updated = {_source(place.operand(0), computations).name for place in updates}
    total = 0
    for number, operand in enumerate(operands):
        parameter = body.parameters.get(number)
        if parameter is None or parameter.name in updated:
            continue
        shapes = operand.shapes
        if len(shapes) == 1 and not shapes[0].fast and shapes[0].size:
            read = min(_elements_read(parameter.name, body, computations), shapes[0].size)
            total += shapes[0].bytes * read // shapes[0].size
        else:
            total += _slow(shapes)
    for place, shape in zip(results, fusion.shapes, strict=False):
        if shape.fast:
            continue
        updating = place.instruction.opcode == "dynamic-update-slice"
        total += _sizes(place.operand(1).instruction.shapes) if updating else shape.bytes
    return total + _slow(fusion.shapes[len(results) :])


@dataclass(frozen=True)
class _Place:
    """An instruction within a fusion, or within a fusion in it."""

    name: str
    body: Computation
    outer: "_Place | None" = None
    """The fusion whose body this is, where that is part of another."""

    @property
    def instruction(self) -> Instruction:
        return self.body.instructions[self.name]

    def operand(self, number: int) -> "_Place":
        return _Place(self.instruction.operands[number], self.body, self.outer)


def _source(place: _Place, computations: Computations) -> _Place:
    """What an array is made by, views and the borders of fusions within the fusion seen through."""
    while True:
        instruction = place.instruction
        if instruction.opcode in _VIEWS:
            place = place.operand(0)
        elif instruction.opcode == "fusion" and len(instruction.shapes) == 1:
            inner = computations[instruction.called["calls"]]
            place = _Place(inner.root.name, inner, outer=place)
        elif instruction.opcode == "parameter" and place.outer is not None:
            place = place.outer.operand(int(instruction.arguments))
        else:
            return place


def _elements_read(name: str, body: Computation, computations: Computations) -> int:
    """How many elements of an array a body reads, an element counted by each slice that has it."""
    if name == body.root.name:
        return body.instructions[name].shapes[0].size
    total = 0
    for user in body.users.get(name, []):
        if user.opcode in _SLICES and user.operands[0] == name:
            total += sum(shape.size for shape in user.shapes)
        elif user.opcode in _VIEWS:
            total += _elements_read(user.name, body, computations)
        elif user.opcode == "fusion":
            inner = computations[user.called["calls"]]
            for number, operand in enumerate(user.operands):
                if operand == name and number in inner.parameters:
                    total += _read_by(user, inner.parameters[number].name, body, computations)
        else:
            return body.instructions[name].shapes[0].size
    return total


def _read_by(fusion: Instruction, parameter: str, body: Computation, computations: Computations) -> int:
    """How many elements of one of its operands a fusion within a fusion reads."""
    inner = computations[fusion.called["calls"]]
    root = inner.root
    while root.opcode in _VIEWS:
        root = inner.instructions[root.operands[0]]
    if root.name == parameter:  # the fusion is a view itself
        return _elements_read(fusion.name, body, computations)
    return _elements_read(parameter, inner, computations)


def _sizes(shapes: Sequence[Shape]) -> int:
    return sum(shape.bytes for shape in shapes)


def _slow(shapes: Sequence[Shape]) -> int:
    """Bytes of the arrays that live in main memory."""
    return sum(shape.bytes for shape in shapes if not shape.fast)
