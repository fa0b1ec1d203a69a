"""Context parallelism: attention over a sequence whose tokens are split over devices.

    ring          keys and values go around, each device attends with its own queries      (see ring.py)
    all_to_all    tokens are exchanged for heads: a device gets all tokens of some heads, attends as if it were alone,
                  and gives the outputs back                             (Ulysses, Jacobs et al. 2023, 2309.14509)

Per device and layer, with n devices along the sequence, S tokens, D = N H and D' = K H (K key/value heads):

                  what travels, forward                   memory            limits
    ring          2 S D' (n - 1) / n, behind computation  O(S / n)          none
    all_to_all    2 S (D + D') (n - 1) / n^2              O(S / n): whole   n divides the query heads
                                                          rows of D / n

All-to-all moves less where n is large and runs the platform's own kernel; the ring has no limit of heads and hides what
it moves. Neither ever has all keys of all heads on one device, which is what automatic partitioning does: it gathers
them. That is still what happens where a length does not divide.

Both run in one `shard_map` over all axes of the mesh: rows over the axes of the batch, heads over those of the heads.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llmlab.nn.kernels.ring import ring
from llmlab.nn.kernels.scoring import Scoring
from llmlab.sharding import Placement, sequence
from llmlab.sharding.rules import active_placement

Local = Callable[[jax.Array, jax.Array, jax.Array, Scoring], jax.Array]


@dataclass(frozen=True)
class Split:
    """How queries, keys and values lie on the mesh, the sequence over at least two devices."""

    placement: Placement
    query: PartitionSpec
    """Of (B, S, N, H)."""
    kv: PartitionSpec
    """Of (B, T, K, H)."""
    num_heads: int
    """Query heads of all devices."""
    num_kv_heads: int
    """Key/value heads of all devices."""

    size: int
    """Devices along the sequence."""
    own_heads: int
    """Query heads of a device."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes of the sequence."""
        return _axes(self.query[1])


def split(q_BSNH: Float[Array, "B S N H"], k_BTKH: Float[Array, "B T K H"], scoring: Scoring) -> Split | None:
    """How this attention can be computed with its sequence split, or None where automatic partitioning has to do.

    None without a mesh that splits the sequence, where a length does not divide by its devices, and for cached decoding
    (queries or keys with an index of their own).
    """
    placement = active_placement()
    if placement is None or scoring.indexed:
        return None
    query = placement.spec(("batch", "sequence", "heads", None), q_BSNH.shape)
    kv = placement.spec(("batch", "sequence", "kv_heads", None), k_BTKH.shape)
    if query[1] is None or query[1] != kv[1]:
        return None
    if kv[2] != query[2]:  # too few heads: every device has all of them and takes those that its queries read
        kv = PartitionSpec(*kv[:2], None, None)
    size, parts = (math.prod(placement.sizes[axis] for axis in _axes(entry)) for entry in query[1:3])
    heads = q_BSNH.shape[2]
    return Split(placement, query, kv, heads, k_BTKH.shape[2], size, heads // parts)


def by_ring(
    split: Split,
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    block: int,
) -> Float[Array, "B S N H"]:
    """Attention with keys and values going around; `block` queries and keys at a time."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
        k, v = (_read(x, split, q.shape[2]) for x in (k, v))
        scoring = _at(scoring, split, q.shape[0], sequence.number(_axes(split.query[2])) * q.shape[2], q.shape[2])
        return ring(q, k, v, scoring, axes=split.axes, size=split.size, block=block)

    return _mapped(split, run)(q_BSNH, k_BTKH, v_BTKH, scoring)


def by_all_to_all(
    split: Split,
    q_BSNH: Float[Array, "B S N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    scoring: Scoring,
    *,
    local: Local,
) -> Float[Array, "B S N H"]:
    """Attention with heads exchanged for tokens; `local` computes that of whole sequences.

    Raises:
        ValueError: the devices along the sequence do not divide the query heads.
    """
    axes, size = split.axes, split.size
    if split.own_heads % size:
        per_device = f"{split.own_heads} of {split.num_heads}" if split.own_heads < split.num_heads else split.own_heads
        raise ValueError(
            f"context='all_to_all' shares out {per_device} query heads over {size} devices along the sequence, which "
            f"does not divide them; use {math.gcd(split.own_heads, size)}, or mesh.context='ring'"
        )
    count = split.own_heads // size

    def run(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
        k, v = (_read(x, split, count) for x in (k, v))
        q, k, v = (sequence.tokens_to_heads(x, axes) for x in (q, k, v))
        first = sequence.number((*_axes(split.query[2]), *axes)) * count
        o = local(q, k, v, _at(scoring, split, q.shape[0], first, count))
        return sequence.heads_to_tokens(o, axes)

    return _mapped(split, run)(q_BSNH, k_BTKH, v_BTKH, scoring)


def _axes(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one dimension of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _mapped(split: Split, run: Local) -> Local:
    """`run` on every device's share; masks are cut by rows only, biases and seeds not at all."""

    def mapped(q: jax.Array, k: jax.Array, v: jax.Array, scoring: Scoring) -> jax.Array:
        def rows(x: jax.Array) -> PartitionSpec:
            return PartitionSpec(split.query[0]) if x.ndim and x.shape[0] == q.shape[0] else PartitionSpec()

        # Not all of Scoring: a tree of specs in its place would have to pass for one.
        parts = scoring.mask, scoring.bias, scoring.seed
        specs = jax.tree.map(rows, parts[0]), *jax.tree.map(lambda _: PartitionSpec(), parts[1:])

        def local(q: jax.Array, k: jax.Array, v: jax.Array, parts: Any) -> jax.Array:
            mask, bias, seed = parts
            return run(q, k, v, replace(scoring, mask=mask, bias=bias, seed=seed))

        in_specs = (split.query, split.kv, split.kv, specs)
        return split.placement.shard_map(local, in_specs=in_specs, out_specs=split.query)(q, k, v, parts)

    return mapped


def _at(scoring: Scoring, split: Split, batch: int, first: jax.Array, count: int) -> Scoring:
    """The scoring of a device that has `batch` rows, and `count` heads from `first` on."""
    bias = scoring.bias
    if bias is not None and count < split.num_heads:
        bias = bias.heads(first, count)
    if scoring.dropout == 0.0:
        return replace(scoring, bias=bias)
    row_B = sequence.number(_axes(split.query[0])) * batch + jnp.arange(batch)
    number_BN = row_B[:, None] * split.num_heads + first + jnp.arange(count)
    return replace(scoring, bias=bias, number_BN=number_BN.astype(jnp.uint32))


def _read(x_BTKH: Float[Array, "B T K H"], split: Split, count: int) -> Float[Array, "B T M H"]:
    """The key/value heads that this device's query heads read, for every `count` of them as many.

    Nothing is repeated where `count` query heads are whole groups. Else a head that queries of two devices read is
    there for each: with 8 query heads, 2 key/value heads and count = 2, each of these is there twice.
    """
    group = split.num_heads // split.num_kv_heads
    run = math.gcd(group, count)  # neighbouring query heads that read one head
    lead = np.arange(0, split.own_heads, run)
    whole = split.kv[2] == split.query[2]
    if whole and run == group:
        return x_BTKH
    first = 0 if whole else sequence.number(_axes(split.query[2])) * split.own_heads
    return jnp.take(x_BTKH, (first + lead) // group, axis=2, mode="clip")
