"""Logical axis names to mesh axes: one table, one pure function.

A parameter of shape (embed, heads, head_dim) under the default rules becomes PartitionSpec("fsdp", "tensor", None):
split over fsdp along embed and over tensor along heads. An activation (batch, sequence, embed) becomes
PartitionSpec(("data", "fsdp"), "sequence", None): batch has taken fsdp already, and a mesh axis is used once.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]
"""Logical axis name to the mesh axes it is split over; a name that is absent is replicated."""

DEFAULT_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "sequence": ("sequence",),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}

_active: contextvars.ContextVar[tuple[jax.sharding.Mesh, Rules] | None] = contextvars.ContextVar("mesh", default=None)


def spec(
    names: tuple[str | None, ...],
    rules: Rules,
    *,
    shape: tuple[int, ...] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> PartitionSpec:
    """PartitionSpec of an array whose dimensions have these logical names.

    A mesh axis serves one dimension, the first that asks. With `shape` and mesh `sizes`, a mesh axis that does not
    divide its dimension is left out (the dimension is replicated over it), and so is one of a single device.
    """
    taken: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for index, name in enumerate(names):
        axes: list[str] = []
        for axis in rules.get(name, ()) if name is not None else ():
            split = math.prod(sizes[a] for a in (*axes, axis)) if sizes is not None else 1
            if axis in taken or (sizes is not None and sizes[axis] == 1):
                continue
            if shape is not None and shape[index] % split:
                continue
            axes.append(axis)
            taken.add(axis)
        entries.append(None if not axes else axes[0] if len(axes) == 1 else tuple(axes))
    return PartitionSpec(*entries)


def shardings(axes: Any, shapes: Any, mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """NamedShardings for a tree of arrays.

    Args:
        axes: tree whose leaves are tuples of logical axis names.
        shapes: tree of the same structure whose leaves have `.shape`.
    """

    def one(names: tuple[str | None, ...], array: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(names, rules, shape=array.shape, sizes=mesh.shape))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh, rules: Rules = DEFAULT_RULES) -> Iterator[None]:
    """While tracing inside, `shard` constrains activations to this mesh."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def active_mesh() -> jax.sharding.Mesh | None:
    """The mesh of the enclosing `activate`, or None."""
    active = _active.get()
    return None if active is None else active[0]


def active_sharding(shape: tuple[int, ...], *names: str | None) -> NamedSharding | None:
    """Sharding of an array by its dimensions' logical names; None without a mesh of several devices."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return None
    mesh, rules = active
    return NamedSharding(mesh, spec(names, rules, shape=shape, sizes=mesh.shape))


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation by its dimensions' logical names; the identity without a mesh of several devices."""
    sharding = active_sharding(x.shape, *names)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
