"""What stands between the products q k^T and the attention weights, shared by all kernels.

    logits  = softcap * tanh(scale * q k^T / softcap) + bias        softcap: Gemma 2, 2408.00118, section 2
    weights = softmax over the allowed keys, in float32; all zero in a row that may see nothing
    weights = weights * keep / (1 - dropout)

Everything here is elementwise in (query, key), so a kernel may compute any block of it at any time.
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from llmlab.nn.dropout import factor_at
from llmlab.nn.kernels.bias import Bias
from llmlab.nn.masks import Index, Mask

# Logits of forbidden keys, and the maximum of a row that has no other. Both finite, for -inf minus -inf is NaN, and so
# far apart that exp(FORBIDDEN - EMPTY) is 0: the weights of an empty row come out as zeros without a second mask.
FORBIDDEN = -0.7 * float(np.finfo(np.float32).max)
EMPTY = 0.5 * FORBIDDEN


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How products of queries and keys become attention weights."""

    mask: Mask
    bias: Bias | None = None
    scale: float = dataclasses.field(metadata={"static": True})
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    seed: UInt32[Array, "2"] | None = None
    """Seed of the dropout; None where dropout is 0."""
    query_index: Int[Array, "B S"] | None = None
    """Index of every query into the sequence of keys; None where query i has index i."""
    key_index: Int[Array, "B T"] | None = None
    """Index of every key in that sequence, -1 for one that nobody may see; None where key j has index j."""
    number_BN: UInt32[Array, "B N"] | None = None
    """Number of every row and head, row * heads + head, in the whole batch; None where the arrays are all of it."""

    @property
    def indexed(self) -> bool:
        """Whether queries or keys have an index that is not their place."""
        return self.query_index is not None or self.key_index is not None

    def logits(self, products_BNST: Float[Array, "B N S T"], query: Index, kv: Index) -> Float[Array, "B N S T"]:
        """Logits in float32, whatever the mask says."""
        logits = products_BNST.astype(jnp.float32) * self.scale
        if self.softcap is not None:
            logits = self.softcap * jnp.tanh(logits / self.softcap)
        return logits if self.bias is None else logits + self.bias.block(query, kv)

    def allowed(self, query: Index, kv: Index) -> Bool[Array, "B 1 S T"]:
        """Where a query may see a key; B is 1 where all rows agree."""
        seen = self.mask.allowed(query, kv)[:, None]
        return seen if self.key_index is None else seen & (kv >= 0)[:, None, None]

    def kept(self, num_queries: int, shape_BNST: tuple[int, ...], query: Index, kv: Index) -> Float[Array, "B N S T"]:
        """Dropout's factor on a block of weights: 0, or 1 / (1 - dropout).

        The element is (row, head, query) and key (see factor_at), so all kernels drop the same weights, forward and
        backward, however the work is cut.

        Args:
            num_queries: length of the whole sequence of queries.
            shape_BNST: shape of the block.
            query: which queries of the sequence the block holds, (S,), counted from 0 whatever `query_index` says.
            kv: which keys, (T,), counted from 0 as well.
        """
        assert self.seed is not None
        head = jnp.arange(shape_BNST[0] * shape_BNST[1], dtype=jnp.uint32).reshape(*shape_BNST[:2])
        head = (head if self.number_BN is None else self.number_BN)[:, :, None, None]
        row = head * np.uint32(num_queries) + jnp.asarray(query).astype(jnp.uint32)[:, None]
        return factor_at(self.dropout, self.seed, shape_BNST, row, jnp.asarray(kv))


def row_max(logits_BNST: Float[Array, "B N S T"]) -> Float[Array, "B N S 1"]:
    """The largest masked logit of every query; EMPTY where all its keys are forbidden."""
    return jnp.maximum(logits_BNST.max(-1, keepdims=True), EMPTY)
