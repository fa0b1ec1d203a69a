"""One call for attention, whichever kernel computes it.

    kernel       for                                                         memory per head
    reference    the equation, for tests and small shapes                    O(S T)
    blockwise    flash attention in plain JAX: any platform, mask and bias   O(S + T)
    unrolled     CPUs, short sequences                                       O(S T), halved when causal
    cudnn        NVIDIA GPUs in half precision                               O(S + T), plus O(S T) for dynamic masks
    splash       TPUs                                                        O(S + T)
    relative     TPUs, biases of distance (T5, ALiBi in encoders)            O(S + T)

`auto` decides while tracing, from the platform (see llmlab.nn.platform), the shapes and what the kernels support.

Where the mesh splits the sequence, devices exchange keys or heads (see context.py): with all_to_all, each then runs
one of these kernels on whole sequences; in a ring, `auto` is a kernel of its own. A kernel that is asked for by name
under a ring, cached decoding and lengths that do not divide are partitioned by XLA, which gathers keys and values.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llmlab.nn.kernels.bias import Bias
from llmlab.nn.kernels.blockwise import blockwise
from llmlab.nn.kernels.context import by_all_to_all, by_ring, split
from llmlab.nn.kernels.cudnn import cudnn, cudnn_lacks
from llmlab.nn.kernels.reference import reference
from llmlab.nn.kernels.relative import relative, relative_lacks
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.kernels.splash import splash, splash_lacks
from llmlab.nn.kernels.tiles import LANES
from llmlab.nn.kernels.unrolled import unrolled
from llmlab.nn.masks import Mask
from llmlab.nn.platform import platform

Kernel = Literal["auto", "reference", "blockwise", "unrolled", "cudnn", "splash", "relative"]

# Queries and keys per block of `blockwise`. Accelerators want large ones; on CPU a block's logits should stay in the
# cache: from 512 to 8,192 tokens 128 took 0.6 to 0.8 of the time of 256 or 512.
_BLOCK, _CPU_BLOCK = 512, 128
# Products of queries and keys, per row and head, beyond which `auto` blocks the computation: at 512 x 512 a matrix of
# weights takes 1 MB a head, and on CPU `blockwise` is as fast as `unrolled`.
_WHOLE = 512 * 512
# Bytes of explicit mask that `auto` pays for cuDNN's speed.
_EXPLICIT_MASK = 2**30


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
    key_index: Int[Array, "B T"] | None = None,
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
        kernel: implementation.
        query_index: index of every query into the keys, for cached decoding; None where query i has index i.
        key_index: index of every key, for caches whose slots are in another order: -1 where there is no key; None
            where key j has index j. Mask and bias go by it.

    Raises:
        ValueError: shapes do not fit, the kernel asked for cannot compute this, or the devices along the sequence do
            not divide the heads that they are to share out (all_to_all).
    """
    _check_shapes(q_BSNH, k_BTKH)
    seed = None if key is None or dropout == 0.0 else jax.random.bits(key, (2,), jnp.uint32)
    scoring = Scoring(
        mask=mask,
        bias=bias,
        scale=scale,
        softcap=softcap,
        dropout=0.0 if seed is None else dropout,
        seed=seed,
        query_index=query_index,
        key_index=key_index,
    )
    on_mesh = split(q_BSNH, k_BTKH, scoring)
    if on_mesh is not None and on_mesh.placement.context == "all_to_all":
        return by_all_to_all(on_mesh, q_BSNH, k_BTKH, v_BTKH, scoring, local=partial(_computed, kernel=kernel))
    if on_mesh is not None and kernel == "auto":
        return by_ring(on_mesh, q_BSNH, k_BTKH, v_BTKH, scoring, block=_block())
    return _computed(q_BSNH, k_BTKH, v_BTKH, scoring, kernel=kernel)


def _computed(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    kernel: Kernel,
) -> Float[Array, "B S N H"]:
    """Attention by one of the kernels."""
    if kernel == "auto":
        kernel = choose(q_BSNH, k_BTKH, scoring)
    elif reason := lacks(kernel, q_BSNH, k_BTKH, scoring):
        raise ValueError(f"kernel={kernel!r} cannot compute this attention: {reason}; use kernel='auto'")
    match kernel:
        case "reference":
            return reference(q_BSNH, k_BTKH, v_BTKH, scoring)
        case "blockwise":
            return blockwise(q_BSNH, k_BTKH, v_BTKH, scoring, block=_block())
        case "unrolled":
            return unrolled(q_BSNH, k_BTKH, v_BTKH, scoring)
        case "cudnn":
            return cudnn(q_BSNH, k_BTKH, v_BTKH, scoring)
        case "splash":
            return splash(q_BSNH, k_BTKH, v_BTKH, scoring)
        case "relative":
            return relative(q_BSNH, k_BTKH, v_BTKH, scoring)
    raise ValueError(f"kernel={kernel!r} is unknown; use one of {', '.join(get_args(Kernel))}")


def _block() -> int:
    return _CPU_BLOCK if platform() == "cpu" else _BLOCK


def lacks(
    kernel: Kernel, q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring
) -> str | None:
    """Why a kernel cannot compute this attention on the platform at hand, or None."""
    match kernel:
        case "unrolled" if scoring.indexed:
            return "queries or keys have an index of their own (cached decoding)"
        case "cudnn":
            return cudnn_lacks(q_BSNH, k_BTKH, scoring, platform())
        case "splash":
            return splash_lacks(q_BSNH, k_BTKH, scoring, platform())
        case "relative":
            return relative_lacks(scoring, platform())
    return None


def choose(q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring) -> Kernel:
    """The kernel that `auto` takes."""
    batch, num_queries, num_keys = q_BSNH.shape[0], q_BSNH.shape[1], k_BTKH.shape[1]
    for kernel in ("splash", "relative"):  # at least half of a tile of queries is no padding
        if num_queries > LANES // 2 and lacks(kernel, q_BSNH, k_BTKH, scoring) is None:
            return kernel
    mask_fits = 2 * batch * num_queries * num_keys <= _EXPLICIT_MASK
    if lacks("cudnn", q_BSNH, k_BTKH, scoring) is None and mask_fits:
        return "cudnn"
    if num_queries * num_keys > _WHOLE:
        return "blockwise"
    if platform() == "cpu" and lacks("unrolled", q_BSNH, k_BTKH, scoring) is None:
        return "unrolled"
    return "reference"


def _check_shapes(q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"]) -> None:
    heads, kv_heads = q_BSNH.shape[2], k_BTKH.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key/value heads")
