"""Memory by arithmetic: what a device needs for a train step, without compiling anything.

    parameters     float32, each split over the devices that its logical axes name
    optimizer      the optimizer's state, likewise
    gradients      one a parameter, all alive when they are clipped: in the type of the arithmetic, and with
                   accumulation the float32 sum besides
    copy           parameters cast to the type of the arithmetic
    activations    what the backward pass needs of the forward pass, for the rows of one microbatch
    layer          what one layer's backward pass has in memory at once: everything that the layer would keep without
                   rematerialisation, and its parameters gathered, one layer ahead
    logits         a chunk of scores and its gradient, in float32 and in the type of the arithmetic

The first four are exact. Activations are exact too, in a sense: jax is asked what it would keep (`kept`), for one row
and for two, which tells what grows with the batch; the remat policy is in the model's config and so in the answer. They
are taken to split evenly over the devices of the batch, the sequence and the tensors. What a compiler makes of it is
within a factor of 2, mostly less: it keeps fewer copies than jax asks for, or needs room for what travels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from llmlab.sharding import Mesh, Rules, spec

BATCH_AXES = ("data", "fsdp", "expert")
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


def kept(loss: Callable[[Any, Any], Any], params: Any, batch: Mapping[str, Any]) -> int:
    """Bytes that jax keeps between the forward and the backward pass of a loss for each row of a batch.

    Args:
        loss: (params, batch) -> scalar.
        params: shapes.
        batch: arrays or shapes; only the dimensions behind the first count.
    """

    def residuals(rows: int) -> int:
        shapes = {name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for name, array in batch.items()}
        backward = jax.eval_shape(lambda p, b: jax.vjp(lambda p: loss(p, b), p)[1], params, shapes)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    return residuals(2) - residuals(1)  # parameters, cast or not, are there in both


@dataclass(frozen=True, kw_only=True)
class State:
    """Shapes of what training keeps, with the logical axis names of every dimension."""

    params: Any
    axes: Any
    optimizer: Any
    optimizer_axes: Any


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of one device."""

    parameters: int
    optimizer: int
    gradients: int
    copy: int
    activations: int
    layer: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())

    @property
    def temporaries(self) -> int:
        """What lives within a step."""
        return self.total - self.parameters - self.optimizer


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The choices that decide how much memory a step needs."""

    mesh: Mesh
    num_devices: int
    batch_size: int
    accumulation: int
    precision: str
    num_layers: int
    logits: int
    """Elements of a chunk of scores, over all devices."""


def estimate(state: State, setting: Setting, activations: int, without_remat: int) -> Estimate:
    """The memory of a step.

    Args:
        state: parameters and the optimizer's state.
        setting: mesh, batch and precision.
        activations: bytes that a row keeps under the setting's remat policy.
        without_remat: what it would keep under none, of which one layer's share is alive while it is recomputed.
    """
    sizes, zero = setting.mesh.resolve(setting.num_devices), setting.mesh.zero
    item, rules = _ITEM[setting.precision], setting.mesh.table
    split = {name: tuple(axis for axis in axes if axis != "fsdp") for name, axes in rules.items()}
    of_params, of_gradients = (rules if zero >= least else split for least in (3, 2))
    parameters = share(state.params, state.axes, of_params, sizes)
    gradients = share(state.params, state.axes, of_gradients, sizes)
    rows = setting.batch_size / setting.accumulation / math.prod(sizes[axis] for axis in BATCH_AXES)
    others = sizes["tensor"] * sizes["sequence"]
    whole = share(state.params, state.axes, split, sizes)  # gathered over fsdp
    gathered = 2 * whole * item // 4 // setting.num_layers if sizes["fsdp"] > 1 and zero >= 3 else 0
    accumulating = setting.accumulation > 1
    return Estimate(
        parameters=parameters,
        optimizer=share(state.optimizer, state.optimizer_axes, rules, sizes),
        gradients=gradients * item // 4 + (gradients if accumulating else 0),
        copy=0 if item == 4 else parameters * item // 4,
        activations=round(activations * rows / others),
        layer=round(without_remat * rows / others / setting.num_layers) + gathered,
        logits=setting.logits * (4 + item) // setting.num_devices,
    )


def share(shapes: Any, axes: Any, rules: Rules, sizes: Mapping[str, int]) -> int:
    """Bytes of a device's share of a tree of arrays, by the logical names of their dimensions."""

    def one(names: tuple[str | None, ...], array: Any) -> int:
        if not names:
            return array.size * array.dtype.itemsize
        parts: PartitionSpec = spec(names, rules, shape=array.shape, sizes=sizes)
        ways = math.prod(sizes[axis] for entry in parts for axis in _axes(entry))
        return array.size * array.dtype.itemsize // ways

    counted = jax.tree.map(one, axes, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return sum(jax.tree.leaves(counted))


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def parse_size(text: str) -> int:
    """Bytes of "80GB" (10^9), "80GiB" (2^30), "24G" (2^30, as drivers write it).

    Raises:
        ValueError: it is none of them.
    """
    import re

    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?B|)\s*", text, flags=re.IGNORECASE)
    if found is None or not found[2]:
        raise ValueError(f"--memory {text!r} is no size; write it like 80GB, 24GiB or 512MB")
    base = 1000 if found[3].upper() == "B" else 1024
    try:
        return int(float(found[1]) * base ** " KMGT".index(found[2].upper()))
    except ValueError:
        raise ValueError(f"--memory {text!r} is no size; write it like 80GB, 24GiB or 512MB") from None
