"""Scaled dot-product attention with many heads (Vaswani et al. 2017, 1706.03762).

    Attention(Q, K, V) = softmax(Q K^T / sqrt(H) + bias, masked) V        for each head

Each query looks at every key it may see and takes the weighted mean of their values. Time is O(S T D) and, in a
kernel that forms the score matrix, memory O(S T) per head; blockwise kernels bring memory down to O(S + T).

Fewer key/value heads than query heads make the cache smaller: one is multi-query attention (Shazeer 2019,
1911.02150), in between is grouped-query attention (Ainslie et al. 2023, 2305.13245). Optional parts:

    qk_norm    normalise q and k per head before the product, against logit growth (Henry et al. 2020, 2010.04245)
    softcap    c tanh(logits / c), bounds the logits (Gemma 2, 2408.00118)
    window     see only the last `window` positions, oneself included (Beltagy et al. 2020, 2004.05150)
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.cache import KVCache, MemoryCache, RollingCache
from llmlab.nn.config import Cache, Context, LayerCache, Mixer, Norm, Room
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate
from llmlab.nn.kernels import Kernel, attention
from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.reference import attention_weights
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.masks import Full, Mask, SlidingWindow
from llmlab.nn.mup import MuP
from llmlab.nn.positions import BiasPosition, QueryKeyPosition
from llmlab.sharding import shard


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """Self-attention: multi-head, grouped-query or multi-query by the number of key/value heads."""

    num_heads: int
    """Query heads."""
    num_kv_heads: int | None = None
    """Key/value heads, a divisor of num_heads; None for as many as num_heads, 1 for multi-query."""
    head_dim: int | None = None
    """Width of a head; None for embed_dim / num_heads."""
    position: QueryKeyPosition | BiasPosition | None = None
    """Rotary(...), ALiBi(), T5Relative(...), or None when positions are added to the embeddings."""
    bias: bool = False
    """Whether the query, key and value projections add a bias."""
    output_bias: bool = False
    """Whether the output projection adds a bias."""
    qk_norm: Norm | None = None
    """Norm of each head's queries and keys."""
    softcap: float | None = None
    """Bound of the logits; None for none."""
    window: int | None = None
    """How many positions a query sees on each allowed side, itself included; None for all."""
    scale: float | None = None
    """Factor on q k^T; None for 1/sqrt(head_dim)."""
    query_gain: float | None = None
    """Factor on the initial size of the query projection; None for min(1, 1/(scale sqrt(head_dim))), which makes the
    first logits no larger under another scale (T5's 1). 1 leaves a scale its effect."""
    dropout: float = 0.0
    """Dropout on the attention weights."""
    kernel: Kernel = "auto"
    """Implementation; auto takes the best that this platform and these shapes support."""

    def __post_init__(self) -> None:
        kv = self.num_kv_heads or self.num_heads
        if self.num_heads % kv:
            divisors = [d for d in range(1, self.num_heads + 1) if self.num_heads % d == 0]
            raise ValueError(f"num_heads={self.num_heads} is not divisible by num_kv_heads={kv}; use one of {divisors}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} is not positive; 1 sees oneself only, None sees everything")
        if self.query_gain is not None and not 0 < self.query_gain < math.inf:
            raise ValueError(f"query_gain={self.query_gain} is not positive; 1 is plain, None follows the scale")
        check_rate("dropout", self.dropout)

    def resolved_head_dim(self, dim: int) -> int:
        """Width of a head in a model of width `dim`."""
        return head_width(dim, self.num_heads, self.head_dim)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "AttentionLayer":
        return AttentionLayer(self, dim, rngs=rngs, depth=depth)

    def under_mup(self, mup: MuP, dim: int) -> "Attention":
        head_dim = self.resolved_head_dim(dim)
        if head_dim == mup.base_head_dim:
            return self
        return dataclasses.replace(self, scale=mup.attention_scale(head_dim, self.scale))

    def new_cache(self, dim: int, room: Room) -> LayerCache:
        """Rolling where the layer has a window that is shorter than the sequence."""
        if self.window is not None and self.window + room.rewind < room.length:
            return RollingCache.empty(self.cache_shape(dim, room.batch_size, self.window + room.rewind), room.dtype)
        return KVCache.empty(self.cache_shape(dim, room.batch_size, room.length), room.dtype)

    def cache_shape(self, dim: int, batch_size: int, length: int) -> tuple[int, int, int, int]:
        """Shape of the keys of `length` tokens, in a model of width `dim`."""
        return batch_size, length, self.num_kv_heads or self.num_heads, self.resolved_head_dim(dim)

    def source_dim(self, dim: int) -> int:
        """Width of what keys and values are made of, in a model of width `dim`."""
        return dim

    def context_flops(self, dim: int, sequence_length: int) -> int:
        seen = sequence_length if self.window is None else min(self.window, sequence_length)
        return 4 * self.num_heads * self.resolved_head_dim(dim) * seen


@dataclass(frozen=True, kw_only=True)
class CrossAttention(Attention):
    """Attention whose keys and values come from an encoder's output (`context.memory`)."""

    memory_dim: int | None = None
    """Width of that output; None for the model's own."""

    def new_cache(self, dim: int, room: Room) -> LayerCache:
        return MemoryCache.empty(self.cache_shape(dim, room.batch_size, room.memory_length), room.dtype)

    def source_dim(self, dim: int) -> int:
        return self.memory_dim or dim

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "CrossAttentionLayer":
        return CrossAttentionLayer(self, dim, rngs=rngs, depth=depth)


def head_width(dim: int, num_heads: int, head_dim: int | None) -> int:
    """`head_dim`, or where it is None the width of one of `num_heads` equal parts of `dim`."""
    if head_dim is None and dim % num_heads:
        raise ValueError(
            f"embed_dim={dim} is not divisible by num_heads={num_heads}; "
            f"use {dim - dim % num_heads} or {dim + num_heads - dim % num_heads}, or set head_dim"
        )
    return head_dim or dim // num_heads


class AttentionLayer(nnx.Module):
    """See Attention."""

    def __init__(self, config: Attention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        head_dim = config.resolved_head_dim(dim)
        num_kv_heads = config.num_kv_heads or config.num_heads
        embed, source = (("embed", dim),), (("embed", config.source_dim(dim)),)
        heads = (("heads", config.num_heads), ("head_dim", head_dim))
        kv_heads = (("kv_heads", num_kv_heads), ("head_dim", head_dim))
        self.config = config
        self.scale = 1 / math.sqrt(head_dim) if config.scale is None else config.scale
        # A scale above 1/sqrt(H) (T5: 1) wants smaller queries at the start, for logits of the same size.
        same_size = min(1.0, 1 / (self.scale * math.sqrt(head_dim)))
        gain = same_size if config.query_gain is None else config.query_gain
        self.query = Dense(embed, heads, bias=config.bias, rngs=rngs, gain=gain)
        self.key = Dense(source, kv_heads, bias=config.bias, rngs=rngs)
        self.value = Dense(source, kv_heads, bias=config.bias, rngs=rngs)
        self.output = Dense(heads, embed, bias=config.output_bias, rngs=rngs, gain=1 / math.sqrt(2 * depth))
        self.norm_query = config.qk_norm.build(head_dim, rngs=rngs) if config.qk_norm else None
        self.norm_key = config.qk_norm.build(head_dim, rngs=rngs) if config.qk_norm else None
        position = config.position
        self.rotation = position.build(head_dim, rngs=rngs) if isinstance(position, QueryKeyPosition) else None
        self.relative: Any = position.build(config.num_heads, rngs=rngs) if isinstance(position, BiasPosition) else None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        q_BSNH, k_BTKH, v_BTKH = self.placed(x_BSD, context)
        query_index = key_index = None
        if cache is not None:
            query_index, key_index = context.position_ids, cache.key_positions(context.position_ids)
            cache, k_BTKH, v_BTKH = cache.update(k_BTKH, v_BTKH, context.position_ids)
        mask, bias = self.restrictions(context)
        return self.attend(q_BSNH, k_BTKH, v_BTKH, mask, key, bias, query_index, key_index), cache

    def weights(self, x_BSD: Float[Array, "B S D"], context: Context) -> Float[Array, "B N S T"]:
        """How much every query of every head takes of each key, float32: rows sum to one (zero where all is masked).
        To be looked at, by the reference kernel: O(S T) memory per head."""
        q_BSNH, k_BTKH, _ = self.placed(x_BSD, context)
        mask, bias = self.restrictions(context)
        scoring = Scoring(mask=mask, bias=bias, scale=self.scale, softcap=self.config.softcap)
        return attention_weights(q_BSNH, k_BTKH, scoring)

    def placed(
        self, x_BSD: Float[Array, "B S D"], context: Context
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values of x, turned to their positions where those are rotations."""
        q_BSNH, k_BTKH, v_BTKH = self.project(x_BSD, x_BSD)
        if self.rotation is not None:
            q_BSNH = self.rotation(q_BSNH, context.position_ids)
            k_BTKH = self.rotation(k_BTKH, context.position_ids)
        return q_BSNH, k_BTKH, v_BTKH

    def restrictions(self, context: Context) -> tuple[Mask, Bias | None]:
        """Which keys a query may see, and what is added to the logits."""
        mask = context.mask
        if self.config.window is not None:
            mask = mask & SlidingWindow(left=self.config.window - 1, right=self.config.window - 1)
        return mask, context.bias if self.relative is None else self.relative.bias()

    def project(
        self, x_BSD: Float[Array, "B S D"], source_BTM: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries of x, keys and values of the source, normalised per head where the config says so."""
        k_BTKH = shard(self.key(source_BTM), "batch", "sequence", "kv_heads", "head_dim")
        v_BTKH = shard(self.value(source_BTM), "batch", "sequence", "kv_heads", "head_dim")
        return self.queries(x_BSD), k_BTKH if self.norm_key is None else self.norm_key(k_BTKH), v_BTKH

    def queries(self, x_BSD: Float[Array, "B S D"]) -> Float[Array, "B S N H"]:
        """Queries of x, normalised per head where the config says so."""
        q_BSNH = shard(self.query(x_BSD), "batch", "sequence", "heads", "head_dim")
        return q_BSNH if self.norm_query is None else self.norm_query(q_BSNH)

    def attend(
        self,
        q_BSNH: Float[Array, "B S N H"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
        mask: Mask,
        key: jax.Array | None,
        bias: Bias | None = None,
        query_index: jax.Array | None = None,
        key_index: jax.Array | None = None,
    ) -> Float[Array, "B S D"]:
        """Attention over the given keys, projected back to the residual stream."""
        o_BSNH = attention(
            q_BSNH,
            k_BTKH,
            v_BTKH,
            mask=mask,
            bias=bias,
            scale=self.scale,
            softcap=self.config.softcap,
            dropout=self.config.dropout if key is not None else 0.0,
            key=key,
            kernel=self.config.kernel,
            query_index=query_index,
            key_index=key_index,
        )
        return self.output(shard(o_BSNH, "batch", "sequence", "heads", "head_dim"))


class CrossAttentionLayer(AttentionLayer):
    """See CrossAttention. With a MemoryCache, a call that is given the memory stores its keys and values; later ones
    read them there."""

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B S D"], Any]:
        mask = Full() if context.memory_mask is None else context.memory_mask
        if context.memory is not None:
            q_BSNH, k_BTKH, v_BTKH = self.project(x_BSD, context.memory)
            if cache is not None:
                cache = cache.filled(k_BTKH, v_BTKH)
                k_BTKH, v_BTKH = cache.read(x_BSD.dtype)
        elif cache is not None:
            q_BSNH, (k_BTKH, v_BTKH) = self.queries(x_BSD), cache.read(x_BSD.dtype)
        else:
            raise ValueError("cross-attention needs encoder states: pass them as context.memory")
        return self.attend(q_BSNH, k_BTKH, v_BTKH, mask, key), cache
