"""Reversible layers (Gomez et al. 2017, 1707.04585; in transformers: Kitaev et al. 2020, 2001.04451, section 3).

Two residual streams, each changed by a function of the other, so that the input of a layer can be had from its output:

    x1 ---------(+)--------------- y1        y1 = x1 + F(norm(x2))         F: the mixer
                 ^F            |             y2 = x2 + G(norm(y1))         G: the feed-forward
    x2 ----------+-----------(+)-- y2
                              ^G y1          x2 = y2 - G(norm(y1)),   x1 = y1 - F(norm(x2))

The backward pass walks from the last layer to the first, computes each layer's input from its output, and the gradient
on the way. Nothing is kept for it but the output of the last layer: activation memory is that of one layer, whatever
the depth.

    time      F and G run once more in the backward pass: about 1/3 more FLOPs, as with full rematerialisation
    memory    two streams, O(1) in depth, where rematerialisation keeps one stream for each layer
    trades    exactness: inputs come back with rounding, once per layer. What is discrete in a layer (which bucket a
              vector falls into) may then, rarely, be decided otherwise in the backward pass than in the forward pass

A feed-forward is wide, so within a layer its hidden activations are the largest: `chunk` transforms so many positions
at a time and computes each chunk again in the backward pass (Reformer, section 3).

Both streams start as the embedding; the output is both, side by side: (B, S, 2D).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Block, Cache, Context, LayerCache, Wiring
from llmlab.nn.dropout import dropout, split_key
from llmlab.nn.stack import LAYER_DROP_KEY, Stack, unstack
from llmlab.sharding import shard

Streams = tuple[Float[Array, "B S D"], Float[Array, "B S D"]]


@dataclass(frozen=True, kw_only=True)
class Reversible(Wiring):
    """x1 + F(norm(x2)), x2 + G(norm(y1)). Its layers stand in a ReversibleStack, which carries the two streams."""

    chunk: int | None = None
    """Positions that the feed-forward transforms at a time: memory for time, the result is the same. None for all."""

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} is not positive; None transforms all positions at once")

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "ReversibleLayer":
        if block.cross is not None:
            raise ValueError("Reversible wiring has no place for cross-attention; use PreNorm, PostNorm or Sandwich")
        return ReversibleLayer(block, dim, self.chunk, rngs=rngs, depth=depth)


class ReversibleLayer(nnx.Module):
    """See Reversible."""

    def __init__(self, block: Block, dim: int, chunk: int | None, *, rngs: nnx.Rngs, depth: int) -> None:
        self.chunk = chunk
        self.dropout = block.dropout
        self.mixer = block.mixer.build(dim, rngs=rngs, depth=depth)
        self.ffn = block.ffn.build(dim, rngs=rngs, depth=depth)
        self.norm_mixer = block.norm.build(dim, rngs=rngs) if block.norm is not None else None
        self.norm_ffn = block.norm.build(dim, rngs=rngs) if block.norm is not None else None

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context, key: jax.Array | None = None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B S D"], Cache | None, Auxiliary]:
        """ValueError: one stream is not enough."""
        raise ValueError("Reversible wiring has two streams and this stack carries one; use ReversibleStack")

    def mix(self, x_BSD: Float[Array, "B S D"], context: Context, key: jax.Array | None) -> Float[Array, "B S D"]:
        """F: what the mixer adds to the first stream, from the second."""
        key_mixer, key_dropout = split_key(key, 2)
        h_BSD = x_BSD if self.norm_mixer is None else self.norm_mixer(x_BSD)
        return dropout(self.mixer(h_BSD, context, key_mixer)[0], self.dropout, key_dropout)

    def decode(self, x: Streams, context: Context, cache: LayerCache) -> tuple[Streams, LayerCache]:
        """Both streams after the layer, from what it remembers of earlier calls; no dropout."""
        h_BSD = x[1] if self.norm_mixer is None else self.norm_mixer(x[1])
        change_BSD, cache = self.mixer(h_BSD, context, None, cache)
        y1_BSD = shard(x[0] + change_BSD, "batch", "residual", "embed")
        y2_BSD = shard(x[1] + self.transform(y1_BSD, context, None), "batch", "residual", "embed")
        return (y1_BSD, y2_BSD), cache

    def transform(self, x_BSD: Float[Array, "B S D"], context: Context, key: jax.Array | None) -> Float[Array, "B S D"]:
        """G: what the feed-forward adds to the second stream, from the first."""
        batch, length, dim = x_BSD.shape
        if self.chunk is None or length <= self.chunk:
            return self._transform(x_BSD, context, key)
        missing = -length % self.chunk
        x_BCTD = jnp.pad(x_BSD, ((0, 0), (0, missing), (0, 0))).reshape(batch, -1, self.chunk, dim)

        @jax.checkpoint
        def part(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            x_BTD, number = inputs
            return self._transform(x_BTD, context, None if key is None else jax.random.fold_in(key, number))

        y_CBTD = jax.lax.map(part, (x_BCTD.swapaxes(0, 1), jnp.arange(x_BCTD.shape[1])))
        return y_CBTD.swapaxes(0, 1).reshape(batch, -1, dim)[:, :length]

    def _transform(self, x_BSD: jax.Array, context: Context, key: jax.Array | None) -> jax.Array:
        key_ffn, key_dropout = split_key(key, 2)
        h_BSD = x_BSD if self.norm_ffn is None else self.norm_ffn(x_BSD)
        y_BSD, auxiliary = self.ffn(h_BSD, context, key_ffn)
        if auxiliary:
            raise ValueError(
                f"a reversible layer reports nothing, and {type(self.ffn).__name__} does: {', '.join(auxiliary)}; "
                "use another wiring for it"
            )
        return dropout(y_BSD, self.dropout, key_dropout)


class ReversibleStack(Stack):
    """Blocks with Reversible wiring, stored as in any Stack. `execution.remat` has nothing left to do here."""

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> tuple[Float[Array, "B S E"], tuple[LayerCache, ...] | None, Auxiliary]:
        """Both streams of the last layer side by side (E = 2D), and the caches where there were some; nothing
        reported. With caches there is no dropout, and the backward pass is the usual one."""
        if context.bias is not None or context.memory is not None:
            raise ValueError(
                "a reversible stack computes its layers again from their outputs: no gradient would reach a shared "
                "bias or encoder states"
            )
        if cache is not None:
            layers: list[Any] = [*self.repeats.layers([nnx.split(block)[1] for block in self.blocks]), *self.remainder]
            streams, caches = (x_BSD, x_BSD), []
            for layer, before in zip(layers, cache, strict=True):
                streams, after = layer.decode(streams, context, before)
                caches.append(after)
            return jnp.concatenate(streams, axis=-1), tuple(caches), {}
        blocks, rest = ([nnx.split(block) for block in part] for part in (self.blocks, self.remainder))
        plan = _Plan(
            graphdefs=tuple(graphdef for graphdef, _ in blocks),
            rest=tuple(graphdef for graphdef, _ in rest),
            repeats=self.num_layers // len(blocks) if blocks else 0,
            unrolled=self.execution.unrolled(self.num_layers),
            layer_drop=self.execution.layer_drop,
        )
        params = [state for _, state in blocks], [state for _, state in rest]
        y1_BSD, y2_BSD = _run(plan, params, (x_BSD, x_BSD), context, key)
        return jnp.concatenate([y1_BSD, y2_BSD], axis=-1), None, {}


class _Plan(NamedTuple):
    """What is known of a stack when it is traced."""

    graphdefs: tuple[nnx.GraphDef, ...]
    """Of the pattern's blocks."""
    rest: tuple[nnx.GraphDef, ...]
    """Of the layers after the last whole pattern."""
    repeats: int
    unrolled: bool
    layer_drop: float

    def first_of_rest(self) -> int:
        """Index of the first layer after the last whole pattern."""
        return self.repeats * len(self.graphdefs)


def _apply(plan: _Plan, params: Any, x: Streams, context: Context, key: jax.Array | None) -> Streams:
    stacked, rest = params

    def repeat(x: Streams, inputs: Any) -> tuple[Streams, None]:
        states, number = inputs
        for i, graphdef in enumerate(plan.graphdefs):
            x = _Layer(plan, graphdef, context, key, number * len(plan.graphdefs) + i).forward(states[i], x)
        return x, None

    if plan.unrolled:
        for number, states in enumerate(unstack(stacked, plan.repeats)):
            x, _ = repeat(x, (states, number))
    elif plan.repeats:
        x, _ = jax.lax.scan(repeat, x, (stacked, jnp.arange(plan.repeats)))
    for i, graphdef in enumerate(plan.rest):
        x = _Layer(plan, graphdef, context, key, plan.first_of_rest() + i).forward(rest[i], x)
    return x


_run = jax.custom_vjp(_apply, nondiff_argnums=(0,))


def _forward(plan: _Plan, params: Any, x: Streams, context: Context, key: jax.Array | None) -> tuple[Streams, Any]:
    y = _apply(plan, params, x, context, key)
    return y, (params, y, context, key)


def _backward(plan: _Plan, residuals: Any, dy: Streams) -> tuple[Any, ...]:
    (stacked, rest), y, context, key = residuals
    drest: list[Any] = []
    for i, graphdef in reversed(list(enumerate(plan.rest))):
        layer = _Layer(plan, graphdef, context, key, plan.first_of_rest() + i)
        y, dy, dstate = layer.backward(rest[i], y, dy)
        drest.insert(0, dstate)

    def repeat(carry: tuple[Streams, Streams], inputs: Any) -> tuple[tuple[Streams, Streams], list[Any]]:
        (y, dy), (states, number), dstates = carry, inputs, []
        for i, graphdef in reversed(list(enumerate(plan.graphdefs))):
            layer = _Layer(plan, graphdef, context, key, number * len(plan.graphdefs) + i)
            y, dy, dstate = layer.backward(states[i], y, dy)
            dstates.insert(0, dstate)
        return (y, dy), dstates

    dstacked: list[Any] = []
    if plan.unrolled:
        for number, states in reversed(list(enumerate(unstack(stacked, plan.repeats)))):
            (y, dy), dstates = repeat((y, dy), (states, number))
            dstacked.insert(0, dstates)
        dstacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *dstacked) if dstacked else []
    elif plan.repeats:
        (_, dy), dstacked = jax.lax.scan(repeat, (y, dy), (stacked, jnp.arange(plan.repeats)), reverse=True)
    return (dstacked, drest), dy, None, None


_run.defvjp(_forward, _backward)


class _Layer:
    """One layer forward, and backward from its output."""

    def __init__(
        self, plan: _Plan, graphdef: nnx.GraphDef, context: Context, key: jax.Array | None, index: jax.Array | int
    ) -> None:
        key = None if key is None else jax.random.fold_in(key, index)
        self.graphdef, self.context = graphdef, context
        self.key_mix, self.key_transform = split_key(key, 2)
        self.dropped = None
        if key is not None and plan.layer_drop > 0.0:
            self.dropped = jax.random.bernoulli(jax.random.fold_in(key, LAYER_DROP_KEY), plan.layer_drop)

    def forward(self, state: Any, x: Streams) -> Streams:
        """Output of the layer."""
        y1 = x[0] + self._mix(state, x[1])
        return y1, x[1] + self._transform(state, y1)

    def backward(self, state: Any, y: Streams, dy: Streams) -> tuple[Streams, Streams, Any]:
        """Input of the layer from its output, and the gradients of the input and of the parameters."""
        change, pull_back = jax.vjp(self._transform, state, y[0])
        x2 = y[1] - change
        dstate_transform, d1 = pull_back(dy[1])
        dx1 = dy[0] + d1
        change, pull_back = jax.vjp(self._mix, state, x2)
        x1 = y[0] - change
        dstate_mix, d2 = pull_back(dx1)
        return (x1, x2), (dx1, dy[1] + d2), jax.tree.map(jnp.add, dstate_transform, dstate_mix)

    def _mix(self, state: Any, x: jax.Array) -> jax.Array:
        return self._kept(nnx.merge(self.graphdef, state).mix(x, self.context, self.key_mix))

    def _transform(self, state: Any, x: jax.Array) -> jax.Array:
        return self._kept(nnx.merge(self.graphdef, state).transform(x, self.context, self.key_transform))

    def _kept(self, change: jax.Array) -> jax.Array:
        change = shard(change, "batch", "residual", "embed")
        return change if self.dropped is None else jnp.where(self.dropped, 0, change)
