"""Axial positions (Kitaev et al. 2020, 2001.04451, appendix D): a long table of positions made of short ones.

A sequence of n1 x n2 positions is laid out as n1 rows of n2; position p stands in row p // n2, column p % n2, and its
vector is that row's and that column's side by side:

    e(p) = [ rows[p // n2] ; columns[p % n2] ]        of widths d1 + d2 = D

n1 d1 + n2 d2 parameters where a full table has n1 n2 D: for 2^16 positions of width 1,024, 256 K in place of 67 M. What
it trades: neighbours in a row of the layout share d1 of their D numbers, whatever distance training would like them to
have. More than two factors work alike.
"""

import math
from dataclasses import dataclass, field

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.module import normal
from llmlab.nn.positions import AddedPosition, check_length


@dataclass(frozen=True)
class Axial(AddedPosition):
    """Positions as points of a grid, one learned table for each axis, added to the embeddings."""

    max_length: int = field(init=False)
    """Longest sequence: the product of `shape`."""
    shape: tuple[int, ...]
    """Size of each axis, the fastest last."""
    dims: tuple[int, ...]
    """Width of each axis' vectors; their sum is the embedding's."""
    std: float = 1.0
    """Standard deviation of the initial tables."""

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.dims) or not self.shape or min(*self.shape, *self.dims) < 1:
            raise ValueError(f"shape={self.shape} and dims={self.dims} must be as many, at least one, and positive")
        object.__setattr__(self, "max_length", math.prod(self.shape))

    def build(self, dim: int, *, rngs: nnx.Rngs) -> "AxialPositions":
        if sum(self.dims) != dim:
            raise ValueError(f"dims={self.dims} add up to {sum(self.dims)}, not to embed_dim={dim}")
        return AxialPositions(self, rngs=rngs)


class AxialPositions(nnx.Module):
    """See Axial."""

    def __init__(self, config: Axial, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.tables = nnx.List(
            nnx.Param(config.std * normal(rngs, (size, dim)), axes=("position", "embed"))
            for size, dim in zip(config.shape, config.dims, strict=True)
        )

    def __call__(self, x_BSD: Float[Array, "B S D"], position_ids_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        check_length(x_BSD.shape[1], self.config.max_length)
        parts, rest = [], position_ids_BS
        for table, size in zip(reversed(self.tables), reversed(self.config.shape), strict=True):
            parts.insert(0, jnp.take(table[...], rest % size, axis=0))
            rest = rest // size
        return x_BSD + jnp.concatenate(parts, axis=-1)
