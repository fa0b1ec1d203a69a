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

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.capture import PREFIX, captured, captured_input
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
        the layers report, every array with a leading dimension of the layers that report it (in no order, but what is
        captured first to last)."""
        of_input = captured_input(x_BSD)
        caches = list(cache) if cache is not None else None
        reports: list[Auxiliary] = []
        repeats, params = self.repeats, [nnx.split(block)[1] for block in self.blocks]
        if caches is not None:
            for index, layer in enumerate(repeats.layers(params)):
                x_BSD, caches[index], report = repeats.layer(layer, x_BSD, context, key, index, caches[index])
                reports.append(_one(report))
        elif (cut := _cut.get()) is not None and (found := cut(self, x_BSD, context, key)) is not None:
            x_BSD, looped = found
            reports += looped
        else:
            x_BSD, looped = repeats(params, x_BSD, context, key)
            reports += looped
        for i, layer in enumerate(self.remainder):
            index = self.num_layers - len(self.remainder) + i
            before = None if caches is None else caches[index]
            x_BSD, after, report = repeats.layer(layer, x_BSD, context, key, index, before)
            reports.append(_one(report))
            if caches is not None:
                caches[index] = after
        return x_BSD, None if caches is None else tuple(caches), of_input | self._ordered(_joined(reports), caches)

    def _ordered(self, reports: Auxiliary, caches: Any) -> Auxiliary:
        """What was captured, first layer to last; without caches, all repeats of a block of the pattern come first."""
        repeats, blocks = self.repeats.num, len(self.blocks)
        if caches is not None or blocks <= 1:
            return reports
        order = [i * repeats + r for r in range(repeats) for i in range(blocks)]
        order += range(repeats * blocks, self.num_layers)
        index = jnp.asarray(order)
        return {name: x[index] if name.startswith(PREFIX) else x for name, x in reports.items()}

    @property
    def repeats(self) -> "Repeats":
        """The whole repeats of the pattern, apart from their parameters."""
        graphdefs = tuple(nnx.split(block)[0] for block in self.blocks)
        return Repeats(
            graphdefs, self.num_layers // len(graphdefs) if graphdefs else 0, self.num_layers, self.execution
        )


@dataclass(frozen=True)
class Repeats:
    """Repeats of a pattern as a function of their parameters: a stack's, or a pipeline stage's share of them."""

    graphdefs: tuple[Any, ...]
    """Of the pattern's blocks."""
    num: int
    """How many repeats the stack has."""
    num_layers: int
    """How many layers the stack has, those beyond the last whole repeat included."""
    execution: Execution

    def __call__(
        self,
        params: Sequence[Any],
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None,
        first: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B S D"], list[Auxiliary]]:
        """The output, and the reports of every block of the pattern with a leading dimension of repeats.

        Args:
            params: of every block of the pattern, stacked over so many repeats as are to be applied.
            x_BSD: the residual stream.
            context: see Context.
            key: makes dropout active.
            first: number of the first of these repeats in the stack; those from `num` on are padding and change
                nothing.
        """
        leaves = jax.tree.leaves(params)
        count = leaves[0].shape[0] if leaves else 0
        padded = not isinstance(first, int)

        def repeat(x: jax.Array, params: Sequence[Any], number: jax.Array | int) -> tuple[jax.Array, Any]:
            y, reports = x, []
            for i, graphdef in enumerate(self.graphdefs):
                layer, index = nnx.merge(graphdef, params[i]), number * len(self.graphdefs) + i
                y, _, report = self.layer(layer, y, context, key, index, None)
                reports.append(report)
            if padded:
                y = jnp.where(number < self.num, y, x)
            return y, tuple(reports)

        repeat = self._remat(repeat)
        if not self.execution.unrolled(self.num_layers):
            numbers = first + jnp.arange(count)
            x_BSD, looped = jax.lax.scan(lambda x, xs: repeat(x, xs[0], xs[1]), x_BSD, (list(params), numbers))
            return x_BSD, list(looped)
        written_out: list[tuple[Auxiliary, ...]] = []
        for i, of_repeat in enumerate(unstack(list(params), count)):
            x_BSD, reports = repeat(x_BSD, of_repeat, first + i)
            written_out.append(reports)
        return x_BSD, [_joined([_one(report) for report in of_block]) for of_block in zip(*written_out, strict=True)]

    def layers(self, params: Sequence[Any]) -> Iterator[nnx.Module]:
        """Every layer with its parameters, first to last."""
        for of_repeat in unstack(list(params), self.num):
            for graphdef, of_layer in zip(self.graphdefs, of_repeat, strict=True):
                yield nnx.merge(graphdef, of_layer)

    def layer(
        self,
        layer: Any,
        x_BSD: jax.Array,
        context: Context,
        key: jax.Array | None,
        index: jax.Array | int,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, Any, Auxiliary]:
        """One layer, by its number in the stack."""
        key = None if key is None else jax.random.fold_in(key, index)
        y_BSD, cache, auxiliary = layer(x_BSD, context, key, cache)
        if key is not None and self.execution.layer_drop > 0.0:
            drop = jax.random.bernoulli(jax.random.fold_in(key, LAYER_DROP_KEY), self.execution.layer_drop)
            y_BSD = jnp.where(drop, x_BSD, y_BSD)
        auxiliary = auxiliary | captured(layer, x_BSD, y_BSD, context)
        return shard(y_BSD, "batch", "residual", "embed"), cache, auxiliary

    def _remat(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.execution.remat == "none":
            return function
        if self.execution.remat == "offload":
            mesh = active_mesh()
            check_host_memory(jax.local_devices() if mesh is None else mesh.devices.flat, "execution.remat=offload")
        return jax.checkpoint(function, policy=_POLICIES[self.execution.remat])


Cut = Callable[[Stack, jax.Array, Context, jax.Array | None], tuple[jax.Array, list[Auxiliary]] | None]
_cut: contextvars.ContextVar[Cut | None] = contextvars.ContextVar("cut", default=None)


@contextlib.contextmanager
def cut_by(cut: Cut) -> Iterator[None]:
    """While tracing inside, a stack asks `cut` for the output and the reports of its repeats, and computes them only
    where it gets None. So a pipeline takes a model apart into what comes before its layers and what comes after."""
    token = _cut.set(cut)
    try:
        yield
    finally:
        _cut.reset(token)


def _one(report: Auxiliary) -> Auxiliary:
    """The report of one layer with a dimension of layers."""
    return {name: value[None] for name, value in report.items()}


def _joined(reports: Sequence[Auxiliary]) -> Auxiliary:
    """All reports as one, along the dimension of layers."""
    names = dict.fromkeys(name for report in reports for name in report)
    return {name: jnp.concatenate([report[name] for report in reports if name in report]) for name in names}


def _stacked(block: Block, repeats: int, depth: int, dim: int, rngs: nnx.Rngs) -> nnx.Module:
    """A block whose every parameter carries a leading dimension of `repeats`, each repeat drawn by its own key."""

    graphdefs: list[Any] = []  # static, and the same for every layer

    def build(key: jax.Array) -> Any:
        graphdef, state = nnx.split(block.build(dim, rngs=type(rngs)(params=key), depth=depth))
        graphdefs.append(graphdef)
        return state

    state = jax.vmap(build)(jax.random.split(rngs.params(), repeats))
    return nnx.merge(graphdefs[0], stack_axes(state))


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
