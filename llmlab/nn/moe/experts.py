"""The experts themselves: as many MLPs of one shape, their matrices stacked.

They are applied to rows sorted by expert (grouped matmul), or to the same number of rows for each (batched matmul).
Which hidden units are dropped is a function of what an element is, the choice and the unit, not of where its row stands
or on which device: every dispatch and every mesh drops the same.

Shapes: E experts, D embed, F hidden, R rows sorted by expert, B C rows of one expert.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt32

from llmlab.nn.dropout import factor_at
from llmlab.nn.feed_forward import ACTIVATIONS, MLP, GatedMLP
from llmlab.nn.moe.grouped import grouped_matmul

Apply = Callable[["StackedDense", jax.Array], jax.Array]


class Draw(NamedTuple):
    """Dropout of hidden units."""

    seed: UInt32[Array, "2"]
    """Of the layer and the step."""
    choice: Int[Array, "..."]
    """Number of every row's choice in the batch: token t's k-th is t K + k, and e takes k's place where experts choose.
    Of the rows' shape."""
    unit_F: Int[Array, "F"]
    """Number of the hidden units."""


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
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape), axes=("experts", inputs[0], outputs[0]))
        self.bias = nnx.Param(jnp.zeros((num_experts, outputs[1])), axes=("experts", outputs[0])) if bias else None

    def grouped(self, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"]) -> Float[Array, "R F"]:
        """Of rows sorted by expert; those beyond the groups give zeros."""
        y_RF = grouped_matmul(x_RD, self.kernel[...], sizes_E)
        if self.bias is None:
            return y_RF
        expert_R = jnp.searchsorted(jnp.cumsum(sizes_E), jnp.arange(x_RD.shape[0]), side="right")
        return y_RF + jnp.take(self.bias[...], expert_R, axis=0, mode="fill", fill_value=0)

    def batched(self, x_EBCD: Float[Array, "E B C D"]) -> Float[Array, "E B C F"]:
        """Of the same number of rows for every expert."""
        y_EBCF = jnp.einsum("ebcd,edf->ebcf", x_EBCD, self.kernel[...])
        return y_EBCF if self.bias is None else y_EBCF + self.bias[...][:, None, None]


class Experts(nnx.Module):
    """MLPs, gated or plain, as many as there are experts."""

    def __init__(self, expert: MLP | GatedMLP, num_experts: int, dim: int, *, rngs: nnx.Rngs, depth: int) -> None:
        embed, mlp = ("embed", dim), ("mlp", expert.hidden_dim)
        self.activation = expert.activation
        self.dropout = expert.dropout
        gated = isinstance(expert, GatedMLP)
        self.gate = StackedDense(num_experts, embed, mlp, bias=expert.bias, rngs=rngs) if gated else None
        self.up = StackedDense(num_experts, embed, mlp, bias=expert.bias, rngs=rngs)
        gain = 1 / math.sqrt(2 * depth)
        self.down = StackedDense(num_experts, mlp, embed, bias=expert.bias, rngs=rngs, gain=gain)

    @property
    def num_experts(self) -> int:
        """How many there are here: on a mesh, of this device."""
        return self.up.kernel.shape[0]

    def draw(self, key: jax.Array | None, choice: Int[Array, "..."]) -> Draw | None:
        """Dropout by this key; None where there is none."""
        if key is None or self.dropout == 0.0:
            return None
        return Draw(jax.random.bits(key, (2,), jnp.uint32), choice, jnp.arange(self.up.kernel.shape[2]))

    def grouped(
        self, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"], draw: Draw | None = None
    ) -> Float[Array, "R D"]:
        """Of rows sorted by expert; those beyond the groups give zeros."""
        return self._mlp(x_RD, lambda dense, x: dense.grouped(x, sizes_E), draw)

    def batched(self, x_EBCD: Float[Array, "E B C D"], draw: Draw | None = None) -> Float[Array, "E B C D"]:
        """Of the same number of rows for every expert."""
        return self._mlp(x_EBCD, lambda dense, x: dense.batched(x), draw)

    def _mlp(self, x: jax.Array, apply: Apply, draw: Draw | None) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        h = apply(self.up, x)
        h = act(h) if self.gate is None else act(apply(self.gate, x)) * h
        if draw is not None:
            factor = factor_at(self.dropout, draw.seed, h.shape, draw.choice[..., None], draw.unit_F)
            h = (h * factor).astype(h.dtype)  # in float32: bfloat16 rounds 1 / 0.9 to 1.109
        return apply(self.down, h)
