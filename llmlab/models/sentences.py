"""Sentences as vectors whose inner product is their likeness (Reimers and Gurevych 2019, 1908.10084).

    e = m / |m|        m = mean of the last states over the real tokens

BERT's own summary of a sentence compares badly; the mean of its states, after training on pairs that mean the same,
compares well. One pass per sentence instead of one per pair: 10,000 sentences are compared in seconds, not in days
(paper, section 1).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mean_pooled(
    states_BSD: Float[Array, "B S D"], attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None
) -> Float[Array, "B D"]:
    """Mean of the states of real tokens in float32; zero for a row of padding."""
    states_BSD = states_BSD.astype(jnp.float32)
    if attention_mask is None:
        return jnp.mean(states_BSD, axis=1)
    weights_BS = attention_mask.astype(jnp.float32)
    count_B1 = jnp.maximum(weights_BS.sum(axis=1, keepdims=True), 1.0)
    return jnp.einsum("BSD,BS->BD", states_BSD, weights_BS) / count_B1


def sentence_embeddings(
    model: Any,
    input_ids: Int[Array, "B S"],
    attention_mask: Bool[Array, "B S"] | Int[Array, "B S"] | None = None,
) -> Float[Array, "B D"]:
    """Vectors of length one; the inner product of two is their cosine similarity.

    Args:
        model: an encoder.
        input_ids: tokens of each sentence, with the frame that the model was trained with ([CLS] ... [SEP]).
        attention_mask: true or 1 where a token is real.
    """
    mean_BD = mean_pooled(model.hidden_states(input_ids, attention_mask=attention_mask).states, attention_mask)
    return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)
