"""Two-stream attention with relative positions (Yang et al. 2019, 1906.08237, sections 2.3 to 2.5; positions from
Transformer-XL, Dai et al. 2019, 1901.02860).

A permutation language model predicts token x_z(t) from those before it in a random order z. The state that predicts
must know its own place but not its own token; the state that others read must know both. So there are two:

    content  h_i = Attention(query from h_i, keys and values from h_j, j before i in the order or j = i)
    query    g_i = Attention(query from g_i, keys and values from h_j, j before i in the order)

with the same parameters; g begins as one learned vector. Both travel through the stack side by side, as rows
[h_1 ... h_S, g_1 ... g_P] of one sequence: every position-wise part (norm, feed-forward, the query projection) is one
matmul for both. Only the P positions that are predicted have a query state, P about S / 6.

The score of query i and key j has three parts, each with its own bias on the query:

    [(q_i + b_w) . k_j + (q_i + b_r) . W_r R(i - j) + (q_i + b_s) . s(i, j)] / sqrt(H)

by content, by distance (R is sinusoidal), and by whether i and j are of the same text segment (s is one vector for
yes, one for no). Nothing depends on absolute places, so a memory of the segments before can stand in front of the
keys: its hidden states, without gradient, at distances beyond the segment.

The distance term is a product with distances, shifted by one place from row to row. All queries together meet S + T of
them, but neighbours nearly the same T: so each quarter of the queries is multiplied with the T + S / 4 that it meets.
Content: 2 S D (3 T + S / 4) FLOPs a layer; the query stream, whose places are anywhere, 2 P D (3 T + S); memory O(S T)
per head, as the scores depend on query and distance and are formed whole.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.cache import KVCache
from llmlab.nn.config import Cache, Context, Memory, Mixer, Room
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate, dropout, split_key
from llmlab.nn.module import normal
from llmlab.sharding import shard

# Added to the scores of keys that a query may not see. Where it may see none it weighs all alike, as in the authors'
# code: finite, so that it stays defined.
_FORBIDDEN = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Stream:
    """One stream's queries: where they stand and what they may see of the T keys, memory first."""

    first_BQ: Int[Array, "B Q"] | None
    """Which of the encoded distances is each query's to the first key: S less its place in the segment. None for
    queries at every place, 0 to S - 1."""
    allowed_BQT: Bool[Array, "#B Q T"] | None
    """Whether a query may see a key; None for always."""
    other_BQT: Bool[Array, "B Q T"] | None
    """Whether query and key are of different text segments; None where there are no segments."""

    @property
    def num_queries(self) -> int:
        """Q of a stream whose places are given."""
        assert self.first_BQ is not None
        return self.first_BQ.shape[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TwoStreamContext(Context):
    """What the layers of one forward pass look at: its `mask` is in the streams."""

    distances_GRD: Float[Array, "G R D"]
    """Encoded distances T, T - 1, ...: to -S + 1 where queries look both ways, to 0 where they look back. G is 2 where
    the second half of the batch is read backwards, else 1."""
    content: Stream
    """The S content states, first in the layer's input."""
    query: Stream | None
    """The P query states behind them; None where nothing is predicted."""


@dataclass(frozen=True, kw_only=True)
class TwoStreamAttention(Mixer):
    """Relative attention over the content stream, for both streams."""

    num_heads: int
    """Heads."""
    head_dim: int | None = None
    """Width of a head; None for embed_dim / num_heads."""
    dropout: float = 0.0
    """Dropout on the attention weights and on the encoded distances."""

    def __post_init__(self) -> None:
        check_rate("dropout", self.dropout)

    def resolved_head_dim(self, dim: int) -> int:
        """Width of a head in a model of width `dim`."""
        if self.head_dim is None and dim % self.num_heads:
            raise ValueError(
                f"embed_dim={dim} is not divisible by num_heads={self.num_heads}; "
                f"use {dim - dim % self.num_heads} or {dim + self.num_heads - dim % self.num_heads}, or set head_dim"
            )
        return self.head_dim or dim // self.num_heads

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "TwoStreamLayer":
        return TwoStreamLayer(self, dim, rngs=rngs, depth=depth)

    def new_cache(self, dim: int, room: Room) -> KVCache:
        shape = (room.batch_size, room.length, self.num_heads, self.resolved_head_dim(dim))
        return KVCache.empty(shape, room.dtype)

    def context_flops(self, dim: int, sequence_length: int) -> int:
        total = self.content_flops(dim, sequence_length, sequence_length, 2 * sequence_length)
        return total // sequence_length

    def content_flops(self, dim: int, num_queries: int, num_keys: int, num_distances: int) -> int:
        """Forward FLOPs of a row's content stream: scores by content and by distance, the weighted sum of values."""
        blocks = distance_blocks(num_queries, num_keys, num_distances)
        products = sum((block.stop - block.start) * (met.stop - met.start) for block, met in blocks)
        return 2 * self.num_heads * self.resolved_head_dim(dim) * (num_queries * 2 * num_keys + products)

    def query_flops(self, dim: int, num_queries: int, num_keys: int, num_distances: int) -> int:
        """The same of a row's query stream."""
        return 2 * self.num_heads * self.resolved_head_dim(dim) * num_queries * (2 * num_keys + num_distances)


class TwoStreamLayer(nnx.Module):
    """See TwoStreamAttention."""

    def __init__(self, config: TwoStreamAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        head_dim = config.resolved_head_dim(dim)
        embed, heads = (("embed", dim),), (("heads", config.num_heads), ("head_dim", head_dim))

        def vector(*leading: int) -> nnx.Param:
            axes = ("segment_type",) * len(leading) + ("heads", "head_dim")
            shape = (*leading, config.num_heads, head_dim)
            return nnx.Param(0.02 * normal(rngs, shape), axes=axes)

        self.config = config
        self.scale = 1 / math.sqrt(head_dim)
        self.query = Dense(embed, heads, bias=False, rngs=rngs)
        self.key = Dense(embed, heads, bias=False, rngs=rngs)
        self.value = Dense(embed, heads, bias=False, rngs=rngs)
        self.distance = Dense(embed, heads, bias=False, rngs=rngs)
        self.output = Dense(heads, embed, bias=False, rngs=rngs, gain=1 / math.sqrt(2 * depth))
        self.content_bias, self.distance_bias, self.segment_bias = vector(), vector(), vector()
        self.segments = vector(2)

    def __call__(
        self,
        x_BXD: Float[Array, "B X D"],
        context: TwoStreamContext,
        key: jax.Array | None = None,
        cache: Memory | Cache | None = None,
    ) -> tuple[Float[Array, "B X D"], Memory | Cache | None]:
        """Both streams after attention.

        Given a memory, it returns this segment's content states, to become one. Given a cache of keys and values, it
        stores those of the content at `context.position_ids`; the streams say what is seen of its slots.
        """
        key_distance, key_content, key_query = split_key(key, 3)
        num_queries = 0 if context.query is None else context.query.num_queries
        h_BSD = x_BXD[:, : x_BXD.shape[1] - num_queries]
        seen_BTD = h_BSD
        if isinstance(cache, Memory):
            seen_BTD = jnp.concatenate([jax.lax.stop_gradient(cache.states).astype(h_BSD.dtype), h_BSD], axis=1)
        q_BXNH = shard(self.query(x_BXD), "batch", "sequence", "heads", "head_dim")
        k_BTNH = shard(self.key(seen_BTD), "batch", "sequence", "heads", "head_dim")
        v_BTNH = shard(self.value(seen_BTD), "batch", "sequence", "heads", "head_dim")
        if isinstance(cache, Memory):
            cache = Memory(states=h_BSD)
        elif cache is not None:
            cache, k_BTNH, v_BTNH = cache.update(k_BTNH, v_BTNH, context.position_ids)
        r_GRNH = self.distance(dropout(context.distances_GRD.astype(x_BXD.dtype), self.config.dropout, key_distance))
        num_content = h_BSD.shape[1]
        o_BXNH = self.attend(q_BXNH[:, :num_content], k_BTNH, v_BTNH, r_GRNH, context.content, key_content)
        if context.query is not None:
            g_BPNH = self.attend(q_BXNH[:, num_content:], k_BTNH, v_BTNH, r_GRNH, context.query, key_query)
            o_BXNH = jnp.concatenate([o_BXNH, g_BPNH], axis=1)
        y_BXD = self.output(shard(o_BXNH, "batch", "sequence", "heads", "head_dim"))
        return y_BXD, cache

    def attend(
        self,
        q_BQNH: Float[Array, "B Q N H"],
        k_BTNH: Float[Array, "B T N H"],
        v_BTNH: Float[Array, "B T N H"],
        r_GRNH: Float[Array, "G R N H"],
        stream: Stream,
        key: jax.Array | None,
    ) -> Float[Array, "B Q N H"]:
        """One stream's attention, heads not yet joined."""
        # Heads in front from here on: the product with the distances is then one matrix product a head for the whole
        # batch, and no array of scores is ever transposed.
        q_NBQH, k_NBTH, v_NBTH = (jnp.moveaxis(x, 2, 0) for x in (q_BQNH, k_BTNH, v_BTNH))
        q_NBQH = q_NBQH * jnp.asarray(self.scale, q_NBQH.dtype)  # smaller than the scores that it scales
        by_content, by_distance, by_segment = (
            q_NBQH + (bias[...] * self.scale).astype(q_NBQH.dtype)[:, None, None]
            for bias in (self.content_bias, self.distance_bias, self.segment_bias)
        )
        scores_NBQT = _product("NBQH,NBTH->NBQT", by_content, k_NBTH)
        scores_NBQT += _scores_by_distance(by_distance, jnp.moveaxis(r_GRNH, 2, 0), stream, k_BTNH.shape[1])
        if stream.other_BQT is not None:
            scores_NBQ2 = _product("NBQH,CNH->NBQC", by_segment, self.segments[...].astype(q_NBQH.dtype))
            scores_NBQT += jnp.where(stream.other_BQT, scores_NBQ2[..., 1:], scores_NBQ2[..., :1])
        if stream.allowed_BQT is not None:
            scores_NBQT += jnp.where(stream.allowed_BQT, 0.0, _FORBIDDEN)
        weights_NBQT = dropout(jax.nn.softmax(scores_NBQT, axis=-1), self.config.dropout, key).astype(v_BTNH.dtype)
        return jnp.moveaxis(jnp.einsum("NBQT,NBTH->NBQH", weights_NBQT, v_NBTH), 0, 2)


def _product(spec: str, first: jax.Array, second: jax.Array) -> jax.Array:
    return jnp.einsum(spec, first, second, preferred_element_type=jnp.float32)


def _scores_by_distance(
    q_NBQH: Float[Array, "N B Q H"], r_NGRH: Float[Array, "N G R H"], stream: Stream, num_keys: int
) -> Float[Array, "N B Q T"]:
    """q_i . r(i - j)."""
    if stream.first_BQ is not None:
        return cut(_products_with(q_NBQH, r_NGRH), stream.first_BQ, num_keys)
    scores = []
    for block, met in distance_blocks(q_NBQH.shape[2], num_keys, r_NGRH.shape[2]):
        products = _products_with(q_NBQH[:, :, block], r_NGRH[:, :, met])
        past = min(num_keys, products.shape[-1] - 1)  # where queries look back, keys behind a block meet no distance
        scores.append(jnp.pad(sheared(products, past), ((0, 0), (0, 0), (0, 0), (0, num_keys - past))))
    return jnp.concatenate(scores, axis=2)


def _products_with(q_NBQH: jax.Array, r_NGRH: jax.Array) -> Float[Array, "N B Q R"]:
    heads, batch, num_queries, _ = q_NBQH.shape
    groups, num_distances = r_NGRH.shape[1:3]
    q_NGXH = q_NBQH.reshape(heads, groups, batch // groups * num_queries, -1)
    return _product("NGXH,NGRH->NGXR", q_NGXH, r_NGRH).reshape(heads, batch, num_queries, num_distances)


def distance_blocks(num_queries: int, num_keys: int, num_distances: int) -> list[tuple[slice, slice]]:
    """Quarters of the S queries that stand at all places, each with those of the encoded distances that it meets.

    Query i meets T of them from S - i on, as far as there are so many.
    """
    size = -(-num_queries // 4)
    blocks = [(start, min(start + size, num_queries)) for start in range(0, num_queries, size)]
    return [
        (slice(start, end), slice(num_queries - end, min(num_queries - start + num_keys, num_distances)))
        for start, end in blocks
    ]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def sheared(x_NBSR: Float[Array, "N B S R"], width: int) -> Float[Array, "N B S T"]:
    """Entries S - i, S - i + 1, ... of row i, without a gather: in memory each row begins one place further left.

    Read as rows of R - 1 after the first S entries are dropped, entry j of row i is entry S + i (R - 1) + j of all,
    that is S - i + j of row i. Rows that end before `width` run into the next: their keys are in the future.
    """
    *batch, length, num = x_NBSR.shape
    return x_NBSR.reshape(*batch, num, length)[..., 1:, :].reshape(*batch, length, num - 1)[..., :width]


def _shear(x_NBSR: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    return sheared(x_NBSR, width), jnp.zeros((0, x_NBSR.shape[-1]), x_NBSR.dtype)


def _unshear(width: int, like: jax.Array, dy_NBST: jax.Array) -> tuple[jax.Array]:
    *batch, length, _ = dy_NBST.shape
    num, rows = like.shape[1], [(0, 0)] * len(batch)
    dy = jnp.pad(dy_NBST, [*rows, (0, 0), (0, num - 1 - width)]).reshape(*batch, length * (num - 1))
    # Apart the two pads are copies; XLA for CPU would make one loop of them that divides by num - 1 for every entry.
    dy = jax.lax.optimization_barrier(dy)
    return (jnp.pad(dy, [*rows, (length, 0)]).reshape(*batch, length, num),)


sheared.defvjp(_shear, _unshear)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def cut(x_NBQR: Float[Array, "N B Q R"], first_BQ: Int[Array, "B Q"], width: int) -> Float[Array, "N B Q T"]:
    """Entries first, first + 1, ..., first + width - 1 of every row. Its gradient is a gather too, not a scatter."""
    return _cut(x_NBQR, first_BQ, width)[0]


def _cut(x_NBQR: jax.Array, first_BQ: jax.Array, width: int) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    entries = first_BQ[None, ..., None] + jnp.arange(width)
    y_NBQT = jnp.take_along_axis(x_NBQR, entries, axis=-1, mode="clip")
    return y_NBQT, (first_BQ, jnp.zeros((0, x_NBQR.shape[-1]), x_NBQR.dtype))


def _uncut(width: int, residuals: tuple[jax.Array, jax.Array], dy_NBQT: jax.Array) -> tuple[jax.Array, None]:
    first_BQ, like = residuals
    entries = jnp.arange(like.shape[1]) - first_BQ[None, ..., None]
    taken = jnp.take_along_axis(dy_NBQT, entries, axis=-1, mode="clip")
    return jnp.where((entries >= 0) & (entries < width), taken, 0), None


cut.defvjp(_cut, _uncut)


def encoded_distances(
    num_keys: int, num_queries: int, dim: int, *, clamp: int | None = None, backwards: bool = False
) -> Float[np.ndarray, "R D"]:
    """Sinusoids of the distances num_keys, num_keys - 1, ... to 1 - num_queries (Vaswani et al. 2017, sines first).

    Args:
        num_keys: largest distance.
        num_queries: positions of the segment; 0 where no query looks ahead.
        dim: width.
        clamp: distances beyond it, either way, count as it.
        backwards: signs turned round, for text read from its end.
    """
    distances = np.arange(num_keys, -max(num_queries, 1), -1, dtype=np.float32)
    if clamp is not None:
        distances = np.clip(distances, -clamp, clamp)
    frequencies = 1 / np.power(np.float32(10000), np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    angles = (-distances if backwards else distances)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
