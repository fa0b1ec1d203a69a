"""Which layer of a teacher teaches which layer of a student, and students that start from chosen layers of it.

    Uniform()       student layer i of S  <-  teacher layer (i + 1) T / S - 1        the last of each of S equal parts
                                                                                    (Jiao et al. 2019, 1909.10351)
    LastLayers(k)   the last k of the student  <-  the last k of the teacher         k = 1: MiniLM, DistilBERT
    FirstLayers(k)  the first k  <-  the first k
    Explicit(...)   pairs (student, teacher), layers counted from 0

The same maps choose the layers that a student starts from; there every layer of the student needs a teacher's, and both
must be of one width and one kind.
"""

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from llmlab.nn.module import Params

Pairs = tuple[tuple[int, int], ...]
"""(student layer, teacher layer), counted from 0."""


@dataclass(frozen=True, kw_only=True)
class LayerMap(abc.ABC):
    """Layers of a student and the layers of a teacher that they learn from."""

    @abc.abstractmethod
    def pairs(self, student: int, teacher: int) -> Pairs:
        """For a student and a teacher of so many layers.

        Raises:
            ValueError: there is no such layer, or they cannot be shared out.
        """


@dataclass(frozen=True, kw_only=True)
class Uniform(LayerMap):
    """Every layer of the student learns from the last of its share of the teacher's layers."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        if teacher % student:
            raise ValueError(
                f"Uniform() cannot share {teacher} layers of the teacher out to {student} of the student: {student} "
                f"does not divide {teacher}; use LastLayers(), FirstLayers() or Explicit(pairs=(...))"
            )
        return tuple((i, (i + 1) * (teacher // student) - 1) for i in range(student))


@dataclass(frozen=True, kw_only=True)
class LastLayers(LayerMap):
    """The last layers of both."""

    count: int | None = None
    """How many; None for as many as the student has."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        count = _checked("LastLayers", self.count, student, teacher)
        return tuple((student - count + i, teacher - count + i) for i in range(count))


@dataclass(frozen=True, kw_only=True)
class FirstLayers(LayerMap):
    """The first layers of both."""

    count: int | None = None
    """How many; None for as many as the student has."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        return tuple((i, i) for i in range(_checked("FirstLayers", self.count, student, teacher)))


@dataclass(frozen=True, kw_only=True)
class Explicit(LayerMap):
    """Pairs that are written out."""

    of: tuple[tuple[int, int], ...]
    """(student layer, teacher layer), counted from 0."""

    def pairs(self, student: int, teacher: int) -> Pairs:
        for pair in self.of:
            for side, layer, count in zip(("student", "teacher"), pair, (student, teacher), strict=True):
                if not 0 <= layer < count:
                    raise ValueError(
                        f"the layer map names layer {layer} of the {side}, which has {count}: they are counted from 0 "
                        f"to {count - 1}"
                    )
        if not self.of:
            raise ValueError("the layer map is empty; give it pairs (student layer, teacher layer)")
        return self.of


def _checked(name: str, count: int | None, student: int, teacher: int) -> int:
    count = student if count is None else count
    if not 1 <= count <= min(student, teacher):
        raise ValueError(
            f"{name}(count={count}) is past the layers that there are: the student has {student}, the teacher {teacher}"
        )
    return count


def num_layers(model: Any, side: str = "") -> int:
    """Layers of a model config's stack; of one side of an encoder-decoder.

    Raises:
        ValueError: it has no such stack.
    """
    from llmlab.models.encoder_decoder import EncoderDecoder

    sides = ("encoder", "decoder") if isinstance(model, EncoderDecoder) else ("",)
    if side not in sides:
        have = " or ".join(repr(name) for name in sides)
        raise ValueError(f"side={side!r} of {type(model).__name__}: it has {have}")
    found = getattr(getattr(model, side) if side else model, "num_layers", None)
    if found is None:
        raise ValueError(f"{type(model).__name__} has no plain stack of layers that could be matched")
    return found


def student_weights(student: Params, teacher: Params, layer_map: LayerMap, replaceable: tuple[str, ...]) -> Params:
    """Parameters of a student that starts from layers of a teacher.

    Args:
        student: shapes of its parameters.
        teacher: the teacher's parameters.
        layer_map: which layer of the teacher each of the student's stacks takes for each of its layers.
        replaceable: parts, by their first name, that are left out where the teacher has none or another one.

    Returns:
        Everything, but for the parts that are left out and drawn by whoever asks.

    Raises:
        ValueError: a layer has no teacher's, or a parameter is of another shape; all offenders are listed.
    """
    problems: list[str] = []
    taken = {name: _part(tree, teacher.get(name), layer_map, name, problems) for name, tree in student.items()}
    wrong = {problem.partition(".")[0].partition(":")[0] for problem in problems}
    left_out = wrong & {*replaceable}
    problems = [text for text in problems if text.partition(".")[0].partition(":")[0] not in left_out]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"the student cannot start from these layers of the teacher; parameters differ:\n  {listed}\ngive both the "
            "same widths, or leave initialize out"
        )
    return {name: tree for name, tree in taken.items() if name not in left_out}


def _part(shapes: Any, teacher: Any, layer_map: LayerMap, path: str, problems: list[str]) -> Any:
    if isinstance(shapes, dict) and ("blocks" in shapes or "remainder" in shapes) and isinstance(teacher, dict):
        return _stack(shapes, teacher, layer_map, path, problems)
    if isinstance(shapes, dict):
        theirs = teacher if isinstance(teacher, dict) else {}
        return {
            name: _part(tree, theirs.get(name), layer_map, f"{path}.{name}", problems) for name, tree in shapes.items()
        }
    found = None if teacher is None or isinstance(teacher, dict) else tuple(teacher.shape)
    if found != tuple(shapes.shape):
        problems.append(f"{path}: {'absent' if found is None else found} there, {tuple(shapes.shape)} here")
    return teacher


def _stack(shapes: Any, teacher: Any, layer_map: LayerMap, path: str, problems: list[str]) -> Any:
    """A student's stack of a teacher's layers."""
    wanted, given = list(_layers(shapes)), list(_layers(teacher))
    of_student = dict(layer_map.pairs(len(wanted), len(given)))
    if missing := [i for i in range(len(wanted)) if i not in of_student]:
        raise ValueError(f"initialize gives layers {missing} of the student no layer of the teacher; map every layer")
    chosen = [
        _part(wanted[i], given[of_student[i]], layer_map, f"{path}.layer.{i}", problems) for i in range(len(wanted))
    ]
    blocks = sorted(shapes.get("blocks", {}), key=int)
    repeats = _repeats(shapes)

    def stacked(*leaves: Any) -> Any:
        return jnp.stack(leaves) if all(leaf is not None for leaf in leaves) else None

    result: dict[str, Any] = {}
    if blocks and not problems:
        result["blocks"] = {
            name: jax.tree.map(stacked, *[chosen[r * len(blocks) + i] for r in range(repeats)])
            for i, name in enumerate(blocks)
        }
    if "remainder" in shapes:
        result["remainder"] = {name: chosen[repeats * len(blocks) + int(name)] for name in shapes["remainder"]}
    return result


def _layers(stack: Any) -> Iterator[Any]:
    """Every layer's parameters (or their shapes), first to last: repeats of the pattern, then what is left over."""
    blocks = [stack.get("blocks", {})[name] for name in sorted(stack.get("blocks", {}), key=int)]
    for r in range(_repeats(stack)):
        for block in blocks:
            yield jax.tree.map(lambda x, r=r: _row(x, r), block)
    rest = stack.get("remainder", {})
    yield from (rest[name] for name in sorted(rest, key=int))


def _repeats(stack: Any) -> int:
    leaves = jax.tree.leaves(stack.get("blocks", {}))
    return leaves[0].shape[0] if leaves else 0


def _row(x: Any, r: int) -> Any:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x[r]
