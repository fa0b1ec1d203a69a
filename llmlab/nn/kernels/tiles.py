"""What the attention kernels of TPUs share: whole tiles, masks as reach and segment ids."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from llmlab.nn.masks import Causal, Mask, Padding, Segments, SlidingWindow

LANES = 128
"""Kernels work on tiles of this width."""
# Larger blocks amortise better; 512 is what fits the scratch memory at head_dim 128 to 256.
_BLOCKS = (512, 256, LANES)
# The segment of keys that no query may see.
_NOWHERE = np.iinfo(np.int32).min


def block(length: int) -> int:
    """Queries or keys of one step of a kernel, for a length of whole tiles."""
    return max(size for size in _BLOCKS if length % size == 0)


def padded(x: jax.Array, axis: int, value: float = 0) -> jax.Array:
    """x lengthened to whole tiles."""
    missing = -x.shape[axis] % LANES
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if missing else x


def foreign_mask(mask: Mask) -> str | None:
    """Why `reach` and `segments` together are not this mask, or None."""
    kinds = [type(term) for term in mask.terms]
    if kinds.count(Segments) > 1:
        return "it takes one pair of segment ids"
    unknown = [kind.__name__ for kind in kinds if kind not in (Causal, SlidingWindow, Segments, Padding)]
    return f"{' and '.join(unknown)} is no mask it knows" if unknown else None


def reach(mask: Mask) -> tuple[int | None, int | None]:
    """What is static in the mask: how many keys before and after its own index a query sees; None for all of them."""
    windows = [term for term in mask.terms if isinstance(term, SlidingWindow)]
    lefts = [window.left for window in windows if window.left is not None]
    rights = [window.right for window in windows if window.right is not None]
    if mask.find(Causal) is not None:
        rights.append(0)
    return min(lefts, default=None), min(rights, default=None)


def segments(
    mask: Mask, batch: int, num_queries: int, num_keys: int
) -> tuple[Int[Array, "B S"], Int[Array, "B T"]] | None:
    """Ids that say what is dynamic in the mask, of queries and keys lengthened to whole tiles.

    A query sees the keys of its own id; keys that are mere padding have an id of their own. None where there is nothing
    to say.
    """
    documents = mask.find(Segments)
    padding = [term for term in mask.terms if isinstance(term, Padding)]
    # Causally, only queries that are padding themselves look at keys that are padding.
    ragged = num_keys % LANES and not (mask.find(Causal) and num_queries == num_keys)
    if documents is None and not padding and not ragged:
        return None
    query_BS, kv_BT = jnp.zeros((batch, num_queries), jnp.int32), jnp.zeros((batch, num_keys), jnp.int32)
    if documents is not None:
        query_BS, kv_BT = documents.query_BS.astype(jnp.int32), documents.kv_BT.astype(jnp.int32)
    for term in padding:
        kv_BT = jnp.where(term.kv_BT, kv_BT, _NOWHERE)
    return padded(query_BS, 1), padded(kv_BT, 1, _NOWHERE)
