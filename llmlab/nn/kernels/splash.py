"""Pallas splash attention on TPUs: flash attention that skips blocks (`jax.experimental.pallas.ops.tpu`).

Causal and windowed masks are static and their empty blocks are never fetched; segments and padding are segment ids.
Memory O(S + T), forward and backward. Grouped queries run its multi-query kernel, mapped over key/value heads.

The kernel adds no bias. One that grows by a slope with the key (ALiBi in a causal row) is an inner product, slope times
index, and goes in as six more dimensions of queries and keys: exact, and only their products cost more.

XLA cannot split a Pallas kernel over devices by itself, so under an active mesh it runs in `shard_map`, each device on
its own rows and heads. A sequence that is sharded is gathered for it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from llmlab.nn.kernels.heads import join_heads, split_heads
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.kernels.tiles import block, foreign_mask, padded, reach, segments
from llmlab.nn.masks import Causal, Mask
from llmlab.sharding.rules import active_placement

# bfloat16 holds whole numbers up to this, and multiples of it up to its square.
_WHOLE = 256
# Every query may also see a nothing of this logit: no weight beside any allowed key, all of it where there is none, so
# that such a query gets zeros. The kernel would give it the mean of keys that it may not see.
_SINK = -1e30


def splash(
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    interpret: bool = False,
) -> Float[Array, "B S N H"]:
    """As `reference`, where `splash_lacks` finds nothing.

    Args:
        q_BSNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        scoring: how logits become weights.
        interpret: runs the kernel in Python, on any platform, for tests.
    """
    batch, num_queries, _, _ = q_BSNH.shape
    # The kernel has no scale. Rounding q * scale to q's dtype is exact where the scale is a power of two (head_dim 64).
    q_BKGSH = padded(split_heads((q_BSNH * scoring.scale).astype(q_BSNH.dtype), k_BTKH.shape[2]), 3)
    k_BKTH, v_BKTH = padded(k_BTKH.swapaxes(1, 2), 2), padded(v_BTKH.swapaxes(1, 2), 2)
    slopes_N = None if scoring.bias is None else scoring.bias.slopes()
    if slopes_N is not None:
        q_BKGSH, k_BKTH = _sloped(q_BKGSH, k_BKTH, slopes_N)
    ids = segments(scoring.mask, batch, num_queries, k_BTKH.shape[1])
    run = partial(
        _attend,
        mask=_static(scoring.mask, (q_BKGSH.shape[3], k_BKTH.shape[2])),
        softcap=scoring.softcap,
        interpret=interpret,
    )
    # Groups of heads are split over devices where there are too few key/value heads.
    placement = active_placement()
    if placement is not None:
        spec = placement.spec(("batch", "kv_heads", "heads", None, None), q_BKGSH.shape)
        kv, rows = PartitionSpec(*spec[:2]), PartitionSpec(spec[0])
        run = placement.shard_map(run, in_specs=(spec, kv, kv, rows), out_specs=spec)
    return join_heads(run(q_BKGSH, k_BKTH, v_BKTH, ids)[:, :, :, :num_queries])


def splash_lacks(
    q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring, platform: str
) -> str | None:
    """Why splash attention cannot compute this, or None."""
    if platform != "tpu":
        return f"it needs a TPU and this program is for {platform}"
    if scoring.dropout > 0.0:
        return "it has no dropout"
    if scoring.bias is not None:
        if scoring.bias.slopes() is None or scoring.mask.find(Causal) is None:
            return "of all biases it has only a slope, and that in causal attention"
        if scoring.softcap is not None:
            return "it would cap the bias too"
        if k_BTKH.shape[1] > _WHOLE**2:
            return f"with a bias it counts to {_WHOLE**2} keys"
    if scoring.indexed:
        return "queries or keys have an index of their own (cached decoding)"
    return foreign_mask(scoring.mask)


def _sloped(
    q_BKGSH: Float[Array, "B K G S H"], k_BKTH: Float[Array, "B K T H"], slopes_N: Float[Array, "N"]
) -> tuple[Float[Array, "B K G S H+6"], Float[Array, "B K T H+6"]]:
    """With dimensions whose inner product is slope * index of the key.

    Both factors are sums of what bfloat16 holds exactly, three for a slope of 24 bits and two for an index; the kernel
    adds the six products up in float32.
    """
    slopes_KG, pieces = slopes_N.reshape(q_BKGSH.shape[1:3]), []
    for _ in range(3):
        pieces.append(jax.lax.reduce_precision(slopes_KG, exponent_bits=8, mantissa_bits=7))  # bfloat16's
        slopes_KG = slopes_KG - pieces[-1]
    index_T = jnp.arange(k_BKTH.shape[2])
    high_T, low_T = index_T // _WHOLE * _WHOLE, index_T % _WHOLE
    more_q = jnp.stack([*pieces, *pieces], -1)[None, :, :, None].astype(q_BKGSH.dtype)
    more_k = jnp.stack([high_T] * 3 + [low_T] * 3, -1)[None, None].astype(k_BKTH.dtype)
    return (
        jnp.concatenate([q_BKGSH, jnp.broadcast_to(more_q, (*q_BKGSH.shape[:4], 6))], -1),
        jnp.concatenate([k_BKTH, jnp.broadcast_to(more_k, (*k_BKTH.shape[:3], 6))], -1),
    )


def _static(mask: Mask, shape: tuple[int, int]) -> masks.Mask:
    """What is static in the mask."""
    left, right = reach(mask)
    if left is None and right is None:
        return masks.FullMask(shape)
    return masks.CausalMask(shape) if (left, right) == (None, 0) else masks.LocalMask(shape, (left, right), offset=0)


def _attend(
    q_BKGSH: Float[Array, "B K G S H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTV: Float[Array, "B K T V"],
    ids: tuple[Int[Array, "B S"], Int[Array, "B T"]] | None,
    *,
    mask: masks.Mask,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B K G S V"]:
    """The kernel on one device's rows and heads."""
    group = q_BKGSH.shape[2]
    query, kv = (block(length) for length in mask.shape)
    sizes = kernels.BlockSizes(
        block_q=query,
        block_kv=kv,
        block_kv_compute=kv,
        block_q_dkv=query,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=query,
        block_kv_dq=kv,
    )
    with jax.ensure_compile_time_eval():  # which blocks to visit is a constant of the program
        kernel = kernels.make_splash_mqa(
            masks.MultiHeadMask([mask] * group),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
    sinks = jnp.full(group, _SINK, jnp.float32)
    per_head = jax.vmap(kernel, in_axes=(0, 0, 0, None, None))
    per_row = jax.vmap(per_head, in_axes=(0, 0, 0, None if ids is None else 0, None))
    o_BKGSV = per_row(q_BKGSH, k_BKTH, v_BKTV, None if ids is None else kernels.SegmentIds(*ids), sinks)
    assert isinstance(o_BKGSV, jax.Array)  # the kernel would return more if residuals were asked for
    return o_BKGSV
