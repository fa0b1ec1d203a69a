"""The experts themselves: as many MLPs of one shape, their matrices stacked.

They are applied to rows sorted by expert (grouped matmul), or to the same number of rows for each (batched matmul).

Shapes: E experts, D embed, F hidden, R rows sorted by expert, N rows of one expert.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llmlab.nn.dropout import dropout
from llmlab.nn.feed_forward import ACTIVATIONS, MLP, GatedMLP
from llmlab.nn.moe.grouped import grouped_matmul

Apply = Callable[["StackedDense", jax.Array], jax.Array]


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

    def batched(self, x_END: Float[Array, "E N D"]) -> Float[Array, "E N F"]:
        """Of the same number of rows for every expert."""
        y_ENF = jnp.einsum("end,edf->enf", x_END, self.kernel[...])
        return y_ENF if self.bias is None else y_ENF + self.bias[...][:, None]


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

    def grouped(
        self, x_RD: Float[Array, "R D"], sizes_E: Int[Array, "E"], key: jax.Array | None = None
    ) -> Float[Array, "R D"]:
        """Of rows sorted by expert; those beyond the groups give zeros."""
        return self._mlp(x_RD, lambda dense, x: dense.grouped(x, sizes_E), key)

    def batched(self, x_END: Float[Array, "E N D"], key: jax.Array | None = None) -> Float[Array, "E N D"]:
        """Of the same number of rows for every expert."""
        return self._mlp(x_END, lambda dense, x: dense.batched(x), key)

    def _mlp(self, x: jax.Array, apply: Apply, key: jax.Array | None) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        h = apply(self.up, x)
        h = act(h) if self.gate is None else act(apply(self.gate, x)) * h
        return apply(self.down, dropout(h, self.dropout, key))
