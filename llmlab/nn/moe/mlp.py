"""What an expert computes, as arrays: its matrices and what stands between them.

Shapes: E experts, D and F the widths of inputs and outputs, G = F or 2 F.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from llmlab.nn.dropout import factor_at
from llmlab.nn.feed_forward import ACTIVATIONS


class Matrices(NamedTuple):
    """One dense layer of every expert, or of one."""

    kernel: Float[Array, "*E D F"]
    bias: Float[Array, "*E F"] | None


class Draw(NamedTuple):
    """Dropout of hidden units."""

    seed: UInt32[Array, "2"]
    """Of the layer and the step."""
    choice: Int[Array, "..."]
    """Number of every row's choice in the batch: token t's k-th is t K + k, and e takes k's place where experts choose.
    Of the rows' shape."""
    unit_F: Int[Array, "F"]
    """Number of the hidden units."""


@dataclass(frozen=True)
class Hidden:
    """From what the first matrices make of rows to what the last one reads: activation, gate and dropout."""

    activation: str
    gated: bool
    """Whether the first half of the numbers is the gate of the second."""
    dropout: float

    def __call__(self, pre: Float[Array, "*rows G"], draw: Draw | None) -> Float[Array, "*rows F"]:
        """The hidden units; dropout is active with a draw."""
        act = ACTIVATIONS[self.activation]
        if self.gated:
            gate, up = jnp.split(pre, 2, axis=-1)
            h = act(gate) * up
        else:
            h = act(pre)
        if draw is None:
            return h
        factor = factor_at(self.dropout, draw.seed, h.shape, draw.choice[..., None], draw.unit_F)
        return (h * factor).astype(h.dtype)  # in float32: bfloat16 rounds 1 / 0.9 to 1.109
