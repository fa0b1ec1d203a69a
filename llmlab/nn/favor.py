"""FAVOR+: softmax attention in linear time by random features (Choromanski et al. 2020, 2009.14794), the Performer's.

Softmax attention weighs key k for query q by exp(q.k / sqrt(H)). With x = q / H^(1/4), y = k / H^(1/4) and w ~ N(0, I),

    exp(x.y) = E[ phi(x) phi(y) ],   phi_w(x) = exp(w.x - |x|^2 / 2)                                   (paper, lemma 1)

so the mean over M draws of w is an unbiased estimate of the weight, and it is a product of features of the query with
features of the key. Products associate: instead of (phi(Q) phi(K)^T) V with its S x S weights, phi(Q) (phi(K)^T V):

    o_i = phi(q_i) A / phi(q_i) b      A = sum_j phi(k_j) v_j^T  (M x H),   b = sum_j phi(k_j)  (M)

Features are positive, hence so are all weights and the denominator; the older trigonometric features, unbiased too, go
negative where attention is small, and training breaks down. The w of a head are orthogonal in groups of H with lengths
of independent normals, which lowers the variance at every M. The error falls as 1/sqrt(M).

    causal    A and b run over j <= i: prefix sums from chunk to chunk, weights (C x C) inside a chunk
    relu      phi_w(x) = relu(w.x) + epsilon: no estimate of softmax but a kernel of its own (generalised attention)

The exponentials are stabilised by factors that cancel in the quotient: features of a query are divided by
exp(max_w w.x), those of all keys by exp(c), c = max w.y over w and keys; then epsilon is added to both, so that no
weight is zero. Which keys c runs over only matters to epsilon; here it is those that the query may see, as if there
were no others. So a causal output is exactly the bidirectional one of the tokens up to it, and neither the future, nor
padding, nor another document in the row can be noticed.

    time      4 S M H multiply-adds a head (features of q and k, sums, outputs); causal: C (M + H) S more
    memory    O(S M), and M x H sums for every chunk: never S x S
    trades    exactness: the variance grows as exp(|x + y|^2), so sharp attention needs many features

A causal layer decodes from A and b alone: FavorState, M (H + 1) numbers a head, however long the text is.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.attention import head_width
from llmlab.nn.config import Context, Mixer, Room
from llmlab.nn.dense import Dense
from llmlab.nn.kernels.scoring import FORBIDDEN
from llmlab.nn.masks import Mask, Visibility
from llmlab.nn.positions import QueryKeyPosition
from llmlab.sharding import shard

Feature = Literal["softmax", "relu"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FavorState:
    """The sums over all tokens of a row so far, float32: sums of n terms want more bits than one of them."""

    sums_BNMV: Float[Array, "B N M V"]
    """Of phi(k) v^T / exp(top), where v has a one at its end."""
    flat_BNV: Float[Array, "B N V"]
    """Of v, for what is added to every feature."""
    top_BN: Float[Array, "B N"]
    """The greatest level of a key so far, max_w w.y; that of an empty row is FORBIDDEN."""

    @classmethod
    def empty(cls, batch_size: int, num_heads: int, num_features: int, head_dim: int) -> "FavorState":
        """No tokens yet."""
        shape = (batch_size, num_heads, num_features, head_dim + 1)
        zeros = jnp.zeros(shape), jnp.zeros((*shape[:2], head_dim + 1)), jnp.full(shape[:2], FORBIDDEN)
        return cls(*zeros).placed()

    def placed(self) -> "FavorState":
        """On a mesh: rows and heads are split as they are in attention."""
        return jax.tree.map(lambda x: shard(x, "batch", "heads", *[None] * (x.ndim - 2)), self)


_EPSILON: dict[str, float] = {"softmax": 1e-6, "relu": 1e-3}  # paper, appendix A


@dataclass(frozen=True, kw_only=True)
class FavorAttention(Mixer):
    """Self-attention by random features, linear in the length of the sequence."""

    num_heads: int
    """Heads."""
    head_dim: int | None = None
    """Width of a head; None for embed_dim / num_heads."""
    causal: bool = False
    """Whether a token sees only what came before: another algorithm at another cost. The model's mask must agree."""
    num_features: int = 256
    """Random features M of each head; of the order of H log H in theory (paper, theorem 4)."""
    feature: Feature = "softmax"
    """softmax estimates softmax attention; relu is a kernel of its own, often better when trained from scratch."""
    epsilon: float | None = None
    """Added to every feature; None for the paper's 1e-6 (softmax) and 1e-3 (relu)."""
    seed: int = 0
    """Of the random features, unless `context.draws` holds them as "favor_features" (num_heads, M, head_dim)."""
    position: QueryKeyPosition | None = None
    """Rotary(...), or None when positions are added to the embeddings."""
    bias: bool = False
    """Whether the query, key and value projections add a bias."""
    output_bias: bool = False
    """Whether the output projection adds a bias."""
    chunk: int = 128
    """Positions of a chunk of the prefix sums; changes speed and memory only."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_features", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        if self.epsilon is not None and self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon} is negative; 0 adds nothing to the features")

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "FavorLayer":
        return FavorLayer(self, dim, rngs=rngs, depth=depth)

    def new_cache(self, dim: int, room: Room) -> FavorState:
        if not self.causal:
            raise ValueError(
                "FavorAttention(causal=False) sums over the whole row, so it cannot decode; use causal=True"
            )
        if room.rewind:
            raise ValueError(
                f"rewind={room.rewind}: FavorAttention keeps sums, of which nothing can be taken back; keep the state "
                "from before and go on from there, with rewind=0"
            )
        head_dim = head_width(dim, self.num_heads, self.head_dim)
        return FavorState.empty(room.batch_size, self.num_heads, self.num_features, head_dim)

    def context_flops(self, dim: int, sequence_length: int) -> int:
        width = head_width(dim, self.num_heads, self.head_dim)
        summed = width + 1  # the values and a one, whose sum is the denominator
        weights = min(self.chunk, sequence_length) * (self.num_features + summed) if self.causal else 0
        return 2 * self.num_heads * (2 * self.num_features * (width + summed) + weights)


class FavorLayer(nnx.Module):
    """See FavorAttention."""

    def __init__(self, config: FavorAttention, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        head_dim = head_width(dim, config.num_heads, config.head_dim)
        embed = (("embed", dim),)
        heads = (("heads", config.num_heads), ("head_dim", head_dim))
        self.config = config
        self.epsilon = _EPSILON[config.feature] if config.epsilon is None else config.epsilon
        self.query = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.key = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.value = Dense(embed, heads, bias=config.bias, rngs=rngs)
        self.output = Dense(heads, embed, bias=config.output_bias, rngs=rngs, gain=1 / math.sqrt(2 * depth))
        self.rotation = config.position.build(head_dim, rngs=rngs) if config.position else None

    def __call__(
        self,
        x_BSD: Float[Array, "B S D"],
        context: Context,
        key: jax.Array | None = None,
        cache: FavorState | None = None,
    ) -> tuple[Float[Array, "B S D"], FavorState | None]:
        seen = self._visibility(context.mask)
        if cache is not None:
            seen = _of_new_tokens(seen, context)
        q_BSNH = shard(self.query(x_BSD), "batch", "sequence", "heads", "head_dim")
        k_BSNH = shard(self.key(x_BSD), "batch", "sequence", "heads", "head_dim")
        v_BSNH = shard(self.value(x_BSD), "batch", "sequence", "heads", "head_dim")
        if self.rotation is not None:
            q_BSNH = self.rotation(q_BSNH, context.position_ids)
            k_BSNH = self.rotation(k_BSNH, context.position_ids)
        draws = context.draws or {}
        config, head_dim = self.config, q_BSNH.shape[-1]
        w_NMH = draws.get("favor_features")
        if w_NMH is None:
            w_NMH = jnp.asarray(orthogonal_features(config.seed, config.num_heads, config.num_features, head_dim))
        kernel = {"feature": config.feature, "epsilon": self.epsilon, "chunk": config.chunk}
        if cache is None:
            o_BSNH = favor(q_BSNH, k_BSNH, v_BSNH, w_NMH, seen, **kernel)
        else:
            o_BSNH, cache = favor_from(cache, q_BSNH, k_BSNH, v_BSNH, w_NMH, seen, **kernel)
        return self.output(shard(o_BSNH, "batch", "sequence", "heads", "head_dim")), cache

    def _visibility(self, mask: Mask) -> Visibility:
        seen = Visibility.of(mask, "FavorAttention")
        if seen.causal != self.config.causal:
            raise ValueError(
                f"FavorAttention(causal={self.config.causal}) stands in a model whose mask is "
                f"{'causal' if seen.causal else 'bidirectional'}; give it causal={seen.causal}"
            )
        return seen


@lru_cache(maxsize=32)
def orthogonal_features(seed: int, num_heads: int, num_features: int, head_dim: int) -> Float[np.ndarray, "N M H"]:
    """w of every head: each N(0, I), orthogonal in groups of head_dim (paper, section 2.4)."""
    random = np.random.default_rng(seed)
    groups = -(-num_features // head_dim)
    normal = random.standard_normal((num_heads, groups, head_dim, head_dim))
    q, r = np.linalg.qr(normal)
    q = q * np.sign(np.diagonal(r, axis1=-2, axis2=-1))[..., None, :]  # uniform over rotations, as QR alone is not
    directions = q.swapaxes(-1, -2).reshape(num_heads, groups * head_dim, head_dim)[:, :num_features]
    lengths = np.linalg.norm(random.standard_normal((num_heads, num_features, head_dim)), axis=-1, keepdims=True)
    return (directions * lengths).astype(np.float32)


class Features(NamedTuple):
    """phi of queries or keys, with a factor of each position kept apart: phi = exp(level) * scaled."""

    scaled_BNSM: Float[Array, "B N S M"]
    """At most 1 for softmax."""
    level_BNS: Float[Array, "B N S"]
    """max_w w.x for softmax, 0 for relu."""


def features(
    x_BSNH: Float[Array, "B S N H"], w_NMH: Float[Array, "N M H"], feature: Feature, epsilon: float = 0.0
) -> Features:
    """phi(x / H^(1/4)) in float32; to the relu's, epsilon is added here."""
    x_BSNH = x_BSNH.astype(jnp.float32) * x_BSNH.shape[-1] ** -0.25
    projected_BNSM = jnp.einsum("BSNH,NMH->BNSM", x_BSNH, w_NMH)
    if feature == "relu":
        return Features(jax.nn.relu(projected_BNSM) + epsilon, jnp.zeros(projected_BNSM.shape[:-1]))
    level_BNS = projected_BNSM.max(axis=-1)
    half_BNS = 0.5 * jnp.sum(x_BSNH**2, axis=-1).swapaxes(1, 2)
    return Features(jnp.exp(projected_BNSM - (level_BNS + half_BNS)[..., None]), level_BNS)


def favor(
    q_BSNH: Float[Array, "B S N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    w_NMH: Float[Array, "N M H"],
    seen: Visibility,
    *,
    feature: Feature = "softmax",
    epsilon: float = 1e-6,
    chunk: int = 128,
) -> Float[Array, "B S N H"]:
    """Attention by features; a query that sees no key gets zeros. The documents of a row must each be contiguous.

    Args:
        q_BSNH: queries.
        k_BSNH: keys.
        v_BSNH: values.
        w_NMH: random features.
        seen: which keys a query may see.
        feature: which kernel.
        epsilon: added to features of queries and keys.
        chunk: positions per chunk of prefix sums.
    """
    floor, q_BNSM, k_BNSM, v_BNSV, level_BNS = _prepared(q_BSNH, k_BSNH, v_BSNH, w_NMH, seen, feature, epsilon)
    segments_BS = seen.segments_BT
    if segments_BS is None and not seen.causal:
        scale_BNS = jnp.exp(level_BNS - level_BNS.max(axis=-1, keepdims=True))
        sums_BNMV = jnp.einsum("BNSM,BNSV->BNMV", k_BNSM * scale_BNS[..., None] + floor, v_BNSV)
        o_BNSV = jnp.einsum("BNSM,BNMV->BNSV", q_BNSM, sums_BNMV)
    else:
        if segments_BS is None:
            segments_BS = jnp.zeros(q_BSNH.shape[:2], jnp.int32)
        top_BNS = _running_max(level_BNS, segments_BS, chunk)
        if not seen.causal:
            tail_BNS = _flip(_running_max(_flip(level_BNS), _flip(segments_BS, 1), chunk))
            top_BNS = jnp.maximum(top_BNS, tail_BNS)
        row = _Row(q_BNSM, k_BNSM, v_BNSV, level_BNS, top_BNS, segments_BS)
        o_BNSV, _ = _sums_before(row, floor, chunk, inclusive=True)
        if not seen.causal:
            row = _Row(*(_flip(x) for x in row[:-1]), segments=_flip(segments_BS, 1))
            o_BNSV += _flip(_sums_before(row, floor, chunk, inclusive=False)[0])
    return _quotient(o_BNSV, v_BSNH)


def favor_from(
    state: FavorState,
    q_BSNH: Float[Array, "B S N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    w_NMH: Float[Array, "N M H"],
    seen: Visibility,
    *,
    feature: Feature = "softmax",
    epsilon: float = 1e-6,
    chunk: int = 128,
) -> tuple[Float[Array, "B S N H"], FavorState]:
    """`favor`, causal, for tokens that follow those of a state; and the state with them in it."""
    floor, q_BNSM, k_BNSM, v_BNSV, level_BNS = _prepared(q_BSNH, k_BSNH, v_BSNH, w_NMH, seen, feature, epsilon)
    one_document_BS = jnp.zeros(q_BSNH.shape[:2], jnp.int32)
    top_BNS = jnp.maximum(_running_max(level_BNS, one_document_BS, chunk), state.top_BN[..., None])
    row = _Row(q_BNSM, k_BNSM, v_BNSV, level_BNS, top_BNS, one_document_BS)
    o_BNSV, state = _sums_before(row, floor, chunk, inclusive=True, before=state)
    return _quotient(o_BNSV, v_BSNH), state.placed()


def _prepared(
    q_BSNH: Float[Array, "B S N H"],
    k_BSNH: Float[Array, "B S N H"],
    v_BSNH: Float[Array, "B S N H"],
    w_NMH: Float[Array, "N M H"],
    seen: Visibility,
    feature: Feature,
    epsilon: float,
) -> tuple[float, jax.Array, jax.Array, jax.Array, jax.Array]:
    """What is added to scaled features of keys; features of queries and keys; values and a one; levels of keys."""
    floor = epsilon if feature == "softmax" else 0.0
    queries, keys = features(q_BSNH, w_NMH, feature, epsilon), features(k_BSNH, w_NMH, feature, epsilon)
    ones_BSN1 = jnp.ones((*v_BSNH.shape[:3], 1), jnp.float32)
    v_BNSV = jnp.concatenate([v_BSNH.astype(jnp.float32), ones_BSN1], axis=-1).swapaxes(1, 2)
    q_BNSM, (k_BNSM, level_BNS) = queries.scaled_BNSM + floor, keys
    if seen.real_BT is not None:
        real_BNS = seen.real_BT[:, None]
        k_BNSM, v_BNSV = k_BNSM * real_BNS[..., None], v_BNSV * real_BNS[..., None]
        level_BNS = jnp.where(real_BNS, level_BNS, FORBIDDEN)
    return floor, q_BNSM, k_BNSM, v_BNSV, level_BNS


def _quotient(o_BNSV: jax.Array, v_BSNH: jax.Array) -> jax.Array:
    """Weighted sums of values over the sum of weights; zeros where nothing is seen."""
    total_BNS1 = o_BNSV[..., -1:]
    o_BNSH = o_BNSV[..., :-1] / jnp.where(total_BNS1 == 0.0, 1.0, total_BNS1)
    return o_BNSH.swapaxes(1, 2).astype(v_BSNH.dtype)


def _of_new_tokens(seen: Visibility, context: Context) -> Visibility:
    """What the mask says of the tokens of a call that follow a state: padding is at position -1."""
    if seen.real_BT is not None or seen.segments_BT is not None:
        raise ValueError(
            "FavorAttention decodes from sums and has no slots for a mask to name; give no attention_mask or "
            "segment_ids, and padding the position -1"
        )
    return Visibility(causal=seen.causal, real_BT=context.position_ids >= 0, segments_BT=None)


class _Row(NamedTuple):
    """What sums over earlier positions are made of. Positions are dimension 2, of `segments` dimension 1."""

    q: jax.Array
    """(B, N, S, M): features of queries."""
    k: jax.Array
    """(B, N, S, M): features of keys are exp(level) k."""
    v: jax.Array
    """(B, N, S, V): values and a one, or zeros for padding."""
    level: jax.Array
    """(B, N, S)."""
    top: jax.Array
    """(B, N, S): the greatest level that the query at this position sees, at least that of all keys it is given."""
    segments: jax.Array
    """(B, S): the documents."""


def _sums_before(
    row: _Row, floor: float, chunk: int, *, inclusive: bool, before: FavorState | None = None
) -> tuple[jax.Array, FavorState]:
    """sum_j phi(q_i).(exp(level_j - top_i) k_j + floor) v_j over j < i (j <= i if inclusive) in i's document, of which
    `before` has the part before the row; and the sums over the document that is open at the row's end.

    From one chunk to the next go the sums over the document that is open at its end: of k v^T, scaled by the last
    position's top, and of v for the floor. The backward pass keeps these and computes a chunk again.
    """
    batch, heads, length, num_features = row.q.shape
    chunk = min(chunk, length)
    chunks = _Row(
        q=_chunked(row.q, 2, chunk, "constant"),
        k=_chunked(row.k, 2, chunk, "constant"),
        v=_chunked(row.v, 2, chunk, "constant"),
        level=_chunked(row.level, 2, chunk, "edge"),
        top=_chunked(row.top, 2, chunk, "edge"),
        segments=_chunked(row.segments, 1, chunk, "edge"),
    )
    place = np.arange(chunk)
    earlier_CC = place[:, None] >= place if inclusive else place[:, None] > place

    @jax.checkpoint
    def visit(carry: tuple[jax.Array, ...], c: _Row) -> tuple[tuple[jax.Array, ...], jax.Array]:
        sums, flat, open_top, open_segment = carry
        weigh = c.q.sum(-1, keepdims=True) * floor
        allowed = (earlier_CC & (c.segments[:, :, None] == c.segments[:, None]))[:, None]
        scale = jnp.exp(jnp.where(allowed, c.level[:, :, None] - c.top[..., None], FORBIDDEN))
        weights = jnp.einsum("BNSM,BNTM->BNST", c.q, c.k) * scale + jnp.where(allowed, weigh, 0.0)
        same = (c.segments == open_segment[:, None])[:, None]
        enter = jnp.exp(jnp.where(same, open_top[..., None] - c.top, FORBIDDEN))
        o = jnp.einsum("BNST,BNTV->BNSV", weights, c.v)
        o += jnp.einsum("BNSM,BNMV->BNSV", c.q * enter[..., None], sums)
        o += jnp.where(same[..., None], weigh, 0.0) * flat[:, :, None]
        last_top, last_segment = c.top[..., -1], c.segments[:, -1]
        stays = (last_segment == open_segment)[:, None]
        keep = jnp.exp(jnp.where(stays, open_top - last_top, FORBIDDEN))[..., None, None]
        open_ = (c.segments == last_segment[:, None])[:, None]
        leave = jnp.exp(jnp.where(open_, c.level - last_top[..., None], FORBIDDEN))
        sums = keep * sums + jnp.einsum("BNSM,BNSV->BNMV", c.k * leave[..., None], c.v)
        flat = jnp.where(stays[..., None], flat, 0.0) + jnp.sum(c.v * open_[..., None], axis=2)
        return (sums, flat, last_top, last_segment), o

    width = row.v.shape[-1]
    if before is None:
        zeros = jnp.zeros((batch, heads, num_features, width)), jnp.zeros((batch, heads, width))
        before = FavorState(*zeros, row.top[..., 0])
    start = (before.sums_BNMV, before.flat_BNV, before.top_BN, row.segments[:, 0])
    (sums, flat, top, _), o = jax.lax.scan(visit, start, chunks)
    o = jnp.moveaxis(o, 0, 2).reshape(batch, heads, -1, width)[:, :, :length]
    return o, FavorState(sums, flat, top)


def _chunked(x: jax.Array, axis: int, chunk: int, fill: Literal["constant", "edge"]) -> jax.Array:
    """The axis cut into chunks, which come first; the last chunk is filled with zeros or with its last element."""
    around = [(0, -x.shape[axis] % chunk if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, around, mode=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :]), axis, 0)


def _running_max(x_BNS: Float[Array, "B N S"], segments_BS: Int[Array, "B S"], chunk: int) -> Float[Array, "B N S"]:
    """The greatest x of a position's document up to it."""
    length = x_BNS.shape[-1]
    chunk = min(chunk, length)
    up_to_CC = np.tri(chunk, dtype=bool)

    def visit(carry: tuple[jax.Array, jax.Array], c: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        (top, open_segment), (x, segments) = carry, c
        allowed = up_to_CC & (segments[:, :, None] == segments[:, None])
        tops = jnp.max(jnp.where(allowed[:, None], x[:, :, None], FORBIDDEN), axis=-1)
        same = segments == open_segment[:, None]
        tops = jnp.maximum(tops, jnp.where(same[:, None], top[..., None], FORBIDDEN))
        return (tops[..., -1], segments[:, -1]), tops

    start = (jnp.full(x_BNS.shape[:2], FORBIDDEN), segments_BS[:, 0])
    chunks = (_chunked(x_BNS, 2, chunk, "edge"), _chunked(segments_BS, 1, chunk, "edge"))
    _, tops = jax.lax.scan(jax.checkpoint(visit), start, chunks)
    return jnp.moveaxis(tops, 0, 2).reshape(*x_BNS.shape[:2], -1)[..., :length]


def _flip(x: jax.Array, axis: int = 2) -> jax.Array:
    return jnp.flip(x, axis)
