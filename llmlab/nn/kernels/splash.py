"""Pallas splash attention on TPUs: flash attention that skips blocks (`jax.experimental.pallas.ops.tpu`).

Causal and windowed masks are static and their empty blocks are never fetched; segments and padding are segment ids.
Memory O(S + T), forward and backward. Grouped queries run its multi-query kernel, mapped over key/value heads.

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
        return "it has no bias"
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
    v_BKTH: Float[Array, "B K T H"],
    segments: kernels.SegmentIds | None,
    *,
    mask: masks.Mask,
    softcap: float | None,
    interpret: bool,
) -> Float[Array, "B K G S H"]:
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
    o_BKGSH = per_row(q_BKGSH, k_BKTH, v_BKTH, segments, sinks)
    assert isinstance(o_BKGSH, jax.Array)  # the kernel would return more if residuals were asked for
    return o_BKGSH
