"""Reformer's attention (Kitaev et al. 2020, 2001.04451): among keys that locality-sensitive hashing brings together.

Softmax is ruled by the few largest logits, so a query needs the keys near it and no others. Queries and keys are the
same vectors here (shared-QK; keys are scaled to length 1), and vectors that point the same way fall, likely, into the
same bucket of a random rotation R (Andoni et al. 2015, 1509.02897):

    bucket(x) = argmax([xR; -xR])

        sequence   a0 b1 a2 c3 b4 a5 c6 b7                       (letter: bucket, number: place)
        sorted     a0 a2 | a5 b1 | b4 b7 | c3 c6                 by bucket, then by place; cut into chunks
        attend     each chunk to itself, `before` chunks back and `after` chunks on (around the end: to the other end)
        unsort     outputs return to their places

Several rounds of hashing, each with a rotation of its own, make a miss unlikely; a query's outputs o_r of the rounds
are joined by the weight exp(lse_r) that each saw:  o = sum_r exp(lse_r) o_r / sum_r exp(lse_r). A token attends to
itself only where there is nothing else: x.x would drown all else. All this is as in transformers' ReformerModel.

LocalAttention is the plain companion: chunks in their own order, separate queries and keys. A causal one decodes from
the keys and values of the last chunks. With hashing nothing can be kept: a new token moves the cuts.

    time      4 C (1 + before + after) H FLOPs a head, token and round, and H * buckets / 2 * 2 for hashing
    memory    O(rounds S C) weights
    trades    exactness (a far-off key that matters may sit in another bucket), and where a chunk is cut depends on all
              tokens of the row: documents cannot be packed, padding is seen by no one but shifts the cuts

Bucket numbers are integers: no gradient flows through them.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from llmlab.nn.attention import head_width
from llmlab.nn.cache import RollingCache
from llmlab.nn.config import Cache, Context, LayerCache, Mixer, Room
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate, dropout
from llmlab.nn.kernels import attention
from llmlab.nn.masks import Causal, Index, Mask, Visibility
from llmlab.sharding import shard

# Logits of what is hidden, and of oneself: transformers' numbers. A query that sees nothing else sees itself.
_HIDDEN, _ONESELF = -1e9, -1e5


@dataclass(frozen=True, kw_only=True)
class ChunkedAttention(Mixer):
    """What LSH and local attention share: heads, and which chunks see each other."""

    num_heads: int
    """Heads."""
    head_dim: int | None = None
    """Width of a head; None for embed_dim / num_heads."""
    chunk: int = 64
    """Tokens of a chunk. A sequence no longer than that is attended to whole, a longer one padded to whole chunks."""
    before: int = 1
    """Chunks before its own that a query sees."""
    after: int = 0
    """Chunks after its own that a query sees; 0 in a decoder."""
    dropout: float = 0.0
    """Dropout on the attention weights."""

    def __post_init__(self) -> None:
        if self.num_heads < 1 or self.chunk < 1:
            raise ValueError(f"num_heads={self.num_heads} and chunk={self.chunk} must be positive")
        if self.before < 0 or self.after < 0:
            raise ValueError(f"before={self.before} and after={self.after} must not be negative")
        check_rate("dropout", self.dropout)

    def window_flops(self, head_dim: int, sequence_length: int) -> int:
        """Forward FLOPs of a token's and head's scores and weighted sum."""
        whole = sequence_length <= self.chunk
        return 4 * head_dim * (sequence_length if whole else self.chunk * (1 + self.before + self.after))


@dataclass(frozen=True, kw_only=True)
class LocalAttention(ChunkedAttention):
    """Attention of each chunk to itself and its neighbours, the first and last being neighbours too."""

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "LocalLayer":
        return LocalLayer(self, dim, rngs=rngs, depth=depth)

    def new_cache(self, dim: int, room: Room) -> RollingCache:
        """Of the chunks that a token may see."""
        if self.before > 1 or self.after > 0:
            raise ValueError(
                f"LocalAttention(before={self.before}, after={self.after}) decodes no text: in a row of few chunks a "
                "token sees some of them twice or around the end, until there are more; use before=1 and after=0"
            )
        shape = (self.num_heads, head_width(dim, self.num_heads, self.head_dim))
        length = min((self.before + 1) * self.chunk + room.rewind, room.length)
        return RollingCache.empty((room.batch_size, length, *shape), room.dtype)

    def context_flops(self, dim: int, sequence_length: int) -> int:
        return self.num_heads * self.window_flops(head_width(dim, self.num_heads, self.head_dim), sequence_length)


@dataclass(frozen=True, kw_only=True)
class LSHAttention(ChunkedAttention):
    """Attention among keys that hashing brings together; queries and keys are one projection."""

    num_hashes: int = 1
    """Rounds of hashing; 4 to 8 come close to full attention (paper, figure 4)."""
    num_buckets: int | tuple[int, ...] | None = None
    """Buckets of a round, even; factors make a bucket of several smaller hashes, at the cost of their sum, not their
    product. None for about two buckets per chunk."""
    max_length: int = 4096
    """Longest sequence to be expected: with num_buckets=None it decides when buckets are made of two factors."""
    seed: int | None = 0
    """Of the rotations, unless `context.draws` holds them as "lsh_rotations" (num_heads, head_dim, rounds, half the
    sum of the factors). None draws them anew in every training step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_hashes < 1:
            raise ValueError(f"num_hashes={self.num_hashes} is not positive")
        odd = [n for n in _factors(self.num_buckets) if n < 2 or n % 2]
        if odd:
            raise ValueError(
                f"num_buckets={self.num_buckets} is odd in {odd}; a rotation gives buckets in opposite pairs"
            )

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "LSHLayer":
        return LSHLayer(self, dim, rngs=rngs, depth=depth)

    def new_cache(self, dim: int, room: Room) -> LayerCache:
        raise ValueError(
            "LSHAttention has no cache: it sorts all tokens of a row into chunks, so a new token changes which keys "
            "earlier ones met; decode with LocalAttention layers, or run the model on the whole row at every token"
        )

    def context_flops(self, dim: int, sequence_length: int) -> int:
        head_dim = head_width(dim, self.num_heads, self.head_dim)
        attending = self.window_flops(head_dim, sequence_length)
        if sequence_length <= self.chunk:
            return self.num_heads * attending
        return self.num_heads * self.num_hashes * (attending + head_dim * sum(self.buckets(sequence_length)))

    def buckets(self, sequence_length: int) -> tuple[int, ...]:
        """Factors of the number of buckets for a sequence; by transformers' rule where none are given."""
        if self.num_buckets is not None:
            return _factors(self.num_buckets)
        power = (2 * (sequence_length // self.chunk)).bit_length() - 1
        if 2**power > 2 * max(math.isqrt(self.max_length // self.chunk), self.chunk):
            return 2 ** (power // 2), 2 ** (power - power // 2)
        return (2**power,)


def _factors(num_buckets: int | tuple[int, ...] | None) -> tuple[int, ...]:
    if num_buckets is None:
        return ()
    return (num_buckets,) if isinstance(num_buckets, int) else num_buckets


@lru_cache(maxsize=32)
def rotations(seed: int, num_heads: int, head_dim: int, num_hashes: int, columns: int) -> Float[np.ndarray, "N H R C"]:
    """Normal numbers: the random directions of every head and round."""
    drawn = np.random.default_rng(seed).standard_normal((num_heads, head_dim, num_hashes, columns))
    return drawn.astype(np.float32)


class LocalLayer(nnx.Module):
    """See LocalAttention."""

    def __init__(self, config: LocalAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        head_dim = head_width(dim, config.num_heads, config.head_dim)
        embed, heads = (("embed", dim),), (("heads", config.num_heads), ("head_dim", head_dim))
        self.config = config
        self.query = Dense(embed, heads, bias=False, rngs=rngs)
        self.key = Dense(embed, heads, bias=False, rngs=rngs)
        self.value = Dense(embed, heads, bias=False, rngs=rngs)
        self.output = Dense(heads, embed, bias=False, rngs=rngs, gain=1 / math.sqrt(2 * depth))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        seen = _visibility(context.mask, "LocalAttention")
        if cache is not None:
            return self._from_cache(x_BSD, context, cache, seen)
        config, (batch, length, _) = self.config, x_BSD.shape
        q_BNSH, k_BNSH, v_BNSH = (_heads_first(p(x_BSD), config.chunk) for p in (self.query, self.key, self.value))
        padded = q_BNSH.shape[2]
        row = _Row(
            q=q_BNSH,
            k=k_BNSH / math.sqrt(k_BNSH.shape[-1]),
            v=v_BNSH,
            place=jnp.broadcast_to(jnp.arange(padded), (batch, 1, padded)),
            real=_real(seen, batch, length, padded),
        )
        o_BNSH, _ = _attend(row, config, causal=seen.causal, shared=False, key=key)
        return self.output(_heads_last(o_BNSH, length, x_BSD.dtype)), cache

    def _from_cache(
        self, x_BSD: Float[Array, "B S D"], context: Context, cache: Cache, seen: Visibility
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """The same for tokens at `context.position_ids`, from the keys and values of their chunks."""
        if not seen.causal or seen.real_BT is not None:
            raise ValueError("LocalAttention decodes in a causal model, and padding has position -1, not a mask")
        q_BSNH, k_BSNH, v_BSNH = (
            shard(p(x_BSD), "batch", "sequence", "heads", "head_dim") for p in (self.query, self.key, self.value)
        )
        key_index = cache.key_positions(context.position_ids)
        cache, k_BTNH, v_BTNH = cache.update(k_BSNH, v_BSNH, context.position_ids)
        o_BSNH = attention(
            q_BSNH,
            k_BTNH,
            v_BTNH,
            mask=Causal() & _Chunks(self.config.chunk, self.config.before),
            scale=1 / math.sqrt(q_BSNH.shape[-1]),
            query_index=context.position_ids,
            key_index=key_index,
        )
        return self.output(o_BSNH), cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Chunks(Mask):
    """A query sees its own chunk and `before` before it."""

    size: int = field(metadata={"static": True})
    before: int = field(metadata={"static": True})

    def allowed(self, query_index: Index, kv_index: Index) -> Bool[Array, "B S T"]:
        query, kv = (index if index.ndim == 2 else index[None] for index in (query_index, kv_index))
        return jnp.asarray(kv)[:, None, :] // self.size >= jnp.asarray(query)[:, :, None] // self.size - self.before


class LSHLayer(nnx.Module):
    """See LSHAttention."""

    def __init__(self, config: LSHAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        head_dim = head_width(dim, config.num_heads, config.head_dim)
        embed, heads = (("embed", dim),), (("heads", config.num_heads), ("head_dim", head_dim))
        self.config = config
        self.query_key = Dense(embed, heads, bias=False, rngs=rngs)
        self.value = Dense(embed, heads, bias=False, rngs=rngs)
        self.output = Dense(heads, embed, bias=False, rngs=rngs, gain=1 / math.sqrt(2 * depth))

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache | None]:
        if cache is not None:
            raise ValueError("LSHAttention has no cache; decode without one")
        seen = _visibility(context.mask, "LSHAttention")
        config, (batch, length, _) = self.config, x_BSD.shape
        x_BNSH, v_BNSH = (_heads_first(p(x_BSD), config.chunk) for p in (self.query_key, self.value))
        padded = x_BNSH.shape[2]
        real_BNS = _real(seen, batch, length, padded)
        if length <= config.chunk:
            place_BNS = jnp.broadcast_to(jnp.arange(padded), (batch, 1, padded))
            row = _Row(x_BNSH, _keys(x_BNSH), v_BNSH, place_BNS, real_BNS)
            o_BNSH, _ = _attend(row, config, causal=seen.causal, shared=True, key=key)
        else:
            factors = config.buckets(padded)
            bucket_BNRS = hashed(x_BNSH, self._rotations(context, factors, x_BNSH.shape[-1], key), factors)
            if real_BNS is not None:  # padding to the end, where it is in no one's way
                bucket_BNRS = jnp.where(real_BNS[:, :, None], bucket_BNRS, math.prod(factors))
            o_BNSH = _by_buckets(x_BNSH, v_BNSH, bucket_BNRS, real_BNS, config, causal=seen.causal, key=key)
        return self.output(_heads_last(o_BNSH, length, x_BSD.dtype)), cache

    def _rotations(
        self, context: Context, factors: tuple[int, ...], head_dim: int, key: jax.Array | None
    ) -> Float[Array, "N H R C"]:
        config, columns = self.config, sum(factors) // 2
        drawn = (context.draws or {}).get("lsh_rotations")
        if drawn is not None:
            return drawn
        if config.seed is None and key is not None:
            # A key of its own: dropout takes `key` itself.
            shape = (config.num_heads, head_dim, config.num_hashes, columns)
            return jax.random.normal(jax.random.fold_in(key, 0x15A), shape)
        return jnp.asarray(rotations(config.seed or 0, config.num_heads, head_dim, config.num_hashes, columns))


def hashed(
    x_BNSH: Float[Array, "B N S H"], rotations_NHRC: Float[Array, "N H R C"], factors: tuple[int, ...]
) -> Int[Array, "B N R S"]:
    """The bucket of every vector in every round: argmax([xR; -xR]) for each factor, in a mixed-radix number."""
    x_BNSH = jax.lax.stop_gradient(x_BNSH).astype(jnp.float32)
    turned_BNRSC = jnp.einsum("BNSH,NHRC->BNRSC", x_BNSH, rotations_NHRC.astype(jnp.float32))
    bucket_BNRS, column, unit = jnp.zeros(turned_BNRSC.shape[:-1], jnp.int32), 0, 1
    for factor in factors:
        part = turned_BNRSC[..., column : column + factor // 2]
        bucket_BNRS += unit * jnp.argmax(jnp.concatenate([part, -part], axis=-1), axis=-1).astype(jnp.int32)
        column, unit = column + factor // 2, unit * factor
    return bucket_BNRS


class _Row(NamedTuple):
    """Tokens in the order in which they are cut into chunks; for LSH all rounds one after the other (T = R S)."""

    q: Float[Array, "B N T H"]
    k: Float[Array, "B N T H"]
    v: Float[Array, "B N T H"]
    place: Int[Array, "B #N T"]
    """Where each token stands in the sequence."""
    real: Bool[Array, "B #N T"] | None
    """Which tokens are no padding; None for all."""


def _by_buckets(
    x_BNSH: jax.Array,
    v_BNSH: jax.Array,
    bucket_BNRS: jax.Array,
    real_BNS: jax.Array | None,
    config: LSHAttention,
    *,
    causal: bool,
    key: jax.Array | None,
) -> jax.Array:
    """Sort by bucket, attend in chunks, unsort, join the rounds."""
    order = jnp.argsort(bucket_BNRS, axis=-1, stable=True)
    back = jnp.argsort(order, axis=-1)
    batch, heads, rounds, length = order.shape

    def in_order(x_BNS: jax.Array) -> jax.Array:
        repeated = jnp.broadcast_to(x_BNS[:, :, None], (batch, heads, rounds, *x_BNS.shape[2:]))
        return _permuted(repeated, order, back).reshape(batch, heads, rounds * length, *x_BNS.shape[3:])

    x_BNTH = in_order(x_BNSH)
    row = _Row(
        q=x_BNTH,
        k=_keys(x_BNTH),
        v=in_order(v_BNSH),
        place=order.reshape(batch, heads, -1),
        real=None
        if real_BNS is None
        else jnp.take_along_axis(real_BNS[:, :, None], order, axis=3).reshape(batch, heads, -1),
    )
    o_BNTH, lse_BNT = _attend(row, config, causal=causal, shared=True, key=key)
    o_BNRSH = _permuted(o_BNTH.reshape(*order.shape, -1), back, order)
    lse_BNRS = _permuted(lse_BNT.reshape(order.shape), back, order)
    # exp of a difference, as transformers does it, and no softmax: where a token sees only itself, all are near -1e5,
    # where float32 steps by 0.008, and weights rounded in another way would differ by that much.
    weights_BNRS = jnp.exp(lse_BNRS - jax.nn.logsumexp(lse_BNRS, axis=2, keepdims=True))
    return jnp.sum(o_BNRSH * weights_BNRS[..., None], axis=2)


def _attend(
    row: _Row, config: ChunkedAttention, *, causal: bool, shared: bool, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Output (B, N, T, H) of every token in its chunk and the neighbours, and log-sum-exp (B, N, T) of its logits."""
    length = row.q.shape[2]
    chunk = min(config.chunk, length)
    shifts = range(config.before, -config.after - 1, -1) if length > chunk else (0,)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], length // chunk, chunk, *x.shape[3:])

    def around(x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.roll(cut(x), shift, axis=2) for shift in shifts], axis=3)

    logits = jnp.einsum("BNCSH,BNCTH->BNCST", cut(row.q), around(row.k), preferred_element_type=jnp.float32)
    query_place, key_place = cut(row.place)[..., :, None], around(row.place)[..., None, :]
    if row.real is not None:
        logits = jnp.where(around(row.real)[..., None, :], logits, _HIDDEN)
    if causal:
        logits = jnp.where(query_place >= key_place, logits, _HIDDEN)
    if shared:
        logits = jnp.where(query_place == key_place, _ONESELF, logits)
    lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    weights = dropout(jnp.exp(logits - lse), config.dropout, key)
    v = around(row.v)
    o = jnp.einsum("BNCST,BNCTH->BNCSH", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return o.reshape(*o.shape[:2], length, -1), lse.reshape(*lse.shape[:2], length)


def _keys(x: jax.Array) -> jax.Array:
    """Keys of shared-QK: x scaled to length 1, if for the epsilon."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) / math.sqrt(x.shape[-1])


@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, back: jax.Array) -> jax.Array:
    """x[..., order, :] along dimension 3. Its gradient is the inverse permutation, where autodiff would scatter."""
    return jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 4)), axis=3)


def _permuted_forward(x: jax.Array, order: jax.Array, back: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    return _permuted(x, order, back), (order, back)


def _permuted_backward(residuals: tuple[Any, ...], dy: jax.Array) -> tuple[jax.Array, None, None]:
    order, back = residuals
    return _permuted(dy, back, order), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def _visibility(mask: Mask, layer: str) -> Visibility:
    """The mask taken apart; ValueError for what chunks cannot do."""
    seen = Visibility.of(mask, layer)
    if seen.segments_BT is not None:
        raise ValueError(
            f"{layer} cuts a row into chunks wherever its documents begin, so a packed document would not be attended "
            "to as it is alone; give each document a row of its own, or do not tell them apart (no segment_ids; "
            "isolate=False in packed data)"
        )
    return seen


def _real(seen: Visibility, batch: int, length: int, padded: int) -> Bool[Array, "B 1 T"] | None:
    """Which slots hold tokens that are no padding, the row's or the layer's own; None for all."""
    if seen.real_BT is None and padded == length:
        return None
    real_BS = jnp.ones((batch, length), bool) if seen.real_BT is None else seen.real_BT
    return jnp.pad(real_BS, ((0, 0), (0, padded - length)))[:, None]


def _heads_first(x_BSNH: Float[Array, "B S N H"], chunk: int) -> Float[Array, "B N T H"]:
    """Heads in front, and a sequence longer than a chunk padded to whole ones."""
    length = x_BSNH.shape[1]
    missing = -length % chunk if length > chunk else 0
    x_BSNH = shard(x_BSNH, "batch", "sequence", "heads", "head_dim")
    return jnp.pad(x_BSNH, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)


def _heads_last(x_BNTH: Float[Array, "B N T H"], length: int, dtype: Any) -> Float[Array, "B S N H"]:
    """The inverse of `_heads_first`."""
    return shard(x_BNTH[:, :, :length].swapaxes(1, 2).astype(dtype), "batch", "sequence", "heads", "head_dim")
