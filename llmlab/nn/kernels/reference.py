"""Attention as the equation reads, with the whole matrix of weights in memory: what every other kernel must equal.

Time and memory O(S T) per head. Products, softmax and sums in float32; the weights are rounded to the dtype of the
values before they meet them, as everyone's kernels do.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from llmlab.nn.kernels.scoring import FORBIDDEN, Scoring, row_max


def reference(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
) -> Float[Array, "B S N H"]:
    """softmax(logits) v; query head n reads key/value head n // (N / K)."""
    batch, num_queries, _, _ = q_BSNH.shape
    _, num_keys, kv_heads, _ = k_BTKH.shape
    weights = attention_weights(q_BSNH, k_BTKH, scoring)
    if scoring.dropout > 0.0:
        kv, own = np.arange(num_keys, dtype=np.int32), np.arange(num_queries, dtype=np.int32)
        weights = weights * scoring.kept(num_queries, weights.shape, own, kv)

    weights_BKGST = weights.astype(v_BTKH.dtype).reshape(batch, kv_heads, -1, num_queries, num_keys)
    # In the order that the product has by itself, and then put right: asked for at once, XLA puts the values right.
    o_BKGSH = jnp.einsum("BKGST,BTKH->BKGSH", weights_BKGST, v_BTKH, preferred_element_type=jnp.float32)
    return o_BKGSH.transpose(0, 3, 1, 2, 4).reshape(q_BSNH.shape[:3] + v_BTKH.shape[3:]).astype(q_BSNH.dtype)


def attention_weights(
    q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring
) -> Float[Array, "B N S T"]:
    """softmax(logits) in float32, before dropout."""
    logits, _ = attention_logits(q_BSNH, k_BTKH, scoring)
    weights = jnp.exp(logits - jax.lax.stop_gradient(row_max(logits)))
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total == 0.0, 1.0, total)  # a query that sees no key gets zeros


def attention_logits(
    q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring
) -> tuple[Float[Array, "B N S T"], Bool[Array, "C 1 S T"]]:
    """The logits in float32, FORBIDDEN where a query must not see a key, and where it may; C is B, or 1 where all rows
    agree."""
    batch, num_queries, heads, _ = q_BSNH.shape
    _, num_keys, kv_heads, _ = k_BTKH.shape
    q_BSKGH = q_BSNH.reshape(batch, num_queries, kv_heads, heads // kv_heads, -1)
    products = jnp.einsum("BSKGH,BTKH->BKGST", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32)
    products_BNST = products.reshape(batch, heads, num_queries, num_keys)

    query, kv = scoring.query_index, scoring.key_index
    query = np.arange(num_queries, dtype=np.int32) if query is None else query
    kv = np.arange(num_keys, dtype=np.int32) if kv is None else kv
    allowed = scoring.allowed(query, kv)
    return jnp.where(allowed, scoring.logits(products_BNST, query, kv), FORBIDDEN), allowed
