"""Embedding: a table row for every token (and, for BERT's kin, for every segment type).

A lookup costs no FLOPs and O(D) memory traffic a token; its gradient is a scatter-add into the table. Tied models
use the same table, transposed, to score the next token (Press and Wolf 2017, 1608.05859).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.dense import contract_rows
from llmlab.nn.module import normal
from llmlab.sharding import shard


class Embedding(nnx.Module):
    """Rows of a learned table.

    Args:
        num_rows: size of the vocabulary.
        dim: width of a row.
        axes: logical names of the table's dimensions.
        std: standard deviation of the initial table.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        *,
        rngs: nnx.Rngs,
        axes: tuple[str, str] = ("vocab", "embed"),
        std: float = 0.02,
    ) -> None:
        self.row_axis = axes[0]
        self.table = nnx.Param(std * normal(rngs, (num_rows, dim)), axes=axes)

    def __call__(self, ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        # Whole rows: where the table's width is split like the batch (fsdp), the gradient would otherwise be scattered
        # into parts of rows, and the activations of the whole batch gathered on every device for it.
        return jnp.take(shard(self.table[...], self.row_axis, None), ids, axis=0)

    def attend(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of a tied head: inner product with every row."""
        return contract_rows(x, self.table[...])


class SegmentEmbedding(nnx.Module):
    """Adds a row by segment type, BERT's sentence A and B (Devlin et al. 2019, 1810.04805, section 3)."""

    def __init__(self, num_types: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.types = Embedding(num_types, dim, rngs=rngs, axes=("segment_type", "embed"))

    def __call__(self, x_BSD: Float[Array, "B S D"], token_type_ids_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        return x_BSD + self.types(token_type_ids_BS)
