"""Sampling: from the scores of the next token to a token.

    temperature t   p_i proportional to exp(z_i / t); 0 is greedy, the most probable token
    top-k           only the k most probable tokens (Fan et al. 2018, 1805.04833)
    top-p           only the smallest set of most probable tokens whose mass reaches p (nucleus sampling, Holtzman et
                    al. 2020, 1904.09751), after temperature and top-k

The random key of a token is a function of (seed, request, position) alone, so what a request samples does not depend
on the batch it is decoded in.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """Divides the scores: 0 is greedy, below 1 sharper, above 1 flatter."""
    top_k: int | None = None
    """Draw among the k most probable tokens only."""
    top_p: float | None = None
    """Draw among the most probable tokens whose mass reaches p only."""
    seed: int = 0
    """Same seed, same text."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature} is negative; 0 is greedy, 1 the model's own distribution")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} is not positive; 1 is greedy, leave it out for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]; 0.9 is usual, leave it out for all tokens")


def filtered_logits(logits_BV: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits after temperature, top-k and top-p; minus infinity for tokens that cannot be drawn. Not for greedy."""
    logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        return logits_BV
    # A stable sort ranks equal scores by token, so exactly k tokens remain.
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    ranked_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    keep_BV = jnp.ones(ranked_BV.shape, bool)
    if sampling.top_k is not None:
        keep_BV = keep_BV & (jnp.arange(ranked_BV.shape[-1]) < sampling.top_k)
        ranked_BV = jnp.where(keep_BV, ranked_BV, -jnp.inf)
    if sampling.top_p is not None:
        probabilities_BV = jax.nn.softmax(ranked_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        keep_BV = keep_BV & (before_BV < sampling.top_p)
    rows_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    allowed_BV = jnp.zeros(keep_BV.shape, bool).at[rows_B1, order_BV].set(keep_BV)
    return jnp.where(allowed_BV, logits_BV, -jnp.inf)


def sample(
    logits_BV: Float[Array, "B V"],
    sampling: Sampling,
    key: jax.Array,
    request_B: Int[Array, "B"],
    position_B: Int[Array, "B"],
) -> Int[Array, "B"]:
    """One token per row.

    Args:
        logits_BV: scores of the next token.
        sampling: how to draw; its seed is not looked at here, `key` is `jax.random.key(seed)`.
        key: random key of the whole call.
        request_B: number of the request that the row belongs to.
        position_B: position that the new token will take.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1)

    def draw(logits_V: jax.Array, request: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, request), position), logits_V)

    return jax.vmap(draw)(filtered_logits(logits_BV, sampling), request_B, position_B)
