"""One call for attention, whichever kernel computes it."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.reference import reference
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.masks import Mask

Kernel = Literal["auto", "reference", "blockwise", "unrolled", "cudnn", "splash"]


def attention(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    *,
    mask: Mask,
    bias: Bias | None = None,
    scale: float,
    softcap: float | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    kernel: Kernel = "auto",
    query_index: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S N H"]:
    """softmax(softcap tanh(scale q k^T / softcap) + bias, masked) v.

    Args:
        q_BSNH: queries; N is a multiple of K, and query head n reads key/value head n // (N / K).
        k_BTKH: keys.
        v_BTKH: values.
        mask: which keys a query may see; a query that sees none gets zeros.
        bias: added to the logits.
        scale: factor on the products, usually 1 / sqrt(H).
        softcap: bound of the logits, before the bias.
        dropout: rate of dropout on the weights; 0 without a key.
        key: random key of the dropout.
        kernel: implementation; see `supports`.
        query_index: index of every query into the keys, for cached decoding; None where query i has index i.
    """
    seed = None if key is None or dropout == 0.0 else jax.random.bits(key, (2,), jnp.uint32)
    scoring = Scoring(
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        dropout=0.0 if seed is None else dropout,
        seed=seed,
        query_index=query_index,
    )
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r} is unknown; use one of {', '.join(get_args(Kernel))}")
    return reference(q_BSNH, k_BTKH, v_BTKH, scoring)
