"""Attention in blocks of queries that are written out, each against just the keys that its mask lets it see.

For causal attention that is half the score matrix. Every block is a plain batched matmul with static shapes, which
XLA on CPU runs at full speed, where a loop over blocks costs it a third. Weights are kept for the backward pass, so
memory is O(S T), halved. For sequences up to a few thousand positions.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llmlab.nn.kernels.scores import Bias, Scores, grouped, ungrouped

BLOCK = 64


def unrolled(
    q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], v_BTKH: Float[Array, "B T K H"], scores: Scores
) -> Float[Array, "B S N H"]:
    """As `reference`. Query s must have index s: no cache."""
    assert scores.query_index is None
    q_BKGSH = grouped(q_BSNH, k_BTKH.shape[2])
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return ungrouped(_attend(q_BKGSH, k_BKTH, v_BKTH, scores.bias, replace(scores, bias=None)))


def _blocks(length: int, kv_length: int, scores: Scores) -> list[tuple[slice, slice]]:
    """Queries of each block, and the keys that they may see."""
    ranges = [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]
    return [(slice(*queries), slice(*scores.mask.kv_range(*queries, kv_length))) for queries in ranges]


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scores: Scores) -> jax.Array:
    return _forward(q, k, v, bias, scores)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None, scores: Scores
) -> tuple[jax.Array, tuple[Any, ...]]:
    outputs, weights = [], []
    for number, (queries, keys) in enumerate(_blocks(q.shape[3], k.shape[2], scores)):
        logits, allowed = _logits(q[:, :, :, queries], k[:, :, keys], bias, scores, queries, keys)
        # Not jax.nn.softmax: a maximum over nothing (a block that sees no key) has no identity.
        top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
        exponentials = jnp.where(allowed, jnp.exp(logits - top), 0.0)
        total = jnp.sum(exponentials, axis=-1, keepdims=True)
        p = (exponentials / jnp.where(total > 0, total, 1.0)).astype(v.dtype)
        weights.append(p)
        outputs.append(jnp.einsum("BKGST,BKTH->BKGSH", _dropped(p, scores, number), v[:, :, keys]))
    return jnp.concatenate(outputs, axis=3), (q, k, v, bias, scores, weights)


def _backward(residuals: tuple[Any, ...], do: jax.Array) -> tuple[Any, ...]:
    """With p the weights and D dropout's factor: dv = (pD)^T do, dp = D (do v^T), ds = p (dp - sum(dp p)).

    What lies between q, k, bias and the logits is pulled back by jax.
    """
    q, k, v, bias, scores, weights = residuals
    dk, dv = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    dq, dbias = [], jax.tree.map(jnp.zeros_like, bias)
    for number, (queries, keys) in enumerate(_blocks(q.shape[3], k.shape[2], scores)):
        p, do_block = weights[number], do[:, :, :, queries]
        dv_block = jnp.einsum("BKGST,BKGSH->BKTH", _dropped(p, scores, number), do_block)
        dp = jnp.einsum("BKGSH,BKTH->BKGST", do_block, v[:, :, keys], preferred_element_type=jnp.float32)
        dp = _dropped(dp, scores, number)
        p32 = p.astype(jnp.float32)
        ds = p32 * (dp - jnp.sum(dp * p32, axis=-1, keepdims=True))

        def logits(q: jax.Array, k: jax.Array, bias: Any, at: tuple[slice, slice] = (queries, keys)) -> jax.Array:
            return _logits(q, k, bias, scores, *at)[0]

        _, pull_back = jax.vjp(logits, q[:, :, :, queries], k[:, :, keys], bias)
        dq_block, dk_block, dbias_block = pull_back(ds)
        dq.append(dq_block)
        dbias = jax.tree.map(jnp.add, dbias, dbias_block)
        rest = ((0, 0), (0, 0), (keys.start, k.shape[2] - keys.stop), (0, 0))
        dk, dv = dk + jnp.pad(dk_block, rest), dv + jnp.pad(dv_block, rest)
    return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None


_attend.defvjp(_forward, _backward)


def _logits(
    q: jax.Array, k: jax.Array, bias: Bias | None, scores: Scores, queries: slice, keys: slice
) -> tuple[jax.Array, jax.Array]:
    index = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
    return replace(scores, bias=bias).logits(q, k, *index)


def _dropped(p: jax.Array, scores: Scores, number: int) -> jax.Array:
    return p if scores.dropout_key is None else (p * scores.keep(number, p.shape)).astype(p.dtype)
