"""Matrices that are given the same input, joined into one.

    query, key, value    three matmuls of one input    (D, N H), (D, K H), (D, K H)  ->  (D, (N + 2 K) H)
    gate, up             two                           (D, F), (D, F)                ->  (D, 2 F)

The result is the same; a token's step launches two kernels a layer where it launched five, and the small matrices of
few key/value heads, which on their own are too little work for an accelerator, are read with the large one. On CPU the
matmuls run side by side, on a core each, and joining them takes that away.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.attention import AttentionLayer
from llmlab.nn.config import Auxiliary, Context
from llmlab.nn.dense import Dense, contract
from llmlab.nn.dropout import dropout
from llmlab.nn.feed_forward import ACTIVATIONS, GatedMLPLayer


class JoinedDense(nnx.Module):
    """Dense layers of one input, by one matmul.

    Args:
        layers: all contract as many dimensions, and their outputs differ in the first dimension only.
    """

    def __init__(self, layers: tuple[Dense, ...]) -> None:
        self.num_inputs = axis = layers[0].num_inputs
        sizes = [layer.kernel.shape[axis] for layer in layers]
        self.cuts = tuple(sum(sizes[: i + 1]) for i in range(len(sizes) - 1))
        self.kernel = nnx.Param(jnp.concatenate([layer.kernel[...] for layer in layers], axis=axis))
        biases = [layer.bias[...] for layer in layers if layer.bias is not None]
        self.bias = nnx.Param(jnp.concatenate(biases)) if biases else None

    def __call__(self, x: Float[Array, "..."]) -> list[Float[Array, "..."]]:
        y = contract(x, self.kernel[...], self.num_inputs)
        y = y if self.bias is None else y + self.bias[...]
        return jnp.split(y, self.cuts, axis=x.ndim - self.num_inputs)


class JoinedAttention(AttentionLayer):
    """A self-attention layer whose queries, keys and values come of one matmul."""

    def __init__(self, layer: AttentionLayer) -> None:
        self.config, self.scale = layer.config, layer.scale
        self.joined = JoinedDense((layer.query, layer.key, layer.value))
        self.output = layer.output
        self.norm_query, self.norm_key = layer.norm_query, layer.norm_key
        self.rotation, self.relative = layer.rotation, layer.relative

    def project(
        self, x_BSD: Float[Array, "B S D"], source_BTM: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B S N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        assert source_BTM is x_BSD
        q_BSNH, k_BTKH, v_BTKH = self.joined(x_BSD)
        q_BSNH = q_BSNH if self.norm_query is None else self.norm_query(q_BSNH)
        return q_BSNH, k_BTKH if self.norm_key is None else self.norm_key(k_BTKH), v_BTKH


class JoinedGatedMLP(nnx.Module):
    """A gated MLP whose gate and hidden layer come of one matmul."""

    def __init__(self, layer: GatedMLPLayer) -> None:
        self.activation, self.dropout = layer.activation, layer.dropout
        self.joined, self.down = JoinedDense((layer.gate, layer.up)), layer.down

    def __call__(
        self, x_BSD: Float[Array, "B S D"], context: Context | None = None, key: jax.Array | None = None
    ) -> tuple[Float[Array, "B S D"], Auxiliary]:
        gate_BSF, up_BSF = self.joined(x_BSD)
        return self.down(dropout(ACTIVATIONS[self.activation](gate_BSF) * up_BSF, self.dropout, key)), {}


def join(model: Any) -> None:
    """Put joined layers in the place of a model's attention and gated MLPs. Others, and kinds of these that have a
    computation of their own, stay as they are."""
    for module in [module for _, module in nnx.iter_modules(model)]:
        for name, child in list(vars(module).items()):
            if type(child) is AttentionLayer and _alike(child.query, child.key, child.value):
                setattr(module, name, JoinedAttention(child))
            elif type(child) is GatedMLPLayer and _alike(child.gate, child.up):
                setattr(module, name, JoinedGatedMLP(child))


def _alike(*layers: Any) -> bool:
    """Whether layers can be joined: plain ones, all with a bias or none."""
    return all(type(layer) is Dense for layer in layers) and len({layer.bias is None for layer in layers}) == 1
