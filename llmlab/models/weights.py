"""The two-way checkpoint weight table: which tensor of a Hugging Face file is which parameter of llmlab.

A family declares a table of rows

    Row("transformer.h.{layer}.mlp.c_fc.weight", "stack.{layer}.ffn.up.kernel", Conv1D())

and the same table loads and saves. `{layer}` counts layers from first to last; in llmlab layer n of a stack is slice
n // period of the array at `stack.blocks.<n % period>`, or an array of its own at `stack.remainder.<i>` when the
depth is no multiple of the pattern (see nn/stack.py). A row whose parameters the model does not have (a bias it goes
without, a tied head) does not apply, so one table serves all variants of a family.

Loading streams: tensors are read one at a time into the array of the parameter they belong to, so the peak is the
model plus its largest parameter. What does not fit, whatever it is, is found from names, shapes and types alone,
before anything is allocated, and reported in one error.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llmlab.models.transforms import Identity, Linear, One, Shape, Transform, Vector
from llmlab.nn.module import Params

FLOATS = ("F32", "F16", "BF16")
"""Number types that parameters are read from; each converts to float32 without loss."""


@dataclass(frozen=True)
class Row:
    """One line of a table. Several names or paths go with a transform that splits or joins tensors."""

    tensor: str | tuple[str, ...]
    """Name, or names, in the checkpoint; {layer} stands for the layer's number, {repeat} for that of its repeat of the
    pattern."""
    path: str | tuple[str, ...]
    """Dotted path, or paths, of the parameter in llmlab; `stack.{layer}` stands for the layer's place in the stack."""
    transform: Transform = Identity()
    """How one becomes the other."""
    requires: str | None = None
    """Path of a parameter beside it without which the row does not apply (T5's name of `up` beside a gate)."""
    excludes: str | None = None
    """Path of a parameter beside which the row does not apply."""


def linear(tensor: str, path: str, kernel: One = Linear(), bias: One = Vector()) -> tuple[Row, Row]:  # noqa: B008  frozen
    """Weight and bias of a linear layer; a layer without a bias leaves the second row unused."""
    return Row(f"{tensor}.weight", f"{path}.kernel", kernel), Row(f"{tensor}.bias", f"{path}.bias", bias)


def norm(tensor: str, path: str) -> tuple[Row, Row]:
    """Gain and shift of a norm; one without a shift leaves the second row unused."""
    return Row(f"{tensor}.weight", f"{path}.scale"), Row(f"{tensor}.bias", f"{path}.bias")


def part(rows: Sequence[Row], path: str, *, old: str = "", new: str = "") -> tuple[Row, ...]:
    """The rows of a model that is a part of another one: tensors begin with `new` instead of `old`, and parameters lie
    under `path`."""

    def each(names: str | tuple[str, ...], move: Callable[[str], str]) -> str | tuple[str, ...]:
        return move(names) if isinstance(names, str) else tuple(move(name) for name in names)

    def moved(row: Row) -> Row:
        tensor = each(row.tensor, lambda name: new + name.removeprefix(old))
        return Row(tensor, each(row.path, lambda name: f"{path}.{name}"), row.transform)

    return tuple(moved(row) for row in rows)


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """All rows of a family, and what else its checkpoints may hold."""

    rows: tuple[Row, ...]
    """Every parameter, in the order in which they are written."""
    prefix: str = ""
    """Beginning of names that checkpoints of the model without its head leave out."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Tensor that, in a model that ties it, is a copy of another: it may be absent, and must be equal if present."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Beginnings of names in older checkpoints, and what stands there now."""
    zeros: tuple[str, ...] = ()
    """Tensors that may be absent, and are zero then: buffers that older checkpoints leave out."""
    ignored: tuple[str, ...] = ()
    """Names of what checkpoints hold and nothing needs: masks, rotary frequencies, heads that the config names not."""
    unread: Mapping[str, str] = field(default_factory=dict)
    """Tensor that transformers holds and never reads, in some variants of the family -> tensor that is written in its
    place; it is not read here either."""
    blank: Mapping[str, str] = field(default_factory=dict)
    """Vector that transformers holds and never reads -> tensor with as many rows. Written as zeros, not read."""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Endings of names in older checkpoints -> those that the rows have."""
    head: str | None = None
    """Path of the head. A model without one is written without the prefix; None: every model is written with it."""


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header tells of a tensor."""

    shape: Shape
    dtype: str
    """As safetensors spells it: F32, BF16..."""


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors, their headers known before they are read."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Header of every tensor."""
        ...

    def read(self, name: str) -> np.ndarray:
        """The tensor itself."""
        ...


@dataclass(frozen=True)
class Slot:
    """Where a row's leaf is stored: an array, and for a stacked one which slice."""

    path: str
    index: int | None
    shape: Shape


@dataclass(frozen=True)
class Link:
    """A row bound to one layer of one model."""

    names: tuple[str, ...]
    slots: tuple[Slot, ...]
    transform: Transform

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Shapes of the leaves."""
        return tuple(slot.shape for slot in self.slots)

    def tensors(self) -> dict[str, Shape]:
        """Names and shapes in the checkpoint."""
        return dict(zip(self.names, self.transform.tensor_shapes(self.shapes), strict=True))


def bind(table: WeightTable, params: Params) -> list[Link]:
    """The rows of the table for this model, layer by layer.

    Args:
        table: the family's table.
        params: the model's parameters, or their shapes.

    Raises:
        ValueError: parameters that no row, or more than one, describes.
    """
    leaves = flatten(params)
    links: list[Link] = []
    for layered, group in groupby(table.rows, key=lambda row: "{layer}" in _tuple(row.path)[0]):
        rows = list(group)
        depth = max((_num_layers(params, row) for row in rows), default=0) if layered else 1
        for layer in range(depth):
            links += [link for row in rows if (link := _bind_row(row, layer, params, leaves)) is not None]
    _check_coverage(links, leaves)
    return links


def load(table: WeightTable, params: Params, source: TensorSource, *, where: str) -> Iterator[tuple[str, np.ndarray]]:
    """Parameters from a checkpoint, one at a time: pairs of dotted path and float32 array.

    Args:
        table: the family's table.
        params: the shapes of the model's parameters.
        source: the checkpoint.
        where: the checkpoint's name in messages.

    Raises:
        ValueError: tensors that are missing, unexpected, of a wrong shape or type, or tied and different: all listed.
    """
    links = bind(table, params)
    sources = _resolve(table, links, source, where)
    return _stream(links, sources, source, flatten(params))


def dump(table: WeightTable, params: Params) -> Iterator[tuple[str, np.ndarray]]:
    """Checkpoint tensors of these parameters (or of their gradients), layer by layer: pairs of name and float32."""
    leaves = flatten(params)
    links = bind(table, params)
    written = _written(table, links, params)
    for link in links:
        parts = tuple(_slice(leaves[slot.path], slot.index) for slot in link.slots)
        for name, tensor in zip(link.names, link.transform.to_tensors(parts), strict=True):
            array = np.asarray(tensor, np.float32, order="C")  # ascontiguousarray makes a vector of a scalar
            yield from ((spelled, array) for spelled in written[name])
    yield from ((name, np.zeros(shape, np.float32)) for name, shape in _blank(table, links).items())


def tensor_shapes(table: WeightTable, params: Params) -> dict[str, Shape]:
    """Names and shapes of what `dump` yields, in its order."""
    links = bind(table, params)
    written = _written(table, links, params)
    shapes = {spelled: shape for link in links for name, shape in link.tensors().items() for spelled in written[name]}
    return shapes | _blank(table, links)


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by dotted path."""
    leaves: dict[str, Any] = {}
    for key, value in params.items():
        leaves.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """Nested dict from dotted paths; the inverse of `flatten`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _node(params: Params, path: str) -> Params:
    for key in path.split("."):
        params = params.get(key, {})
    return params


def _stack(params: Params, path: str) -> tuple[int, int, int]:
    """Blocks in the pattern, their repeats and the layers beyond of the stack in front of {layer}."""
    node = _node(params, path.partition(".{layer}")[0])
    blocks, remainder = node.get("blocks", {}), node.get("remainder", {})
    stacked = flatten(blocks)
    return len(blocks), next(iter(stacked.values())).shape[0] if stacked else 0, len(remainder)


def _num_layers(params: Params, row: Row) -> int:
    period, repeats, rest = _stack(params, _tuple(row.path)[0])
    return period * repeats + rest


def _locate(path: str, layer: int, params: Params) -> tuple[str, int | None]:
    """Path of the array that holds this leaf of this layer, and the slice of it."""
    if "{layer}" not in path:
        return path, None
    period, repeats, _ = _stack(params, path)
    if layer < period * repeats:
        return path.replace("{layer}", f"blocks.{layer % period}"), layer // period
    return path.replace("{layer}", f"remainder.{layer - period * repeats}"), None


def _bind_row(row: Row, layer: int, params: Params, leaves: Mapping[str, Any]) -> Link | None:
    for other, wanted in ((row.requires, True), (row.excludes, False)):
        if other is not None and (_locate(other, layer, params)[0] in leaves) is not wanted:
            return None
    slots: list[Slot] = []
    absent: list[str] = []
    for path in _tuple(row.path):
        location, index = _locate(path, layer, params)
        if location not in leaves:
            absent.append(location)
            continue
        shape = tuple(leaves[location].shape)
        slots.append(Slot(location, index, shape if index is None else shape[1:]))
    if not slots:
        return None
    if absent:
        raise ValueError(f"the model has {slots[0].path} but not {', '.join(absent)}; {row.tensor} needs all of them")
    patterns = tuple(name.replace("{layer}", str(layer)) for name in _tuple(row.tensor))
    if any("{repeat}" in name for name in patterns):
        period = _stack(params, _tuple(row.path)[0])[0]
        patterns = tuple(name.replace("{repeat}", str(layer // period)) for name in patterns)
    shapes = tuple(slot.shape for slot in slots)
    return Link(row.transform.names(patterns, shapes), tuple(slots), row.transform)


def _check_coverage(links: Sequence[Link], leaves: Mapping[str, Any]) -> None:
    covered = Counter((slot.path, slot.index) for link in links for slot in link.slots)
    paths = {path for path, _ in covered}
    problems = [f"{path}: no row of the weight table describes it" for path in leaves if path not in paths]
    problems += [f"{path}: {count} rows describe it" for (path, _), count in covered.items() if count > 1]
    if problems:
        raise ValueError("the model has parameters that its family does not:\n  " + "\n  ".join(problems))


def _written(table: WeightTable, links: Sequence[Link], params: Params) -> dict[str, tuple[str, ...]]:
    """Names under which each tensor of the rows is written."""
    names = [name for link in links for name in link.names]
    written: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    for copy, original in table.unread.items():
        if original in written and copy not in written:
            written[original] += (copy,)
    if table.head is not None and not _node(params, table.head):
        written = {name: tuple(one.removeprefix(table.prefix) for one in ones) for name, ones in written.items()}
    return written


def _blank(table: WeightTable, links: Sequence[Link]) -> dict[str, Shape]:
    """Shapes of the vectors that are written as zeros."""
    if not table.blank:
        return {}
    shapes = {name: shape for link in links for name, shape in link.tensors().items()}
    return {name: shapes[other][:1] for name, other in table.blank.items() if other in shapes}


def _slice(leaf: Any, index: int | None) -> np.ndarray:
    return np.asarray(leaf if index is None else leaf[index])


def _resolve(table: WeightTable, links: Sequence[Link], source: TensorSource, where: str) -> dict[str, str]:
    """The tensor to read for each name that the model needs, or one error with everything that does not fit."""
    expected: dict[str, Shape] = {}
    for link in links:
        expected.update(link.tensors())
    sources: dict[str, str] = {}
    copies: list[tuple[str, str]] = []
    problems: list[str] = []
    ignored = set(table.ignored)
    for name in source.tensors:
        full = next((known for known in _spellings(table, name) if known in expected), table.prefix + name)
        if full in expected:
            if full in sources:
                problems.append(f"unexpected: {name}, since {sources[full]} is the same parameter")
            sources.setdefault(full, name)
        elif (original := table.tied.get(name, table.tied.get(full))) in expected:
            copies.append((name, original))
        elif {table.unread.get(name), table.blank.get(name)} & expected.keys():
            continue
        elif _pattern(full) not in ignored and _pattern(name) not in ignored:
            problems.append(f"unexpected: {name}, shape {source.tensors[name].shape}")
    for copy, original in copies:
        sources.setdefault(original, copy)
    for name, shape in expected.items():
        if name not in sources and name not in table.zeros:
            problems.append(f"missing: {name}, shape {shape}")
    for name, original in (*((source_name, name) for name, source_name in sources.items()), *copies):
        problems += _misfits(name, source.tensors[name], expected[original])
    for copy, original in copies:
        if not problems and not _equal(source, copy, sources[original]):
            problems.append(f"different: {copy} is tied to {sources[original]} by the config, but is not equal to it")
    if problems:
        raise ValueError(f"{where} does not fit its config: {len(problems)} problems\n  " + "\n  ".join(problems))
    return sources


def _spellings(table: WeightTable, name: str) -> Iterator[str]:
    """What the rows may call a checkpoint's tensor."""
    endings = ((old, new) for old, new in table.synonyms.items() if name.endswith(old))
    today = next((name.removesuffix(old) + new for old, new in endings), name)
    yield today
    yield table.prefix + today
    yield from (new + today.removeprefix(old) for old, new in table.renamed if today.startswith(old))


def _misfits(name: str, info: TensorInfo, shape: Shape) -> list[str]:
    problems: list[str] = []
    if info.shape != shape:
        problems.append(f"wrong shape: {name} is {info.shape}, the config asks for {shape}")
    if info.dtype not in FLOATS:
        problems.append(f"wrong type: {name} is {info.dtype}, parameters are read from {', '.join(FLOATS)}")
    return problems


def _pattern(name: str) -> str:
    """The name with its first number, the layer's, replaced by {layer}."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if numbers:
        parts[numbers[0]] = "{layer}"
    return ".".join(parts)


def _equal(source: TensorSource, first: str, second: str) -> bool:
    return first == second or np.array_equal(source.read(first), source.read(second), equal_nan=True)


def _stream(
    links: Sequence[Link], sources: Mapping[str, str], source: TensorSource, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
    groups: dict[tuple[str, ...], list[Link]] = {}
    for link in links:
        groups.setdefault(tuple(slot.path for slot in link.slots), []).append(link)
    for paths, members in groups.items():
        arrays = {path: np.empty(leaves[path].shape, np.float32) for path in paths}
        for link in members:
            tensors = tuple(
                source.read(sources[name]).astype(np.float32, copy=False)
                if name in sources
                else np.zeros(shape, np.float32)
                for name, shape in link.tensors().items()
            )
            for slot, leaf in zip(link.slots, link.transform.to_leaves(tensors, link.shapes), strict=True):
                arrays[slot.path][... if slot.index is None else slot.index] = leaf
        yield from arrays.items()
