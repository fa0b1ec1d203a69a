"""Dropout (Srivastava et al. 2014): zero each element with probability `rate`, scale the rest by 1/(1 - rate).

The random key is an argument. No key means evaluation, and dropout is the identity: there is no train/eval mode.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Float, UInt32


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


def factor_at(
    rate: float, seed: UInt32[Array, "2"], shape: tuple[int, ...], row: jax.Array, column: jax.Array
) -> Float[Array, "..."]:
    """Dropout's factor, 0 or 1 / (1 - rate), on elements that are known by two numbers.

    One Threefry block (Salmon et al. 2011) of row and column under the seed. Because the element and not its place in
    an array is hashed, the same elements are dropped however the work is cut and wherever it runs.

    Args:
        rate: probability of 0.
        seed: one random number for all.
        shape: of the result.
        row: number of each element, broadcast to the shape.
        column: another number of it.
    """
    words = [jnp.broadcast_to(x, shape) for x in (*seed, row.astype(jnp.uint32), column.astype(jnp.uint32))]
    # The primitive and not jax.random.bits: its counter is ours to choose.
    bits, _ = threefry2x32_p.bind(*words)
    keep = 1.0 - rate
    return jnp.where(bits < np.uint32(keep * 2**32), np.float32(1.0 / keep), np.float32(0.0))


def split_key(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` keys from one; all None from None."""
    return [None] * num if key is None else list(jax.random.split(key, num))
