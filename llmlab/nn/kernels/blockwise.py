"""Flash attention in plain JAX (Dao et al. 2022, 2205.14135; online softmax: Milakov and Gimelshein 2018, 1805.02867).

The matrix of weights never exists. Keys and values arrive in blocks; for each query only the maximum m of its logits so
far, the sum l of exp(logit - m) and the sum o of exp(logit - m) v are held, and corrected when the maximum grows:

    m' = max(m, max s)     l' = exp(m - m') l + sum exp(s - m')     o' = exp(m - m') o + exp(s - m') v

Time O(S T), memory O(S + T): the backward pass keeps the output and log-sum-exp of each query, nothing else, and
computes the weights of every block again, one more matmul in seven.

The loop runs over the pairs (block of queries, block of keys) that the mask's static structure leaves: about half of
all for causal attention, a band for a sliding window. One loop over a static list of pairs and not two nested ones:
its trip count is known, so that costs can be counted, and no pair is visited in vain.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.heads import gathered, join_heads, products, split_heads, weighted
from llmlab.nn.kernels.scoring import EMPTY, FORBIDDEN, Scoring, row_max


class Blocks(NamedTuple):
    """Sizes known when tracing."""

    query: int
    """Queries per block."""
    kv: int
    """Keys per block."""
    num_queries: int
    """Length of the sequence of queries, before padding to whole blocks."""
    num_keys: int
    """Length of the sequence of keys, before padding."""


def blockwise(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    block: int = 512,
) -> Float[Array, "B S N H"]:
    """As `reference`.

    Args:
        q_BSNH: queries; any length, padded to whole blocks here.
        k_BTKH: keys.
        v_BTKH: values.
        scoring: how logits become weights.
        block: queries and keys per block.
    """
    num_queries, num_keys = q_BSNH.shape[1], k_BTKH.shape[1]
    blocks = Blocks(min(block, num_queries), min(block, num_keys), num_queries, num_keys)
    q_BKGSH = _padded(split_heads(q_BSNH, k_BTKH.shape[2]), 3, blocks.query)
    k_BKTH, v_BKTH = (_padded(x.swapaxes(1, 2), 2, blocks.kv) for x in (k_BTKH, v_BTKH))
    if scoring.query_index is not None:
        scoring = replace(scoring, query_index=_padded(scoring.query_index, 1, blocks.query))
    if scoring.key_index is not None:
        scoring = replace(scoring, key_index=_padded(scoring.key_index, 1, blocks.kv))
    o_BKGSH: jax.Array = _attend(blocks, q_BKGSH, k_BKTH, v_BKTH, scoring.bias, replace(scoring, bias=None))
    return join_heads(o_BKGSH[:, :, :, :num_queries])


def _padded(x: jax.Array, axis: int, block: int) -> jax.Array:
    missing = -x.shape[axis] % block
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def pairs(blocks: Blocks, scoring: Scoring) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block of queries, block of keys, and whether it is the first of its queries, for every pair to visit."""
    pairs = []
    for i in range(-(-blocks.num_queries // blocks.query)):
        start, stop = 0, blocks.num_keys
        if scoring.query_index is None and scoring.key_index is None:
            last = min((i + 1) * blocks.query, blocks.num_queries)
            start, stop = scoring.mask.kv_range(i * blocks.query, last, blocks.num_keys)
        if start < stop:
            first = start // blocks.kv
            pairs += [(i, j, j == first) for j in range(first, -(-stop // blocks.kv))]
    columns = np.array(pairs, np.int32).reshape(-1, 3)
    return jnp.asarray(columns[:, 0]), jnp.asarray(columns[:, 1]), jnp.asarray(columns[:, 2].astype(bool))


class _Tile:
    """One pair of blocks: its place and its logits."""

    def __init__(self, blocks: Blocks, scoring: Scoring, i: jax.Array, j: jax.Array) -> None:
        self.blocks, self.scoring, self.i, self.j = blocks, scoring, i, j
        self.place = i * blocks.query + jnp.arange(blocks.query, dtype=jnp.int32)
        self.kv_place = j * blocks.kv + jnp.arange(blocks.kv, dtype=jnp.int32)
        self.query = self.place if scoring.query_index is None else self.queries(scoring.query_index, 1)
        self.kv = self.kv_place if scoring.key_index is None else self.keys(scoring.key_index, 1)

    def queries(self, x: jax.Array, axis: int) -> jax.Array:
        """The block of x at these queries."""
        return jax.lax.dynamic_slice_in_dim(x, self.i * self.blocks.query, self.blocks.query, axis)

    def keys(self, x: jax.Array, axis: int) -> jax.Array:
        """The block of x at these keys."""
        return jax.lax.dynamic_slice_in_dim(x, self.j * self.blocks.kv, self.blocks.kv, axis)

    def put_queries(self, x: jax.Array, block: jax.Array, axis: int) -> jax.Array:
        """x with the block at these queries replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), self.i * self.blocks.query, axis)

    def put_keys(self, x: jax.Array, block: jax.Array, axis: int) -> jax.Array:
        """x with the block at these keys replaced."""
        return jax.lax.dynamic_update_slice_in_dim(x, block.astype(x.dtype), self.j * self.blocks.kv, axis)

    def logits(self, products_BNST: jax.Array, bias: Bias | None) -> jax.Array:
        """Logits, whatever the mask says."""
        return replace(self.scoring, bias=bias).logits(products_BNST, self.query, self.kv)

    def allowed(self) -> jax.Array:
        """Where a query may see a key that exists."""
        return self.scoring.allowed(self.query, self.kv) & (self.kv_place < self.blocks.num_keys)

    def dropped(self, weights: jax.Array) -> jax.Array:
        """Weights, or their gradient, times dropout's factor."""
        if self.scoring.dropout == 0.0:
            return weights
        return weights * self.scoring.kept(self.blocks.num_queries, weights.shape, self.place, self.kv_place)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scoring: Scoring) -> jax.Array:
    return _forward(blocks, q, k, v, bias, scoring)[0]


def _forward(
    blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scoring: Scoring
) -> tuple[jax.Array, tuple[Any, ...]]:
    batch, kv_heads, group, length, _ = q.shape
    heads, dim = kv_heads * group, v.shape[-1]

    def visit(carry: tuple[jax.Array, ...], pair: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
        o, lse, m, mass, total = carry
        i, j, first = pair
        tile = _Tile(blocks, scoring, i, j)
        m, mass, total = jnp.where(first, EMPTY, m), jnp.where(first, 0.0, mass), jnp.where(first, 0.0, total)
        logits = jnp.where(tile.allowed(), tile.logits(products(tile.queries(q, 3), tile.keys(k, 2)), bias), FORBIDDEN)
        m_new = jnp.maximum(m, row_max(logits)[..., 0])
        weights = jnp.exp(logits - m_new[..., None])
        decay = jnp.exp(m - m_new)
        mass = decay * mass + weights.sum(-1)
        step = weighted(tile.dropped(weights), tile.keys(v, 2))
        total = decay.reshape(*step.shape[:-1], 1) * total + step
        # Written after every pair, of which the last counts: cheaper than a branch.
        some = jnp.where(mass == 0.0, 1.0, mass)  # a query that sees no key gets zeros
        o = tile.put_queries(o, total / some.reshape(*total.shape[:-1], 1), 3)
        lse = tile.put_queries(lse, m_new + jnp.log(some), 2)
        return (o, lse, m_new, mass, total), None

    start = (
        jnp.zeros((batch, kv_heads, group, length, dim), q.dtype),
        jnp.zeros((batch, heads, length), jnp.float32),
        jnp.zeros((batch, heads, blocks.query), jnp.float32),
        jnp.zeros((batch, heads, blocks.query), jnp.float32),
        jnp.zeros((batch, kv_heads, group, blocks.query, dim), jnp.float32),
    )
    (o, lse, *_), _ = jax.lax.scan(visit, start, pairs(blocks, scoring))
    return o, (q, k, v, bias, scoring, o, lse)


def _backward(blocks: Blocks, residuals: tuple[Any, ...], do: jax.Array) -> tuple[Any, ...]:
    """With weights p and dropout's factor D: dv = (p D)^T do, dlogits = p (D (do v^T) - sum(do o))."""
    q, k, v, bias, scoring, o, lse = residuals
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1).reshape(lse.shape)

    def visit(carry: tuple[Any, ...], pair: tuple[jax.Array, ...]) -> tuple[tuple[Any, ...], None]:
        dq, dk, dv, dbias = carry
        tile = _Tile(blocks, scoring, *pair)
        q_block, k_block, v_block = tile.queries(q, 3), tile.keys(k, 2), tile.keys(v, 2)
        do_block = tile.queries(do, 3)
        logits, pull_back = jax.vjp(tile.logits, products(q_block, k_block), bias)
        weights = jnp.exp(jnp.where(tile.allowed(), logits, FORBIDDEN) - tile.queries(lse, 2)[..., None])
        dweights = tile.dropped(products(do_block, v_block))
        dproducts, dbias_block = pull_back(weights * (dweights - tile.queries(delta, 2)[..., None]))
        dq = tile.put_queries(dq, tile.queries(dq, 3) + weighted(dproducts, k_block), 3)
        dk = tile.put_keys(dk, tile.keys(dk, 2) + gathered(dproducts, q_block), 2)
        dv = tile.put_keys(dv, tile.keys(dv, 2) + gathered(tile.dropped(weights), do_block), 2)
        return (dq, dk, dv, jax.tree.map(jnp.add, dbias, dbias_block)), None

    start = (*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)), jax.tree.map(jnp.zeros_like, bias))
    i, j, _ = pairs(blocks, scoring)
    (dq, dk, dv, dbias), _ = jax.lax.scan(visit, start, (i, j))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_attend.defvjp(_forward, _backward)
