"""Logical axis names to mesh axes: one table, one pure function.

A parameter of shape (embed, heads, head_dim) under the default rules becomes PartitionSpec("fsdp", "tensor", None):
split over fsdp along embed and over tensor along heads. An activation (batch, sequence, embed) becomes
PartitionSpec(("data", "fsdp", "expert"), "sequence", None). A mesh axis is used once in an array, by the dimension
whose row of the table comes first.

    experts     of parameters, and of tokens that have been sent to their experts
    batch       rows; every axis whose devices have tokens of their own
    sequence    tokens of a row inside a mixer or a feed-forward, where heads and hidden units are split over tensor
    residual    tokens of a row in the residual stream, where norms and additions are: no matrix is split there, so
                tensor has its share of tokens instead of repeating the work (Korthikanti et al. 2022, 2205.05198)
    layers      of parameters that are stacked: the stages of a pipeline
    kv_heads    of keys and values, and groups of queries by them; heads those of queries, where these are too few
    vocab       rows of the embedding, columns of the head, scores: what comes before and after the layers belongs to
                all stages together
    embed       width of the residual stream, of parameters only: an activation is whole there. Takes the pipeline axis
                where that does not divide the layers, so that no stage stores more than its share

ZeRO (Rajbhandari et al. 2020, 1910.02054) is which of the state's parts follow the rows that name fsdp: the optimizer's
state (1), gradients too (2), parameters too (3).
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis name to the mesh axes it is split over; a name that is absent is replicated."""

Context = Literal["ring", "all_to_all"]
ScheduleName = Literal["1f1b", "gpipe"]

DEFAULT_RULES: Rules = {
    "experts": ("expert",),
    "batch": ("data", "fsdp", "expert"),
    "sequence": ("sequence",),
    "residual": ("sequence", "tensor"),
    "layers": ("pipeline",),
    "vocab": ("tensor", "pipeline"),
    "kv_heads": ("tensor",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp", "pipeline"),
}


@dataclass(frozen=True)
class Placement:
    """A mesh, and the rules that place arrays on it."""

    mesh: jax.sharding.Mesh
    """The devices."""
    rules: Rules = dataclasses.field(default_factory=lambda: DEFAULT_RULES)
    """Logical axis name to mesh axes."""
    zero: int = 3
    """What the fsdp axis splits of the state: 1 the optimizer's, 2 gradients too, 3 parameters too."""
    context: Context = "ring"
    """How attention meets keys of other devices where the sequence is split."""
    schedule: ScheduleName = "1f1b"
    """In what order a pipeline works."""
    interleave: int = 1
    """Chunks of layers that a stage of the pipeline has."""

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis to its number of devices, 1 for an axis that an enclosing `shard_map` has split already."""
        manual = _manual_axes()
        return {name: 1 if name in manual else size for name, size in self.mesh.shape.items()}

    def spec(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions have these logical names."""
        return spec(names, self.rules, shape=shape, sizes=self.sizes)

    def sharding(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """The same with the devices."""
        return NamedSharding(self._mesh_here(), self.spec(names, shape))

    def shardings(self, axes: Any, shapes: Any) -> Any:
        """NamedShardings for a tree of arrays; `axes` has tuples of names where `shapes` has arrays or shapes."""

        def one(names: tuple[str | None, ...], array: Any) -> NamedSharding:
            return self.sharding(names, array.shape)

        return jax.tree.map(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """`function` on every device's share, with collectives by mesh axis; all axes are manual in it.

        It works inside another `shard_map` too, over the axes that that one left; where it left none, the result is
        `function` itself. Gradients: a collective is transposed as it stands (psum to psum), so a sum over devices
        belongs outside of what is differentiated, or into `out_specs`.
        """
        axes = set(self.mesh.axis_names) - _manual_axes()
        if not axes:
            return function
        return jax.shard_map(
            function,
            mesh=self._mesh_here(),
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=axes,
            check_vma=False,  # nested maps and pallas_call do not say how their outputs vary over the mesh
        )

    def _mesh_here(self) -> Any:
        """The mesh, or inside a `shard_map` that mesh with some axes manual."""
        return jax.sharding.get_abstract_mesh() if _manual_axes() else self.mesh

    @property
    def of_params(self) -> "Placement":
        """Where parameters are between steps."""
        return self if self.zero >= 3 else self._without_fsdp()

    @property
    def of_gradients(self) -> "Placement":
        """Where gradients are when they have been summed over the batch."""
        return self if self.zero >= 2 else self._without_fsdp()

    def _without_fsdp(self) -> "Placement":
        rules = {name: tuple(axis for axis in axes if axis != "fsdp") for name, axes in self.rules.items()}
        return dataclasses.replace(self, rules=rules)


def _manual_axes() -> frozenset[str]:
    """Mesh axes that an enclosing `shard_map` has split: arrays hold one device's share of them."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


_active: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement", default=None)


def spec(
    names: tuple[str | None, ...],
    rules: Rules,
    *,
    shape: tuple[int, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names.

    A mesh axis serves one dimension, the one whose row comes first. With `shape` and mesh `sizes`, an axis that does
    not divide its dimension is left out (the dimension is replicated over it); so is one of a single device.
    """
    taken: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = [None] * len(names)
    rows = {name: row for row, name in enumerate(rules)}
    for index, name in sorted(enumerate(names), key=lambda item: rows.get(item[1] or "", len(rows))):
        axes: list[str] = []
        for axis in rules.get(name, ()) if name is not None else ():
            split = math.prod(sizes[a] for a in (*axes, axis)) if sizes is not None else 1
            if axis in taken or (sizes is not None and sizes[axis] == 1):
                continue
            if shape is not None and shape[index] % split:
                continue
            axes.append(axis)
            taken.add(axis)
        entries[index] = None if not axes else axes[0] if len(axes) == 1 else tuple(axes)
    return PartitionSpec(*entries)


@contextlib.contextmanager
def activate(placement: Placement | None) -> Iterator[None]:
    """While tracing inside, `shard` constrains activations by this placement; by none for None."""
    token = _active.set(placement)
    try:
        yield
    finally:
        _active.reset(token)


def active_placement() -> Placement | None:
    """The placement of the enclosing `activate`, or None where there is none or it has a single device."""
    placement = _active.get()
    return None if placement is None or placement.mesh.size == 1 else placement


def active_mesh() -> jax.sharding.Mesh | None:
    """The mesh of the enclosing `activate`, or None."""
    placement = _active.get()
    return None if placement is None else placement.mesh


def active_sharding(shape: tuple[int, ...], *names: str | None) -> NamedSharding | None:
    """Sharding of an array by its dimensions' logical names; None without a mesh of several devices."""
    placement = active_placement()
    return None if placement is None else placement.sharding(names, shape)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation by its dimensions' logical names, whole along "embed"; the identity without a mesh of
    several devices."""
    sharding = active_sharding(x.shape, *(None if name == "embed" else name for name in names))
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
