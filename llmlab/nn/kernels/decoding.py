"""A decoding step's small work on GPUs, each piece as one kernel (Pallas, by way of Triton).

A step with one token a row has little arithmetic and many operations: left to XLA, a layer launches twenty kernels, of
which four read the weights and the others take a microsecond or two each, a third of the step together. Here are

    attend_one    softmax(q K^T) V of one query a row and head over what its cache holds: five kernels in one
    rms_norm      RMSNorm of a row: two in one

`attend_one` reads the slots up to the row's position and no others, however long the cache is, in the cache's own
storage, with the online softmax of flash attention (Dao et al. 2022, 2205.14135). A cache is cut into parts for
processors that would have nothing to do otherwise, and the parts' results are weighted together (flash decoding).

JAX says since 0.11 that it will give up Triton; with a version that has none, `lacks` says so and layers stay with XLA.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, Shaped

from llmlab.nn.kernels.heads import join_heads, split_heads
from llmlab.nn.kernels.scoring import EMPTY, FORBIDDEN

triton: Any
try:
    from jax.experimental.pallas import triton
except ImportError:
    triton = None

_BLOCK = 64
"""Slots that a program reads at a time."""
_PROGRAMS = 128
"""Programs that fill a GPU: about its number of processors."""
_SMALLEST_PART = 512
"""Slots below which another part costs more, in weighting parts together, than it gains."""


def attend_one(
    q_B1NH: Float[Array, "B 1 N H"],
    key: tuple[Shaped[Array, "B K T H"], Float[Array, "B K T"] | None],
    value: tuple[Shaped[Array, "B K T H"], Float[Array, "B K T"] | None],
    position_B: Int[Array, "B"],
    *,
    scale: float,
    softcap: float | None = None,
) -> Float[Array, "B 1 N H"]:
    """Causal attention of one query a row.

    Args:
        q_B1NH: queries; the head dimension is a power of two, 16 or more.
        key: stored keys, slot t at position t, and for int8 their scales.
        value: stored values, likewise.
        position_B: position of each query, which sees the slots up to it; -1 sees nothing and gets zeros.
        scale: factor on q k^T.
        softcap: bound of the logits.
    """
    (batch, heads, slots, dim), group = key[0].shape, q_B1NH.shape[2] // key[0].shape[1]
    parts = max(1, min(_PROGRAMS // (batch * heads), slots // _SMALLEST_PART))
    rows = max(16, pl.next_power_of_2(group))  # of a matrix unit's tile
    scales = [] if key[1] is None else [key[1], value[1]]

    def whole(*shape: int) -> pl.BlockSpec:
        """Everything of one row and head."""
        return pl.BlockSpec((None, None, *shape), lambda b, k, p: (b, k, *[0] * len(shape)))

    def of_part(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, *shape), lambda b, k, p: (b, k, p, *[0] * len(shape)))

    shape = batch, heads, parts, group
    o_BKPGH, log_BKPG = _call(
        functools.partial(_attend, part=math.ceil(slots / parts), rows=rows, scale=scale, softcap=softcap),
        grid=(batch, heads, parts),
        in_specs=[
            pl.BlockSpec((None,), lambda b, k, p: (b,)),
            whole(group, dim),
            *[whole(slots, dim)] * 2,
            *[whole(slots)] * len(scales),
        ],
        out_specs=[of_part(group, dim), of_part(group)],
        out_shape=[
            jax.ShapeDtypeStruct((*shape, dim), q_B1NH.dtype if parts == 1 else jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="attend_one",
    )(position_B, split_heads(q_B1NH, heads)[:, :, :, 0], key[0], value[0], *scales)
    if parts == 1:
        return join_heads(o_BKPGH.swapaxes(2, 3))
    weight_BKPG = jax.nn.softmax(log_BKPG, axis=2)
    o_BKGH = jnp.sum(weight_BKPG[..., None] * o_BKPGH, axis=2)
    return join_heads(o_BKGH[:, :, :, None]).astype(q_B1NH.dtype)


def lacks() -> str | None:
    """Why there are no such kernels, or None."""
    return f"JAX {jax.__version__} has no Triton for Pallas" if triton is None else None


def attend_one_lacks(head_dim: int) -> str | None:
    """Why `attend_one` cannot take heads of this width, or None."""
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"head_dim={head_dim} is not a power of two of 16 or more"
    return None


def _attend(
    position_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    part: int,
    rows: int,
    scale: float,
    softcap: float | None,
) -> None:
    """One row, one key/value head with its queries (G, H), one part of the slots."""
    *scale_refs, o_ref, log_ref = refs
    (group, dim), last_slot = q_ref.shape, k_ref.shape[0] - 1
    # The last query fills the tile up; what its copies compute is stored over and over.
    query_G = jnp.minimum(jnp.arange(rows), group - 1)
    q_GH = q_ref[query_G, :]
    first = pl.program_id(2) * part
    stop = jnp.minimum(first + part, position_ref[...] + 1)

    def block(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        o_GH, max_G, sum_G = carry
        slot_T = first + i * _BLOCK + jnp.arange(_BLOCK)
        at_T = jnp.minimum(slot_T, last_slot)
        k_TH, v_TH = (ref[at_T, :].astype(q_GH.dtype) for ref in (k_ref, v_ref))
        logits_GT = triton.dot(q_GH, k_TH, trans_b=True) * scale
        if scale_refs:
            logits_GT = logits_GT * scale_refs[0][at_T][None]
        if softcap is not None:
            logits_GT = softcap * jnp.tanh(logits_GT / softcap)
        logits_GT = jnp.where((slot_T < stop)[None], logits_GT, FORBIDDEN)
        new_max_G = jnp.maximum(max_G, logits_GT.max(axis=1))
        weight_GT = jnp.exp(logits_GT - new_max_G[:, None])
        shrink_G = jnp.exp(max_G - new_max_G)
        sum_G = shrink_G * sum_G + weight_GT.sum(axis=1)
        if scale_refs:
            weight_GT = weight_GT * scale_refs[1][at_T][None]
        seen_GH = triton.dot(weight_GT.astype(v_TH.dtype), v_TH)
        return shrink_G[:, None] * o_GH + seen_GH, new_max_G, sum_G

    start = jnp.zeros((rows, dim), jnp.float32), jnp.full(rows, EMPTY, jnp.float32), jnp.zeros(rows, jnp.float32)
    blocks = pl.cdiv(jnp.maximum(stop - first, 0), _BLOCK)
    o_GH, max_G, sum_G = jax.lax.fori_loop(0, blocks, block, start)
    some_G = jnp.where(sum_G > 0, sum_G, 1.0)
    o_ref[query_G, :] = (o_GH / some_G[:, None]).astype(o_ref.dtype)
    log_ref[query_G] = max_G + jnp.log(some_G)


def rms_norm(
    x: Float[Array, "*B D"], gain: Float[Array, "D"], epsilon: float, offset: float = 0.0
) -> Float[Array, "*B D"]:
    """(g + offset) x / sqrt(mean(x^2) + epsilon) of every row, in float32."""
    rows = x.reshape(-1, x.shape[-1])
    row = pl.BlockSpec((None, rows.shape[1]), lambda i: (i, 0))
    y = _call(
        functools.partial(_rms_norm, epsilon=epsilon, offset=offset),
        grid=(rows.shape[0],),
        in_specs=[row, pl.BlockSpec((rows.shape[1],), lambda i: (0,))],
        out_specs=row,
        out_shape=jax.ShapeDtypeStruct(rows.shape, x.dtype),
        compiler_params=triton.CompilerParams(num_warps=8),
        name="rms_norm",
    )(rows, gain)
    return y.reshape(x.shape)


def _rms_norm(x_ref: Any, gain_ref: Any, y_ref: Any, *, epsilon: float, offset: float) -> None:
    """One row."""
    size = x_ref.shape[0]
    at_D = jnp.arange(pl.next_power_of_2(size))
    inside_D = at_D < size
    x_D = triton.load(x_ref.at[at_D], mask=inside_D, other=0.0).astype(jnp.float32)
    gain_D = triton.load(gain_ref.at[at_D], mask=inside_D, other=0.0).astype(jnp.float32) + offset
    inverse = jax.lax.rsqrt(jnp.sum(x_D * x_D) / size + epsilon)
    triton.store(y_ref.at[at_D], (x_D * inverse * gain_D).astype(y_ref.dtype), mask=inside_D)


def _call(kernel: Callable[..., None], **keywords: Any) -> Callable[..., Any]:
    """`pallas_call`, in Python where there is no GPU: tests of layers that are put together for one."""
    return pl.pallas_call(kernel, interpret=jax.default_backend() == "cpu", **keywords)
