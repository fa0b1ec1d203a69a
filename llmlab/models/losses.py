"""The losses that models return when they are called with labels: plain means, for looking at a model by hand.

Training uses `llmlab.objectives`, which give sums and never hold all logits; a test asserts that both agree.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORED = -100
"""Label that is not counted."""


def mean_cross_entropy(logits: Float[Array, "*B C"], labels: Int[Array, "*B"]) -> Float[Array, ""]:
    """Mean over the counted labels, in nats; 0 where none is."""
    counted = labels != IGNORED
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_probs, jnp.where(counted, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.sum(nll * counted) / jnp.maximum(jnp.sum(counted), 1)


def mean_squared_error(predictions: Float[Array, "*B C"], targets: Float[Array, "..."]) -> Float[Array, ""]:
    """Mean of the squared differences; targets have the predictions' shape, a last dimension of 1 may be absent."""
    return jnp.mean(jnp.square(predictions.astype(jnp.float32) - targets.reshape(predictions.shape)))


def mean_binary_cross_entropy(logits: Float[Array, "*B C"], labels: Float[Array, "*B C"]) -> Float[Array, ""]:
    """Mean over rows and labels, each label a yes-or-no question of its own, in nats."""
    logits = logits.astype(jnp.float32)
    return -jnp.mean(labels * jax.nn.log_sigmoid(logits) + (1 - labels) * jax.nn.log_sigmoid(-logits))
