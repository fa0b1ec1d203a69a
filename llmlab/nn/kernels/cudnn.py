"""cuDNN's flash attention on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

The fastest way on Ampere and later: one fused kernel forward, one backward, memory O(S + T) for causal attention and
sliding windows, which cuDNN knows. It knows nothing of segments, padding on the left or prefixes: those become an
explicit mask, an array (B, 1, S, T) in the dtype of q that is read as a bias. Still no matrix of weights, but a mask of
2 B S T bytes.
"""

from functools import reduce
from operator import and_
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.masks import Causal, Full, Mask, SlidingWindow


def cudnn(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B S N H"]:
    """As `reference`, on shapes for which `cudnn_lacks` finds nothing.

    Args:
        q_BSNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        scoring: how logits become weights.
        implementation: "xla" runs the same call without the GPU, for tests.
    """
    num_queries, num_keys = q_BSNH.shape[1], k_BTKH.shape[1]
    causal, window, rest = _native(scoring.mask, num_queries, num_keys)
    query, kv = np.arange(num_queries, dtype=np.int32), np.arange(num_keys, dtype=np.int32)
    explicit = None if isinstance(rest, Full) else rest.allowed(query, kv)[:, None]
    o_BSNH = jax.nn.dot_product_attention(
        q_BSNH,
        k_BTKH,
        v_BTKH,
        mask=explicit,
        scale=scoring.scale,
        is_causal=causal,
        local_window_size=None if window is None else (window, 0),
        implementation=implementation,
    )
    if explicit is None:
        return o_BSNH  # every query sees at least itself
    # A row of nothing but forbidden keys comes out as a mean over all of them.
    sees_some = scoring.mask.allowed(query, kv).any(-1)[:, :, None, None]
    return jnp.where(sees_some, o_BSNH, 0)


def cudnn_lacks(
    q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring, platform: str
) -> str | None:
    """Why cuDNN cannot compute this, or None."""
    head_dim, num_queries, num_keys = q_BSNH.shape[-1], q_BSNH.shape[1], k_BTKH.shape[1]
    if platform != "gpu":
        return f"it needs an NVIDIA GPU and this program is for {platform}"
    if q_BSNH.dtype not in (jnp.bfloat16, jnp.float16) or k_BTKH.dtype != q_BSNH.dtype:
        return f"it computes in bfloat16 or float16, not {q_BSNH.dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim={head_dim} is not a multiple of 8 up to 128"
    if scoring.dropout > 0.0:
        return "its dropout cannot be reproduced elsewhere"
    if scoring.softcap is not None:
        return "it has no soft cap"
    if scoring.bias is not None:
        return "it would round the bias to half precision"
    if scoring.indexed:
        return "queries or keys have an index of their own (cached decoding)"
    explicit = not isinstance(_native(scoring.mask, num_queries, num_keys)[2], Full)
    if explicit and (num_queries % 2 or num_keys % 2):
        return f"with an explicit mask it needs even lengths, not {num_queries} and {num_keys}"
    return None


def _native(mask: Mask, num_queries: int, num_keys: int) -> tuple[bool, int | None, Mask]:
    """Whether to ask for causality, for which left window, and what remains for an explicit mask."""
    causal = mask.find(Causal)
    if causal is None or num_queries != num_keys:
        return False, None, mask
    window = mask.find(SlidingWindow)  # its right side adds nothing to causality
    rest = [term for term in mask.terms if term is not causal and term is not window]
    return True, None if window is None else window.left, reduce(and_, rest, Full())
