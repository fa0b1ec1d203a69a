"""Matching of attention: where the teacher's tokens look is worth knowing, whatever their states are.

    maps        mean over heads and keys of (A_s - A_t)^2           the products of queries and keys, before the softmax
                (Jiao et al. 2019, 1909.10351, section 3.1: those fit faster than after it)
    transfer    mean over heads of KL(softmax_t || softmax_s)       (Wang et al. 2020, 2002.10957, section 3.1: MiniLM;
                Sun et al. 2020, 2004.02984, section 3.4: MobileBERT)
    relations   the same of R = softmax(X X^T / sqrt(d)), where X are the values (MiniLM, section 3.2), or queries, keys
                and values each with themselves (Wang et al. 2020, 2012.15828: MiniLMv2)

A relation is a distribution over tokens, of whatever width X is: student and teacher need not be equally wide. Nor need
they have equally many heads: heads are laid side by side and cut anew into so many relation heads
(MiniLMv2). Costs are those of attention's weights, O(S^2) a head, of the layers that are matched.

All are sums over the queries that count, each with its weight; a query's keys are those that it may see, so that
padding changes nothing. (The papers divide by the padded length.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llmlab.objectives.divergences import kl


def map_error(
    student: Float[Array, "*B N S T"],
    teacher: Float[Array, "*B N S T"],
    allowed: Bool[Array, "*C 1 S T"],
    weights: Float[Array, "*B S"],
) -> Float[Array, ""]:
    """Weighted sum over queries of the mean over heads and seen keys of the squared difference, float32.

    Args:
        student: scaled products of queries and keys.
        teacher: the same, of as many heads; without gradient.
        allowed: which keys a query sees, the leading dimensions those of the maps or 1.
        weights: of every query.
    """
    difference = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    seen = jnp.maximum(jnp.sum(allowed, axis=-1), 1)
    of_query = jnp.sum(jnp.where(allowed, jnp.square(difference), 0.0), axis=-1) / seen
    return jnp.sum(weights * jnp.mean(of_query, axis=-2))


def attention_transfer(
    student: Float[Array, "*B N S T"], teacher: Float[Array, "*B N S T"], weights: Float[Array, "*B S"]
) -> Float[Array, ""]:
    """Weighted sum over queries of the mean over heads of KL(teacher || student), float32.

    Args:
        student: log-weights, -inf where a key is not seen.
        teacher: the same, of as many heads; without gradient.
        weights: of every query.
    """
    return jnp.sum(weights * jnp.mean(kl(jax.lax.stop_gradient(teacher), student), axis=-2))


def relation(x: Float[Array, "*B S N H"], allowed: Bool[Array, "*C 1 S S"], num_heads: int) -> Float[Array, "*B R S S"]:
    """log softmax(X X^T / sqrt(d)) over the tokens that each may see, in `num_heads` relation heads of width d.

    Raises:
        ValueError: the heads' widths together are no multiple of `num_heads`.
    """
    width = x.shape[-2] * x.shape[-1]
    if width % num_heads:
        raise ValueError(
            f"relation_heads={num_heads} does not divide {width}, the width of {x.shape[-2]} heads of {x.shape[-1]}; "
            "use a divisor of both models' widths"
        )
    head_dim = width // num_heads
    x = x.reshape(*x.shape[:-2], num_heads, head_dim).astype(jnp.float32)
    logits = jnp.einsum("...SRD,...TRD->...RST", x, x) / jnp.sqrt(jnp.float32(head_dim))
    return masked_log_softmax(logits, allowed)


def masked_log_softmax(logits: Float[Array, "*B N S T"], allowed: Bool[Array, "*C 1 S T"]) -> Float[Array, "*B N S T"]:
    """log softmax over the keys that are seen, -inf elsewhere; of a query that sees none, -inf everywhere."""
    finite = jnp.where(allowed, logits.astype(jnp.float32), -1e30)
    top = jax.lax.stop_gradient(jnp.max(finite, axis=-1, keepdims=True))
    total = jnp.sum(jnp.where(allowed, jnp.exp(finite - top), 0.0), axis=-1, keepdims=True)
    return jnp.where(allowed, finite - top - jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
