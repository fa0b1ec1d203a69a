"""Dropout (Srivastava et al. 2014): zero each element with probability `rate`, scale the rest by 1/(1 - rate).

The random key is an argument. No key means evaluation, and dropout is the identity: there is no train/eval mode.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def check_rate(name: str, rate: float) -> None:
    """Raise ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{name}={rate} is not a probability below 1; use 0 for none, 0.1 is usual")


def dropout(x: Float[Array, "..."], rate: float, key: jax.Array | None) -> Float[Array, "..."]:
    """x with a fraction `rate` of its elements zeroed and the rest scaled up; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` keys from one; all None from None."""
    return [None] * num if key is None else list(jax.random.split(key, num))
