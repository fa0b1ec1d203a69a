"""Wiring: where norms and residual additions go in a block. F stands for the mixer, then for the feed-forward.

    PreNorm      x + F(norm(x))                     Xiong et al. 2020 (2002.04745): trains without warm-up
    PostNorm     norm(x + F(x))                     Vaswani et al. 2017 (1706.03762): the original, BERT's
    Sandwich     x + norm(F(norm(x)))               Ding et al. 2021 (2105.13290): bounds each branch's output
    Parallel     x + Mixer(norm(x)) + FFN(norm(x))  Wang and Komatsuzaki 2021 (GPT-J): both branches side by side
    ReZero       x + a F(x), a = 0 at first         Bachlechner et al. 2020 (2003.04887): identity at the start
    LayerScale   x + g * F(norm(x)), g small        Touvron et al. 2021 (2103.17239): a gain per channel
    NoResidual   F(norm(x))                         a plain deep network, for the comparison (He et al. 2015,
                                                    1512.03385): gradients must pass through every part

The residual stream of the pre-norm kinds is never normalised, so the model ends with a final norm; post-norm needs
none. Costs are those of mixer and feed-forward; a norm more or less is memory traffic. Parallel lets the input
matmuls of both branches run as one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Block, Context, DecoderLayerCache, LayerCache, Wiring
from llmlab.nn.dropout import dropout, split_key
from llmlab.sharding import shard

Output = tuple[Float[Array, "B S D"], LayerCache | None, Auxiliary]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class PreNorm(Wiring):
    """x + F(norm(x))."""

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "SerialLayer":
        return SerialLayer(block, dim, rngs=rngs, depth=depth, norm_input=True)


@dataclass(frozen=True, kw_only=True)
class PostNorm(Wiring):
    """norm(x + F(x))."""

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "SerialLayer":
        return SerialLayer(block, dim, rngs=rngs, depth=depth, norm_sum=True)


@dataclass(frozen=True, kw_only=True)
class Sandwich(Wiring):
    """x + norm(F(norm(x)))."""

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "SerialLayer":
        return SerialLayer(block, dim, rngs=rngs, depth=depth, norm_input=True, norm_output=True)


@dataclass(frozen=True, kw_only=True)
class ReZero(Wiring):
    """x + a F(x) with one learned number a for each branch, zero at first. The block's norm is usually None."""

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "SerialLayer":
        return SerialLayer(block, dim, rngs=rngs, depth=depth, norm_input=True, gain=jnp.zeros(()))


@dataclass(frozen=True, kw_only=True)
class LayerScale(Wiring):
    """x + g * F(norm(x)) with a learned gain g for each channel."""

    initial: float = 1e-5
    """Initial gain: 0.1 up to 18 layers, 1e-5 up to 24, 1e-6 beyond (paper, section 2)."""

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "SerialLayer":
        return SerialLayer(block, dim, rngs=rngs, depth=depth, norm_input=True, gain=jnp.full((dim,), self.initial))


@dataclass(frozen=True, kw_only=True)
class Parallel(Wiring):
    """x + Mixer(norm(x)) + FFN(norm(x)): one norm, one residual addition."""

    shared_norm: bool = True
    """One norm for both branches (GPT-J, PaLM), or one each (GPT-NeoX)."""

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "ParallelLayer":
        return ParallelLayer(block, dim, rngs=rngs, depth=depth, shared_norm=self.shared_norm)


@dataclass(frozen=True, kw_only=True)
class NoResidual(Wiring):
    """F(norm(x)): nothing is added, each part sees what the one before it made and nothing else.

    There is no stream whose variance grows with depth, so the parts' last matrices do not start smaller by it: they
    start as in a stack of one layer.
    """

    def build(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "SerialLayer":
        return SerialLayer(block, dim, rngs=rngs, depth=1, norm_input=True, residual=False)


class Branch(nnx.Module):
    """What surrounds one part of a serial block: norms before, after and on the sum, a gain, and the addition."""

    def __init__(
        self,
        block: Block,
        dim: int,
        *,
        rngs: nnx.Rngs,
        norm_input: bool,
        norm_output: bool,
        norm_sum: bool,
        gain: Float[Array, "..."] | None,
        residual: bool,
    ) -> None:
        def norm(wanted: bool) -> nnx.Module | None:
            return block.norm.build(dim, rngs=rngs) if wanted and block.norm is not None else None

        self.dropout = block.dropout
        self.residual = residual
        self.norm_input = norm(norm_input)
        self.norm_output = norm(norm_output)
        self.norm_sum = norm(norm_sum)
        self.scale = None if gain is None else nnx.Param(gain, axes=("embed",)[: gain.ndim])

    def __call__(
        self, part: Callable[[jax.Array], tuple[jax.Array, T]], x_BSD: Float[Array, "B S D"], key: jax.Array | None
    ) -> tuple[Float[Array, "B S D"], T]:
        """The stream after the part, and what else the part returned."""
        h_BSD = self.normed(x_BSD)
        y_BSD, other = part(shard(h_BSD, "batch", "sequence", "embed"))
        y_BSD = shard(y_BSD, "batch", "residual", "embed")
        if self.norm_output is not None:
            y_BSD = self.norm_output(y_BSD)
        if self.scale is not None:
            y_BSD = y_BSD * self.scale[...]
        y_BSD = dropout(y_BSD, self.dropout, key)
        z_BSD = x_BSD + y_BSD if self.residual else y_BSD
        return (z_BSD if self.norm_sum is None else self.norm_sum(z_BSD)), other

    def normed(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        """What the part is given."""
        return x_BSD if self.norm_input is None else self.norm_input(x_BSD)


class SerialLayer(nnx.Module):
    """Mixer, cross-attention if there is one, feed-forward: one after the other, each a residual branch (or, with
    NoResidual, a link of a chain)."""

    def __init__(
        self,
        block: Block,
        dim: int,
        *,
        rngs: nnx.Rngs,
        depth: int,
        norm_input: bool = False,
        norm_output: bool = False,
        norm_sum: bool = False,
        gain: Float[Array, "..."] | None = None,
        residual: bool = True,
    ) -> None:
        def branch() -> Branch:
            return Branch(
                block,
                dim,
                rngs=rngs,
                norm_input=norm_input,
                norm_output=norm_output,
                norm_sum=norm_sum,
                gain=gain,
                residual=residual,
            )

        self.mixer = block.mixer.build(dim, rngs=rngs, depth=depth)
        self.mixer_branch = branch()
        self.cross = block.cross.build(dim, rngs=rngs, depth=depth) if block.cross is not None else None
        self.cross_branch = branch() if block.cross is not None else None
        self.ffn = block.ffn.build(dim, rngs=rngs, depth=depth)
        self.ffn_branch = branch()

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> Output:
        key_mixer, key_cross, key_ffn, drop_mixer, drop_cross, drop_ffn = split_key(key, 6)
        own, of_memory = (cache.mixer, cache.cross) if isinstance(cache, DecoderLayerCache) else (cache, None)
        x_BSD, own = self.mixer_branch(lambda h: self.mixer(h, context, key_mixer, own), x_BSD, drop_mixer)
        if self.cross is not None and self.cross_branch is not None:
            cross = self.cross
            x_BSD, of_memory = self.cross_branch(lambda h: cross(h, context, key_cross, of_memory), x_BSD, drop_cross)
        cache = DecoderLayerCache(own, of_memory) if isinstance(cache, DecoderLayerCache) else own
        x_BSD, auxiliary = self.ffn_branch(lambda h: self.ffn(h, context, key_ffn), x_BSD, drop_ffn)
        return x_BSD, cache, auxiliary


class ParallelLayer(nnx.Module):
    """Mixer and feed-forward side by side on the same normalised input."""

    def __init__(self, block: Block, dim: int, *, rngs: nnx.Rngs, depth: int, shared_norm: bool) -> None:
        if block.cross is not None:
            raise ValueError("Parallel wiring has no place for cross-attention; use PreNorm, PostNorm or Sandwich")
        self.dropout = block.dropout
        self.mixer = block.mixer.build(dim, rngs=rngs, depth=depth)
        self.ffn = block.ffn.build(dim, rngs=rngs, depth=depth)
        self.norm_mixer = block.norm.build(dim, rngs=rngs) if block.norm is not None else None
        self.norm_ffn = block.norm.build(dim, rngs=rngs) if block.norm is not None and not shared_norm else None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: LayerCache | None = None,
    ) -> Output:
        key_mixer, key_ffn, key_dropout = split_key(key, 3)
        h_BSD = x_BSD if self.norm_mixer is None else self.norm_mixer(x_BSD)
        g_BSD = h_BSD if self.norm_ffn is None else self.norm_ffn(x_BSD)
        h_BSD, g_BSD = (shard(h, "batch", "sequence", "embed") for h in (h_BSD, g_BSD))
        mixed_BSD, cache = self.mixer(h_BSD, context, key_mixer, cache)
        fed_BSD, auxiliary = self.ffn(g_BSD, context, key_ffn)
        y_BSD = shard(mixed_BSD + fed_BSD, "batch", "residual", "embed")
        return x_BSD + dropout(y_BSD, self.dropout, key_dropout), cache, auxiliary
