"""Attention for CPUs and short sequences: blocks of queries written out, each against just the keys it may see.

A causal block of 64 queries slices the keys up to its end, a windowed one those of its window: for causal attention
5/8 of the work of the whole matrix at length 256, towards 1/2 for longer. All shapes are static and every matmul has
its heads in front, the form that XLA's CPU runtime multiplies fastest; a loop over blocks or a (B, S, N, H) layout
costs it copies. Measured at batch 8, length 256, 6 heads of 64, float32, forward and backward: half the time of
`reference`.

The weights are kept for the backward pass, O(S T) memory per head as in `reference` though less of it, and the program
grows with S / 64. Long sequences belong to `blockwise`.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.heads import gathered, join_heads, products, split_heads, weighted
from llmlab.nn.kernels.scoring import FORBIDDEN, Scoring, row_max

BLOCK = 64


def unrolled(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
) -> Float[Array, "B S N H"]:
    """As `reference`, for queries whose index is their place (no cache)."""
    assert not scoring.indexed
    q_BKGSH = split_heads(q_BSNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return join_heads(_attend(q_BKGSH, k_BKTH, v_BKTH, scoring.bias, replace(scoring, bias=None)))


def _blocks(num_queries: int, num_keys: int, scoring: Scoring) -> list[tuple[slice, slice]]:
    """Queries of each block and the keys that they may see."""
    blocks = [(start, min(start + BLOCK, num_queries)) for start in range(0, num_queries, BLOCK)]
    return [(slice(*block), slice(*scoring.mask.kv_range(*block, num_keys))) for block in blocks]


def _indices(block: slice) -> np.ndarray:
    return np.arange(block.start, block.stop, dtype=np.int32)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scoring: Scoring) -> jax.Array:
    return _forward(q, k, v, bias, scoring)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scoring: Scoring
) -> tuple[jax.Array, tuple[Any, ...]]:
    scored = replace(scoring, bias=bias)
    outputs, kept = [], []
    for queries, keys in _blocks(q.shape[3], k.shape[2], scoring):
        index = _indices(queries), _indices(keys)
        q_block = q[:, :, :, queries]
        if keys.start == keys.stop:
            outputs.append(jnp.zeros(q_block.shape[:-1] + v.shape[3:], q.dtype))
            kept.append(None)
            continue
        allowed = scored.allowed(*index)
        logits = jnp.where(allowed, scored.logits(products(q_block, k[:, :, keys]), *index), FORBIDDEN)
        weights = jnp.exp(logits - row_max(logits))
        total = weights.sum(-1, keepdims=True)
        share = 1.0 / jnp.where(total == 0.0, 1.0, total)  # a query that sees no key gets zeros
        kept.append((weights.astype(v.dtype), share))
        if scored.dropout > 0.0:
            weights = weights * scored.kept(q.shape[3], weights.shape, *index)
        o_block = weighted(weights, v[:, :, keys])
        outputs.append((o_block * share.reshape(*o_block.shape[:-1], 1)).astype(q.dtype))
    o = jnp.concatenate(outputs, axis=3)
    return o, (q, k, v, bias, scoring, o, kept)


def _backward(residuals: tuple[Any, ...], do: jax.Array) -> tuple[Any, ...]:
    """With weights p and dropout's factor D: dv = (p D)^T do, dlogits = p (D (do v^T) - sum(do o)).

    p = exponential * share; the share is multiplied into do where that is the narrower array.
    """
    q, k, v, bias, scoring, o, kept = residuals
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1, keepdims=True)
    delta = delta.reshape(delta.shape[0], -1, *delta.shape[3:])
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dbias = jax.tree.map(jnp.zeros_like, bias)
    for (queries, keys), weights in zip(_blocks(q.shape[3], k.shape[2], scoring), kept, strict=True):
        q_block, do_block = q[:, :, :, queries], do[:, :, :, queries]
        if weights is None:
            dq.append(jnp.zeros_like(q_block))
            continue
        index = _indices(queries), _indices(keys)
        exponentials, share = weights
        exponentials = exponentials.astype(jnp.float32)
        dweights, seen = products(do_block, v[:, :, keys]), exponentials
        if scoring.dropout > 0.0:
            factor = scoring.kept(q.shape[3], dweights.shape, *index)
            dweights, seen = dweights * factor, seen * factor
        dlogits = exponentials * ((dweights - delta[:, :, queries]) * share)
        do_shared = (do_block * share.reshape(*do_block.shape[:-1], 1)).astype(do.dtype)

        def logits(products: jax.Array, bias: Bias | None, index: Any = index) -> jax.Array:
            return replace(scoring, bias=bias).logits(products, *index)

        # Without softcap nothing here needs the products, and XLA drops their computation.
        _, pull_back = jax.vjp(logits, products(q_block, k[:, :, keys]), bias)
        dproducts, dbias_block = pull_back(dlogits)
        dbias = jax.tree.map(jnp.add, dbias, dbias_block)
        dq.append(weighted(dproducts, k[:, :, keys]).astype(q.dtype))
        around = ((0, 0), (0, 0), (keys.start, k.shape[2] - keys.stop), (0, 0))
        dk += jnp.pad(gathered(dproducts, q_block), around)
        dv += jnp.pad(gathered(seen, do_shared), around)
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_attend.defvjp(_forward, _backward)
