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
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llmlab.nn.kernels.heads import join_heads, split_heads
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.masks import Causal, Mask, Padding, Segments, SlidingWindow
from llmlab.sharding.rules import active_placement

# The kernel works on tiles of 128 lanes.
_LANES = 128
# Larger blocks amortise better; 512 is what fits the scratch memory at head_dim 128 to 256.
_BLOCKS = (512, 256, 128)
# bfloat16 holds whole numbers up to this, and multiples of it up to its square.
_WHOLE = 256
# The segment of keys that no query may see.
_NOWHERE = np.iinfo(np.int32).min
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
    q_BKGSH = _padded(split_heads((q_BSNH * scoring.scale).astype(q_BSNH.dtype), k_BTKH.shape[2]), 3)
    k_BKTH, v_BKTH = _padded(k_BTKH.swapaxes(1, 2), 2), _padded(v_BTKH.swapaxes(1, 2), 2)
    slopes_N = None if scoring.bias is None else scoring.bias.slopes()
    if slopes_N is not None:
        q_BKGSH, k_BKTH = _sloped(q_BKGSH, k_BKTH, slopes_N)
    segments = _segments(scoring.mask, batch, num_queries, k_BTKH.shape[1])
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
        kv, ids = PartitionSpec(*spec[:2]), PartitionSpec(spec[0])
        run = placement.shard_map(run, in_specs=(spec, kv, kv, ids), out_specs=spec)
    return join_heads(run(q_BKGSH, k_BKTH, v_BKTH, segments)[:, :, :, :num_queries])


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
    kinds = [type(term) for term in scoring.mask.terms]
    if kinds.count(Segments) > 1:
        return "it takes one pair of segment ids"
    unknown = [kind.__name__ for kind in kinds if kind not in (Causal, SlidingWindow, Segments, Padding)]
    return f"{' and '.join(unknown)} is no mask it knows" if unknown else None


def _padded(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
    """x lengthened to whole tiles."""
    missing = -x.shape[axis] % _LANES
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


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


def _segments(mask: Mask, batch: int, num_queries: int, num_keys: int) -> kernels.SegmentIds | None:
    """Segment ids that say what is dynamic in the mask, and which keys are mere padding to whole tiles."""
    segments = mask.find(Segments)
    padding = [term for term in mask.terms if isinstance(term, Padding)]
    # Causally, only queries that are padding themselves look at keys that are padding.
    ragged = num_keys % _LANES and not (mask.find(Causal) and num_queries == num_keys)
    if segments is None and not padding and not ragged:
        return None
    query_BS, kv_BT = jnp.zeros((batch, num_queries), jnp.int32), jnp.zeros((batch, num_keys), jnp.int32)
    if segments is not None:
        query_BS, kv_BT = segments.query_BS.astype(jnp.int32), segments.kv_BT.astype(jnp.int32)
    for term in padding:
        kv_BT = jnp.where(term.kv_BT, kv_BT, _NOWHERE)
    return kernels.SegmentIds(_padded(query_BS, 1), _padded(kv_BT, 1, _NOWHERE))


def _static(mask: Mask, shape: tuple[int, int]) -> masks.Mask:
    """What is static in the mask."""
    windows = [term for term in mask.terms if isinstance(term, SlidingWindow)]
    lefts = [window.left for window in windows if window.left is not None]
    rights = [window.right for window in windows if window.right is not None]
    if mask.find(Causal) is not None:
        if not lefts:
            return masks.CausalMask(shape)
        rights.append(0)
    if not lefts and not rights:
        return masks.FullMask(shape)
    return masks.LocalMask(shape, (min(lefts, default=None), min(rights, default=None)), offset=0)


def _attend(
    q_BKGSH: Float[Array, "B K G S H"],
    k_BKTH: Float[Array, "B K T H"],
    v_BKTV: Float[Array, "B K T V"],
    segments: kernels.SegmentIds | None,
    *,
    mask: masks.Mask,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B K G S V"]:
    """The kernel on one device's rows and heads."""
    group = q_BKGSH.shape[2]
    query, kv = (max(size for size in _BLOCKS if length % size == 0) for length in mask.shape)
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
    per_row = jax.vmap(per_head, in_axes=(0, 0, 0, None if segments is None else 0, None))
    o_BKGSV = per_row(q_BKGSH, k_BKTH, v_BKTV, segments, sinks)
    assert isinstance(o_BKGSV, jax.Array)  # the kernel would return more if residuals were asked for
    return o_BKGSV
