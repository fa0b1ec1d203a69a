"""Where attention looks, and how sharply.

    weights     w[s, t], how much query s takes of key t, in every head of every layer
    entropy     H(s) = -sum_t w[s, t] log w[s, t], over log(number of keys that s sees): 1 for the mean of all keys, 0
                for one key alone
    saturated   share of queries that give one key more than 0.99

A softmax that is saturated passes no gradient to its logits (the derivative w (1 - w) vanishes at 0 and 1), which is
the reason that Vaswani et al. 2017 (1706.03762, section 3.2.1) give for dividing the products by sqrt(d_k).
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llmlab.nn.attention import AttentionLayer
from llmlab.nn.config import Auxiliary, Context
from llmlab.nn.stack import Stack, cut_by
from llmlab.nn.wiring import SerialLayer

SATURATED = 0.99
"""Weight of one key beyond which a query counts as saturated."""


@dataclass(frozen=True)
class Sharpness:
    """Of a model's attention, mean over layers, heads and the queries that see at least two keys."""

    entropy: float
    """Relative to that of equal weights, 0 to 1."""
    saturated: float
    """Share of queries, 0 to 1."""


def attention_weights(model: Any, **inputs: Any) -> list[Float[Array, "B N S T"]]:
    """The weights of self-attention in every layer of a model's stack, first to last, without dropout.

    Args:
        model: a model with one stack of serial blocks, whose mixers are attention.
        inputs: what its `hidden_states` takes (input_ids, segment_ids, ...).

    Raises:
        ValueError: a layer is of another kind, or a whole number of patterns does not fill the stack.
    """
    found: list[jax.Array] = []

    def look(
        stack: Stack, x_BSD: jax.Array, context: Context, key: jax.Array | None
    ) -> tuple[jax.Array, list[Auxiliary]]:
        if stack.remainder:
            raise ValueError(
                f"{stack.num_layers} layers are no whole number of patterns of {len(stack.blocks)} blocks; attention "
                "is looked at in whole patterns only"
            )
        params = [nnx.split(block)[1] for block in stack.blocks]
        for index, layer in enumerate(stack.repeats.layers(params)):
            if not (isinstance(layer, SerialLayer) and isinstance(layer.mixer, AttentionLayer)):
                raise ValueError(f"layer {index} is no serial block with attention: {type(layer).__name__}")
            found.append(layer.mixer.weights(layer.mixer_branch.normed(x_BSD), context))
            x_BSD, _, _ = stack.repeats.layer(layer, x_BSD, context, key, index, None)
        return x_BSD, []

    with cut_by(look):
        model.hidden_states(**inputs)
    return found


def sharpness(weights: list[Float[Array, "B N S T"]], num_seen: Float[Array, "B S"]) -> Sharpness:
    """Entropy and saturation of attention weights.

    Args:
        weights: of `attention_weights`.
        num_seen: how many keys every query sees.

    Raises:
        ValueError: no query sees two keys, so that there is nothing to choose.
    """
    chooses = num_seen > 1
    if not bool(chooses.any()):
        raise ValueError("no query sees two keys: attention has nothing to choose from")
    most = jnp.log(jnp.where(chooses, num_seen, 2.0))
    entropies, maxima = [], []
    for w in weights:
        entropy = -jnp.sum(w * jnp.log(jnp.where(w > 0, w, 1.0)), axis=-1)
        entropies.append(_mean(entropy / most[:, None], chooses))
        maxima.append(_mean((w.max(axis=-1) > SATURATED).astype(jnp.float32), chooses))
    return Sharpness(entropy=float(jnp.mean(jnp.stack(entropies))), saturated=float(jnp.mean(jnp.stack(maxima))))


def _mean(values: Float[Array, "B N S"], counted: jax.Array) -> jax.Array:
    counted = jnp.broadcast_to(counted[:, None], values.shape)
    return jnp.sum(values * counted) / jnp.sum(counted)
