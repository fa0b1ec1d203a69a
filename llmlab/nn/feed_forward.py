"""The feed-forward network: what a block does to each position by itself.

    MLP        y = W_down act(W_up x)                           Vaswani et al. 2017 (1706.03762)
    GatedMLP   y = W_down (act(W_gate x) * W_up x)              Shazeer 2020 (2002.05202)

GatedMLP with sigmoid is GLU (Dauphin et al. 2017, 1612.08083), with gelu GEGLU, with silu SwiGLU, with relu ReGLU.
Gating multiplies two projections, so it has three matrices; at equal parameters its hidden_dim is 2/3 of the MLP's
(8/3 D instead of 4 D). Two thirds of a transformer's parameters and FLOPs are here: 2 * (2 or 3) * D * F forward per
token.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.config import Auxiliary, Context, FeedForward
from llmlab.nn.dense import Dense
from llmlab.nn.dropout import check_rate, dropout
from llmlab.sharding import shard

Activation = Literal["relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "sigmoid", "tanh", "identity"]
"""gelu is the exact one, x Phi(x) (Hendrycks and Gimpel 2016); gelu_tanh its approximation, GPT-2's; quick_gelu a
coarser one, x sigmoid(1.702 x), CLIP's."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jax.numpy.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True, kw_only=True)
class MLP(FeedForward):
    """Two matrices with an activation between them."""

    hidden_dim: int
    """Width between the two matrices, usually 4 times the embedding."""
    activation: Activation = "gelu"
    """Nonlinearity."""
    bias: bool = True
    """Whether both matrices add a bias."""
    dropout: float = 0.0
    """Dropout on the hidden activations."""

    def __post_init__(self) -> None:
        _check(self.hidden_dim, self.dropout)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "MLPLayer":
        return MLPLayer(self, dim, rngs=rngs, depth=depth)


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FeedForward):
    """An MLP whose hidden layer is multiplied by a gate: GLU, GEGLU, SwiGLU by activation."""

    hidden_dim: int
    """Width of gate and up projections, usually 8/3 times the embedding."""
    activation: Activation = "silu"
    """Nonlinearity of the gate: sigmoid is GLU, gelu GEGLU, silu SwiGLU."""
    bias: bool = False
    """Whether all three matrices add a bias."""
    dropout: float = 0.0
    """Dropout on the hidden activations."""

    def __post_init__(self) -> None:
        _check(self.hidden_dim, self.dropout)

    def build(self, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> "GatedMLPLayer":
        return GatedMLPLayer(self, dim, rngs=rngs, depth=depth)


class MLPLayer(nnx.Module):
    """See MLP."""

    def __init__(self, config: MLP, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        embed, mlp = (("embed", dim),), (("mlp", config.hidden_dim),)
        self.activation = config.activation
        self.dropout = config.dropout
        self.up = Dense(embed, mlp, bias=config.bias, rngs=rngs)
        self.down = Dense(mlp, embed, bias=config.bias, rngs=rngs, gain=1 / math.sqrt(2 * depth))

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context | None = None, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B S D"], Auxiliary]:
        h_BSF = ACTIVATIONS[self.activation](shard(self.up(x_BSD), "batch", "sequence", "mlp"))
        return self.down(dropout(h_BSF, self.dropout, key)), {}


class GatedMLPLayer(nnx.Module):
    """See GatedMLP."""

    def __init__(self, config: GatedMLP, dim: int, *, rngs: nnx.Rngs, depth: int = 1) -> None:
        embed, mlp = (("embed", dim),), (("mlp", config.hidden_dim),)
        self.activation = config.activation
        self.dropout = config.dropout
        self.gate = Dense(embed, mlp, bias=config.bias, rngs=rngs)
        self.up = Dense(embed, mlp, bias=config.bias, rngs=rngs)
        self.down = Dense(mlp, embed, bias=config.bias, rngs=rngs, gain=1 / math.sqrt(2 * depth))

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context | None = None, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B S D"], Auxiliary]:
        gate_BSF = ACTIVATIONS[self.activation](shard(self.gate(x_BSD), "batch", "sequence", "mlp"))
        h_BSF = gate_BSF * shard(self.up(x_BSD), "batch", "sequence", "mlp")
        return self.down(dropout(h_BSF, self.dropout, key)), {}


def _check(hidden_dim: int, rate: float) -> None:
    if hidden_dim < 1:
        raise ValueError(f"hidden_dim={hidden_dim} is not positive; 4 * embed_dim is usual")
    check_rate("dropout", rate)
