"""The experts themselves: as many MLPs of one shape, their matrices stacked.

They are applied to rows sorted by expert (see grouped.py), or to the same number of rows for each (batched matmul).
Which hidden units are dropped is a function of what an element is, the choice and the unit, not of where its row stands
or on which device: every dispatch and every mesh drops the same.

Shapes: E experts, D embed, F hidden, R rows sorted by expert, B C rows of one expert.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.nn.module import normal
from llmlab.nn.moe.grouped import grouped_mlp
from llmlab.nn.moe.mlp import Draw, Hidden, Matrices


class StackedDense(nnx.Module):
    """One dense layer for every expert."""

    def __init__(
        self,
        num_experts: int,
        inputs: tuple[str, int],
        outputs: tuple[str, int],
        *,
        bias: bool,
        rngs: nnx.Rngs,
        gain: float = 1.0,
    ) -> None:
        shape = (num_experts, inputs[1], outputs[1])
        std = gain / math.sqrt(inputs[1])
        self.kernel = nnx.Param(std * normal(rngs, shape), axes=("experts", inputs[0], outputs[0]))
        self.bias = nnx.Param(jnp.zeros((num_experts, outputs[1])), axes=("experts", outputs[0])) if bias else None

    @property
    def matrices(self) -> Matrices:
        """As arrays."""
        return Matrices(self.kernel[...], None if self.bias is None else self.bias[...])

    def batched(self, x_EBCD: Float[Array, "E B C D"]) -> Float[Array, "E B C F"]:
        """Of the same number of rows for every expert."""
        y_EBCF = jnp.einsum("ebcd,edf->ebcf", x_EBCD, self.kernel[...])
        return y_EBCF if self.bias is None else y_EBCF + self.bias[...][:, None, None]


class Experts(nnx.Module):
    """MLPs, gated or plain, as many as there are experts."""

    def __init__(self, expert: MLP | GatedMLP, num_experts: int, dim: int, *, rngs: nnx.Rngs, depth: int) -> None:
        embed, mlp = ("embed", dim), ("mlp", expert.hidden_dim)
        gated = isinstance(expert, GatedMLP)
        self.hidden = Hidden(expert.activation, gated, expert.dropout)
        self.gate = StackedDense(num_experts, embed, mlp, bias=expert.bias, rngs=rngs) if gated else None
        self.up = StackedDense(num_experts, embed, mlp, bias=expert.bias, rngs=rngs)
        gain = 1 / math.sqrt(2 * depth)
        self.down = StackedDense(num_experts, mlp, embed, bias=expert.bias, rngs=rngs, gain=gain)

    @property
    def num_experts(self) -> int:
        """How many there are here: on a mesh, of this device."""
        return self.up.kernel.shape[0]

    @property
    def first(self) -> tuple[StackedDense, ...]:
        """What reads the rows: the gate, where there is one, and the other."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def draw(self, key: jax.Array | None, choice: Int[Array, "..."]) -> Draw | None:
        """Dropout by this key; None where there is none."""
        if key is None or self.hidden.dropout == 0.0:
            return None
        return Draw(jax.random.bits(key, (2,), jnp.uint32), choice, jnp.arange(self.up.kernel.shape[2]))

    def grouped(
        self, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"], draw: Draw | None = None
    ) -> Float[Array, "R D"]:
        """Of rows sorted by expert; those beyond the groups give zeros."""
        matrices = tuple(dense.matrices for dense in self.first)
        return grouped_mlp(self.hidden, x_RD, matrices, self.down.matrices, sizes_E, draw)

    def batched(self, x_EBCD: Float[Array, "E B C D"], draw: Draw | None = None) -> Float[Array, "E B C D"]:
        """Of the same number of rows for every expert."""
        pre = jnp.concatenate([dense.batched(x_EBCD) for dense in self.first], axis=-1)
        return self.down.batched(self.hidden(pre, draw))
