"""Matching of hidden states: the student's layers are to say what the teacher's say, not only its last one.

    projected   |x W - t|^2 / D           W is learned, for students that are narrower (Jiao et al. 2019, 1909.10351,
                                          section 3.1: hidden states and embeddings; Romero et al. 2014, 1412.6550,
                                          whose hints began it)
    feature     |x - t|^2 / D             of equal width, so no W (Sun et al. 2020, 2004.02984, section 3.4)
    statistics  (mean x - mean t)^2 + |var x - var t|      over the features of a state; beside it, feature maps are
                                          compared normalised (the decomposition of the same section, for stability)
    cosine      1 - cos(x, t)             direction only (Sanh et al. 2019, 1910.01108, section 3)

x is the student's state of a token and t the teacher's, both of D numbers (after W). All are sums over the tokens that
count, each with its weight, so that what is divided by does not depend on padding or on how the batch was cut. The
teacher's states have no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def projected_error(
    student: Float[Array, "*B D"],
    teacher: Float[Array, "*B E"],
    weights: Float[Array, "*B"],
    projection: Float[Array, "D E"] | None = None,
) -> Float[Array, ""]:
    """Weighted sum over tokens of the mean square difference, in float32.

    Args:
        student: states.
        teacher: states.
        weights: of every token.
        projection: from the student's width to the teacher's; None where they are equal.
    """
    if projection is not None:
        student = jnp.einsum("...D,DE->...E", student, projection.astype(student.dtype))
    difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return jnp.sum(weights * jnp.mean(jnp.square(difference), axis=-1))


def normalised(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """States with mean 0 and variance 1 over their features, float32; a constant one becomes 0."""
    x = x.astype(jnp.float32)
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-6)


def statistics_error(
    student: Float[Array, "*B D"], teacher: Float[Array, "*B E"], weights: Float[Array, "*B"]
) -> Float[Array, ""]:
    """Weighted sum over tokens of (mean_s - mean_t)^2 + |var_s - var_t| over the features of a state."""
    student, teacher = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    means = jnp.square(jnp.mean(student, axis=-1) - jnp.mean(teacher, axis=-1))
    return jnp.sum(weights * (means + jnp.abs(jnp.var(student, axis=-1) - jnp.var(teacher, axis=-1))))


def cosine_distance(
    student: Float[Array, "*B D"], teacher: Float[Array, "*B D"], weights: Float[Array, "*B"]
) -> Float[Array, ""]:
    """Weighted sum over tokens of 1 - cos; a state of length 0 is at distance 1 from everything."""
    x, t = student.astype(jnp.float32), jax.lax.stop_gradient(teacher).astype(jnp.float32)
    # 1e-12 under the root: the derivative of a norm at 0 is no number
    lengths = jnp.sqrt((jnp.sum(jnp.square(x), axis=-1) + 1e-12) * (jnp.sum(jnp.square(t), axis=-1) + 1e-12))
    return jnp.sum(weights * (1.0 - jnp.sum(x * t, axis=-1) / lengths))
