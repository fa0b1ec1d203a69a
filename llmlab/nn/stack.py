"""The layer stack: a pattern of blocks repeated through depth.

    pattern (local, local, global), 8 layers:   l l g  l l g  |  l l
                                                2 repeats        remainder

Parameters of block i of the pattern are stored stacked over its repeats, always: one array per name, with a leading
"layers" dimension. Layers beyond the last whole repeat are the pattern's first blocks, stored unstacked. How the
stack is applied is separate from how it is stored:

    scan     one compiled repeat in a loop: compile time and program size independent of depth
    unroll   every layer in the program: XLA optimises across layers; faster on CPU (about 3% to 30%) at small depth

Rematerialisation trades time for memory: activations inside a repeat are recomputed in the backward pass. "full"
keeps only each repeat's input (about 1/3 more FLOPs), "dots" keeps the outputs of parameter matmuls, and "offload"
keeps those in the host's memory, from which they come back while the backward pass of other layers runs.

LayerDrop (Fan et al. 2020, 1909.11556) skips each layer with probability p in training, which regularises and lets
a trained model be cut shallower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Block, Context, LayerCache
from llmlab.nn.dropout import check_rate
from llmlab.nn.module import stack_axes
from llmlab.nn.platform import platform
from llmlab.sharding import shard
from llmlab.sharding.memory import DEVICE, HOST, check_host_memory
from llmlab.sharding.rules import active_mesh

Remat = Literal["none", "full", "dots", "offload"]

_POLICIES: dict[Remat, Callable[..., Any] | None] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(DEVICE, HOST),
}

# Compile time grows with an unrolled program; beyond this many layers scan wins on every platform.
_UNROLL_LIMIT = 16
# fold_in constant that separates the key of LayerDrop from those that the layer splits off for its dropout.
LAYER_DROP_KEY = 0x1A7E2


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a stack of layers is applied; none of this changes what it computes (LayerDrop aside)."""

    mode: Literal["auto", "scan", "unroll"] = "auto"
    """scan loops over one compiled layer; unroll writes all out; auto unrolls small stacks on CPU."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, everything in a layer, or all but parameter matmuls, whose outputs
    stay on the device (dots) or wait in the host's memory (offload)."""
    layer_drop: float = 0.0
    """Probability of skipping a layer in training."""

    def __post_init__(self) -> None:
        check_rate("layer_drop", self.layer_drop)

    def unrolled(self, num_layers: int) -> bool:
        """Whether a stack of this depth is written out."""
        if self.mode == "auto":
            return platform() == "cpu" and num_layers <= _UNROLL_LIMIT
        return self.mode == "unroll"


class Stack(nnx.Module):
    """Blocks applied one after the other.

    Args:
        pattern: blocks, repeated through depth.
        num_layers: depth; no multiple of the pattern is needed.
        dim: width of the residual stream.
    """

    def __init__(
        self, pattern: Sequence[Block], num_layers: int, dim: int, execution: Execution, *, rngs: nnx.Rngs
    ) -> None:
        repeats, rest = divmod(num_layers, len(pattern))
        self.execution = execution
        self.num_layers = num_layers
        self.blocks = nnx.List([_stacked(block, repeats, num_layers, dim, rngs) for block in pattern if repeats])
        self.remainder = nnx.List([block.build(dim, rngs=rngs, depth=num_layers) for block in pattern[:rest]])

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S D"], tuple[LayerCache, ...] | None, Auxiliary]:
        """Output of the last layer; the caches with the new positions stored (one per layer, first to last); and what
        the layers report, every array with a leading dimension of the layers that report it (in no order)."""
        split = [nnx.split(block) for block in self.blocks]
        graphdefs = [graphdef for graphdef, _ in split]
        stacked = [params for _, params in split]
        period = len(graphdefs)
        repeats = self.num_layers // period if period else 0
        caches = list(cache) if cache is not None else None
        reports: list[Auxiliary] = []

        def repeat(
            x: jax.Array, params: Sequence[Any], number: jax.Array | int
        ) -> tuple[jax.Array, tuple[Auxiliary, ...]]:
            reports = []
            for i, graphdef in enumerate(graphdefs):
                layer, index = nnx.merge(graphdef, params[i]), number * period + i
                x, _, report = self._layer(layer, x, context, key, index, None)
                reports.append(report)
            return x, tuple(reports)

        if caches is None and not self.execution.unrolled(self.num_layers):
            step = self._remat(repeat)
            numbers = jnp.arange(repeats)
            x_BSD, looped = jax.lax.scan(lambda x, xs: step(x, xs[0], xs[1]), x_BSD, (stacked, numbers))
            reports += looped
        else:
            layers = unstack(stacked, repeats)
            for number in range(repeats):
                if caches is None:
                    x_BSD, written_out = self._remat(repeat)(x_BSD, layers[number], number)
                    reports += [_one(report) for report in written_out]
                    continue
                for i, graphdef in enumerate(graphdefs):
                    layer, index = nnx.merge(graphdef, layers[number][i]), number * period + i
                    x_BSD, caches[index], report = self._layer(layer, x_BSD, context, key, index, caches[index])
                    reports.append(_one(report))
        for i, layer in enumerate(self.remainder):
            index = repeats * period + i
            before = None if caches is None else caches[index]
            x_BSD, after, report = self._layer(layer, x_BSD, context, key, index, before)
            reports.append(_one(report))
            if caches is not None:
                caches[index] = after
        return x_BSD, None if caches is None else tuple(caches), _joined(reports)

    def _layer(
        self,
        layer: Any,
        x_BSD: jax.Array,
        context: Context,
        key: jax.Array | None,
        index: jax.Array | int,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, Any, Auxiliary]:
        key = None if key is None else jax.random.fold_in(key, index)
        y_BSD, cache, auxiliary = layer(x_BSD, context, key, cache)
        if key is not None and self.execution.layer_drop > 0.0:
            drop = jax.random.bernoulli(jax.random.fold_in(key, LAYER_DROP_KEY), self.execution.layer_drop)
            y_BSD = jnp.where(drop, x_BSD, y_BSD)
        return shard(y_BSD, "batch", "residual", "embed"), cache, auxiliary

    def _remat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.execution.remat == "none":
            return function
        if self.execution.remat == "offload":
            mesh = active_mesh()
            check_host_memory(jax.local_devices() if mesh is None else mesh.devices.flat, "execution.remat=offload")
        return jax.checkpoint(function, policy=_POLICIES[self.execution.remat])


def _one(report: Auxiliary) -> Auxiliary:
    """The report of one layer with a dimension of layers."""
    return {name: value[None] for name, value in report.items()}


def _joined(reports: Sequence[Auxiliary]) -> Auxiliary:
    """All reports as one, along the dimension of layers."""
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: jnp.concatenate([report[name] for report in reports if name in report]) for name in names}


def _stacked(block: Block, repeats: int, depth: int, dim: int, rngs: nnx.Rngs) -> nnx.Module:
    """A block whose every parameter carries a leading dimension of `repeats`, each repeat drawn by its own key."""

    def build(key: jax.Array) -> nnx.Module:
        return block.build(dim, rngs=nnx.Rngs(params=key), depth=depth)

    keys = jax.random.split(rngs.params(), repeats)
    state = jax.vmap(lambda key: nnx.split(build(key))[1])(keys)
    graphdef = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))[0]
    return nnx.merge(graphdef, stack_axes(state))


def unstack(tree: Any, num: int) -> list[Any]:
    """The `num` slices of a tree of stacked arrays; slicing each array on its own would make every gradient a sum of
    `num` zero-padded arrays, where one stack does."""
    leaves, treedef = jax.tree.flatten(tree)
    sliced = [_slices(leaf) for leaf in leaves]
    return [jax.tree.unflatten(treedef, [slices[i] for slices in sliced]) for i in range(num)]


@jax.custom_vjp
def _slices(x: Float[Array, "L ..."]) -> tuple[Float[Array, "..."], ...]:
    return tuple(x[i] for i in range(x.shape[0]))


_slices.defvjp(lambda x: (_slices(x), None), lambda _, slices: (jnp.stack(slices),))
