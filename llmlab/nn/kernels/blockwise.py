"""Flash attention in plain jax (Dao et al. 2022, 2205.14135; online softmax: Milakov and Gimelshein 2018, 1805.02867).

Keys come in blocks. For each query only the running maximum m, the running sum l and the running output are kept:

    m' = max(m, max s)     l' = exp(m - m') l + sum exp(s - m')     o' = exp(m - m') o + exp(s - m') v

so no score matrix exists: memory is O(S + T) forward and backward, time O(S T) as ever. The backward pass keeps the
output and log(sum exp s) of each query and computes the weights again, block by block. Blocks that the mask's static
structure rules out (the future, beyond the window) are never visited.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from llmlab.nn.kernels.scores import MASKED, Bias, Scores, grouped, ungrouped

BLOCK = 512


def blockwise(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scores: Scores,
    *,
    block: int = BLOCK,
) -> Float[Array, "B S N H"]:
    """As `reference`. Query s must have index s: no cache."""
    assert scores.query_index is None
    length, kv_length = q_BSNH.shape[1], k_BTKH.shape[1]
    block = min(block, max(length, kv_length))
    q = _padded(grouped(q_BSNH, k_BTKH.shape[2]), 3, block)
    k, v = (_padded(x.swapaxes(1, 2), 2, block) for x in (k_BTKH, v_BTKH))
    scores = replace(scores, mask=scores.mask & _Before(kv_length))
    o = _attend(q, k, v, scores.bias, replace(scores, bias=None), block, length, kv_length)
    return ungrouped(o[:, :, :, :length])
