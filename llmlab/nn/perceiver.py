"""The perceiver resampler: any number of states becomes a fixed number (Jaegle et al. 2021, 2103.03206; Alayrac et al.
2022, 2204.14198, section 2.1).

    latents x_0 (learned, n of them)         x <- x + Attention(q: norm(x),  k, v: [norm(memory); norm(x)])
    memory (T states of an image)            x <- x + FFN(norm(x))                       repeated, then a last norm

Latents ask, the memory and the latents themselves answer. What reads an image afterwards pays for n tokens (64),
whatever the image's size. Cost per layer: 4 n (T + n) N H FLOPs of attention, and projections of T + n states, since
keys and values are computed from the memory anew in every layer.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.attention import Attention, AttentionLayer
from llmlab.nn.config import Block, Cache, Context, Norm
from llmlab.nn.feed_forward import MLP
from llmlab.nn.masks import Full
from llmlab.nn.module import normal
from llmlab.nn.norms import LayerNorm
from llmlab.nn.stack import Execution, Stack
from llmlab.nn.wiring import PreNorm


@dataclass(frozen=True, kw_only=True)
class PerceiverAttention(Attention):
    """Attention of latents over `context.memory` and themselves."""

    memory_norm: Norm = LayerNorm()
    """Norm of the memory; the block's norm is that of the latents."""

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "PerceiverAttentionLayer":
        return PerceiverAttentionLayer(self, dim, rngs=rngs, depth=depth)


class PerceiverAttentionLayer(AttentionLayer):
    """See PerceiverAttention."""

    def __init__(self, config: PerceiverAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        super().__init__(config, dim, rngs=rngs, depth=depth)
        self.norm_memory = config.memory_norm.build(dim, rngs=rngs)

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        source_BTD = jnp.concatenate([self.norm_memory(context.memory), x_BSD], axis=1)
        return self.attend(*self.project(x_BSD, source_BTD), Full(), key), cache


@dataclass(frozen=True, kw_only=True)
class Resampler:
    """A stack of latents' attention; as wide as what it reads."""

    num_latents: int = 64
    """States that come out."""
    num_layers: int = 6
    """Depth."""
    num_heads: int
    """Heads of the attention."""
    head_dim: int
    """Width of a head."""
    hidden_dim: int | None = None
    """Width between the feed-forward's matrices; None for 4 times the states'."""
    qk_norm: Norm | None = None
    """Norm of each head's queries and keys."""

    def block(self, dim: int) -> Block:
        """The block of every layer."""
        return Block(
            mixer=PerceiverAttention(num_heads=self.num_heads, head_dim=self.head_dim, qk_norm=self.qk_norm),
            ffn=MLP(hidden_dim=self.hidden_dim or 4 * dim, activation="relu", bias=False),
            norm=LayerNorm(),
            wiring=PreNorm(),
        )

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "ResamplerModel":
        """Module `(memory_BTD) -> latents_BND`."""
        return ResamplerModel(self, dim, rngs=rngs)

    def flops(self, dim: int, length: int) -> int:
        """Matmul FLOPs of a memory of this length, forward."""
        heads, latents = self.num_heads * self.head_dim, self.num_latents
        sources = length + latents
        projections = 2 * latents * 2 * dim * heads + 2 * sources * 2 * dim * heads
        scores = 4 * latents * sources * heads
        feed_forward = 2 * latents * 2 * dim * (self.hidden_dim or 4 * dim)
        return self.num_layers * (projections + scores + feed_forward)


class ResamplerModel(nnx.Module):
    """See Resampler."""

    def __init__(self, config: Resampler, dim: int, *, rngs: nnx.Rngs) -> None:
        latents = normal(rngs, (config.num_latents, dim)) / math.sqrt(dim)
        self.latents = nnx.Param(latents, axes=("position", "embed"))
        self.stack = Stack((config.block(dim),), config.num_layers, dim, Execution(), rngs=rngs)
        self.norm = LayerNorm().build(dim, rngs=rngs)

    def __call__(self, memory_BTD: Float[Array, "B T D"], key: jax.Array | None = None) -> Float[Array, "B N D"]:
        latents = self.latents[...].astype(memory_BTD.dtype)
        x_BND = jnp.broadcast_to(latents, (len(memory_BTD), *latents.shape))
        place = jnp.zeros(x_BND.shape[:2], jnp.int32)
        x_BND, _, _ = self.stack(x_BND, Context(mask=Full(), position_ids=place, memory=memory_BTD), key)
        return self.norm(x_BND)
