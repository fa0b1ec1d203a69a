"""Ring attention: a sequence longer than a device (Liu et al. 2023, 2310.01889).

Each of n devices holds its share of the queries, and of the keys and values at first. In every step it attends to the
keys that it has and passes them on; after n - 1 steps each query has met every key. What is kept of a query is what
`blockwise` keeps, the maximum of its logits, the sum of exponentials and the weighted sum of values, all in float32:

    step 0     q0.kv0   q1.kv1   q2.kv2   q3.kv3          each column is a device
    step 1     q0.kv3   q1.kv0   q2.kv1   q3.kv2          kv moves one device to the right
    step 2     q0.kv2   q1.kv3   q2.kv0   q3.kv1

The next keys travel while the present ones are computed with: on a fast network they cost no time when a share has
enough queries (about FLOPs per byte of the network, in tokens). The backward pass is a ring of its own, from the
queries' log-sum-exp as in flash attention: keys and values go around again, and the gradients that belong to them go
with them, one step behind, so that they too travel while a step computes.

Memory O(S / n) a device, forward and backward; time O(S^2 / n), half of it for causal attention (see ring_schedule.py,
which also says what happens to windows). Masks are small, (B, S) or less: every device has them whole, and evaluates
them and biases and dropout at the indices that its tokens have in the whole sequence.

Shapes here: M blocks of queries of a device, C of its keys; B rows, K key/value heads, G query heads of each, N = K G.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.heads import gathered, join_heads, products, split_heads, weighted
from llmlab.nn.kernels.ring_schedule import Cut, Ring, Schedule, best
from llmlab.nn.kernels.scoring import EMPTY, FORBIDDEN, Scoring, row_max
from llmlab.sharding import sequence


def ring(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    axes: tuple[str, ...],
    size: int,
    block: int = 512,
) -> Float[Array, "B S N H"]:
    """As `reference` on the whole sequence, from one device's contiguous share; runs inside a `shard_map`.

    Args:
        q_BSNH: queries of this device.
        k_BTKH: keys of this device; their number need not be that of the queries.
        v_BTKH: values.
        scoring: how logits become weights; its masks are those of the whole sequence.
        axes: mesh axes that split the sequence.
        size: devices along them.
        block: queries and keys per block, at most.
    """
    assert not scoring.indexed
    around = best(Ring(axes, size, False, size * q_BSNH.shape[1], size * k_BTKH.shape[1], block), scoring.mask)
    if around.zigzag:
        q_BSNH, k_BTKH, v_BTKH = (sequence.zigzag(x, axes, size) for x in (q_BSNH, k_BTKH, v_BTKH))
    q_MBKGSH = _blocks(split_heads(q_BSNH, k_BTKH.shape[2]), 3, around.num_chunks, around.query)
    k_CBKTH, v_CBKTH = (_blocks(x.swapaxes(1, 2), 2, around.num_chunks, around.kv) for x in (k_BTKH, v_BTKH))
    o_MBKGSH: jax.Array = _attend(around, q_MBKGSH, k_CBKTH, v_CBKTH, scoring.bias, replace(scoring, bias=None))
    o_BSNH = join_heads(_joined(o_MBKGSH, 3, around.num_chunks, around.query))
    return sequence.contiguous(o_BSNH, axes, size) if around.zigzag else o_BSNH


def _blocks(x: jax.Array, axis: int, num_chunks: int, cut: Cut) -> jax.Array:
    """x with its tokens in blocks, the block in front: one block is then one stretch of memory."""
    x = x.reshape(*x.shape[:axis], num_chunks, cut.chunk, *x.shape[axis + 1 :])
    missing = cut.num_blocks * cut.block - cut.chunk
    if missing:
        x = jnp.pad(x, [(0, missing if i == axis + 1 else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], num_chunks * cut.num_blocks, cut.block, *x.shape[axis + 2 :])
    return jnp.moveaxis(x, axis, 0)


def _joined(x: jax.Array, axis: int, num_chunks: int, cut: Cut) -> jax.Array:
    """The inverse of `_blocks`."""
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], num_chunks, cut.num_blocks * cut.block, *x.shape[axis + 2 :])
    x = jax.lax.slice_in_dim(x, 0, cut.chunk, axis=axis + 1)
    return x.reshape(*x.shape[:axis], num_chunks * cut.chunk, *x.shape[axis + 2 :])


class _Tile:
    """One pair of blocks: its place in the whole sequence, and its logits."""

    def __init__(self, around: Ring, scoring: Scoring, pair: tuple[jax.Array, ...], chunks: tuple[Any, Any]) -> None:
        self.ring, self.scoring = around, scoring
        self.i, self.j, real = pair
        self.query, _ = _places(around.query, chunks[0], self.i)
        self.kv, exists = _places(around.kv, chunks[1], self.j)
        self.exists = exists & real

    def logits(self, products_BNST: jax.Array, bias: Bias | None) -> jax.Array:
        """Logits, whatever the mask says."""
        return replace(self.scoring, bias=bias).logits(products_BNST, self.query, self.kv)

    def masked(self, logits_BNST: jax.Array) -> jax.Array:
        """Logits with FORBIDDEN where a query may not see a key, or there is none."""
        return jnp.where(self.scoring.allowed(self.query, self.kv) & self.exists, logits_BNST, FORBIDDEN)

    def dropped(self, weights_BNST: jax.Array) -> jax.Array:
        """Weights, or their gradient, times dropout's factor."""
        if self.scoring.dropout == 0.0:
            return weights_BNST
        return weights_BNST * self.scoring.kept(self.ring.num_queries, weights_BNST.shape, self.query, self.kv)


def _places(cut: Cut, chunks: jax.Array, block: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Indices of a block's tokens into the whole sequence, and whether there is such a token."""
    inside = block % cut.num_blocks * cut.block + jnp.arange(cut.block, dtype=jnp.int32)
    return chunks[block // cut.num_blocks] * cut.chunk + inside, inside < cut.chunk


def _travel(
    around: Ring, schedule: Schedule, visit: Callable[[Any, Any, Any, int, bool], Any], state: Any, moving: Any
) -> Any:
    """The state after every step: state = visit(state, moving, step, pairs of the step, whether it is the first).

    `moving` is passed on while a step computes. Steps of as many pairs are one loop: causal attention compiles to
    three, the first, those between and the last, which passes nothing on.
    """

    def passing(state: Any, moving: Any, step: Any, length: int, first: bool) -> tuple[Any, Any]:
        arriving = jax.tree.map(lambda x: sequence.passed_on(x, around.axes, around.size), moving)
        return visit(state, moving, step, length, first), arriving

    lengths = schedule.lengths
    last = len(lengths) - 1
    if last == 0:
        return visit(state, moving, 0, lengths[0], True)
    state, moving = passing(state, moving, 0, lengths[0], True)
    for length, same in groupby(range(1, last), key=lambda step: lengths[step]):
        steps = list(same)

        def body(carry: tuple[Any, Any], step: jax.Array, length: int = length) -> tuple[tuple[Any, Any], None]:
            return passing(*carry, step, length, False), None

        (state, moving), _ = jax.lax.scan(body, (state, moving), jnp.asarray(steps, jnp.int32))
    return visit(state, moving, last, lengths[last], False)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(around: Ring, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scoring: Scoring) -> jax.Array:
    return _forward(around, q, k, v, bias, scoring)[0]


def _forward(
    around: Ring, q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scoring: Scoring
) -> tuple[jax.Array, tuple[Any, ...]]:
    schedule = Schedule(around, scoring.mask)
    own = jnp.asarray(schedule.chunks)[sequence.number(around.axes)]

    def visit(state: Any, moving: Any, step: Any, length: int, first: bool) -> Any:
        *pairs, theirs = schedule.pairs(step, length)
        k, v = moving

        def absorb(state: tuple[jax.Array, ...], pair: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], None]:
            tile = _Tile(around, scoring, pair, (own, theirs))
            m, mass, total = (x[tile.i] for x in state)
            logits = tile.masked(tile.logits(products(q[tile.i], k[tile.j]), bias))
            m_new = jnp.maximum(m, row_max(logits)[..., 0])
            weights = jnp.exp(logits - m_new[..., None])
            decay = jnp.exp(m - m_new)
            gain = weighted(tile.dropped(weights), v[tile.j])
            new = m_new, decay * mass + weights.sum(-1), decay.reshape(*gain.shape[:-1], 1) * total + gain
            return tuple(x.at[tile.i].set(block) for x, block in zip(state, new, strict=True)), None

        return jax.lax.scan(absorb, state, tuple(pairs))[0]

    num, batch, kv_heads, group, length, _ = q.shape
    rows = (num, batch, kv_heads * group, length)
    start = (
        jnp.full(rows, EMPTY, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*q.shape[:-1], v.shape[-1]), jnp.float32),
    )
    m, mass, total = _travel(around, schedule, visit, start, (k, v))
    some = jnp.where(mass == 0.0, 1.0, mass)  # a query that sees no key gets zeros
    o = (total / some.reshape(*q.shape[:-1], 1)).astype(q.dtype)
    return o, (q, k, v, bias, scoring, o, m + jnp.log(some))


def _backward(around: Ring, residuals: tuple[Any, ...], do: jax.Array) -> tuple[Any, ...]:
    """With weights p and dropout's factor D: dv = (p D)^T do, dlogits = p (D (do v^T) - sum(do o))."""
    q, k, v, bias, scoring, o, lse = residuals
    schedule = Schedule(around, scoring.mask)
    own = jnp.asarray(schedule.chunks)[sequence.number(around.axes)]
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1).reshape(lse.shape)

    def visit(state: Any, moving: Any, step: Any, length: int, first: bool) -> Any:
        *pairs, theirs = schedule.pairs(step, length)
        k, v = moving

        def add(sums: Any, pair: tuple[jax.Array, ...]) -> tuple[Any, None]:
            tile = _Tile(around, scoring, pair, (own, theirs))
            dq, dbias, (dk, dv) = sums
            q_block, do_block, k_block, v_block = q[tile.i], do[tile.i], k[tile.j], v[tile.j]
            logits, pull_back = jax.vjp(tile.logits, products(q_block, k_block), bias)
            weights = jnp.exp(tile.masked(logits) - lse[tile.i][..., None])
            dweights = tile.dropped(products(do_block, v_block))
            dproducts, dbias_tile = pull_back(weights * (dweights - delta[tile.i][..., None]))
            dq = dq.at[tile.i].add(weighted(dproducts, k_block))
            dk = dk.at[tile.j].add(gathered(dproducts, q_block))
            dv = dv.at[tile.j].add(gathered(tile.dropped(weights), do_block))
            return (dq, jax.tree.map(jnp.add, dbias, dbias_tile), (dk, dv)), None

        dq, dbias, before = state
        here = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), moving)
        (dq, dbias, here), _ = jax.lax.scan(add, (dq, dbias, here), tuple(pairs))
        if not first:  # what the devices before have summed arrives while this one computes
            arrived = jax.tree.map(lambda x: sequence.passed_on(x, around.axes, around.size), before)
            here = jax.tree.map(jnp.add, arrived, here)
        return dq, dbias, here

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    start = (zeros[0], jax.tree.map(jnp.zeros_like, bias), tuple(zeros[1:]))
    dq, dbias, summed = _travel(around, schedule, visit, start, (k, v))
    away = len(schedule.lengths) - 1
    if away:
        summed = jax.tree.map(lambda x: sequence.passed_on(x, around.axes, around.size, -away), summed)
    dk, dv = summed
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_attend.defvjp(_forward, _backward)
