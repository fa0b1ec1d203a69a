"""Divergences: how far a student's distribution q over the vocabulary is from its teacher's p.

    ForwardKL          KL(p||q) = sum_v p log(p/q)                 cover all that the teacher says (Hinton et al. 2015,
                                                                  1503.02531)
    ReverseKL          KL(q||p) = sum_v q log(q/p)                 say nothing that it does not (Gu et al. 2023,
                                                                  2306.08543)
    JensenShannon(b)   b KL(p||m) + (1-b) KL(q||m),                between both: divided by b it tends to KL(p||q) for
                       m = b p + (1-b) q                          b -> 0, divided by 1-b to KL(q||p) for b -> 1
                                                                  (Agarwal et al. 2023, 2306.13649, section 2)
    TotalVariation     sum_v |p - q| / 2                           the most that any event's probability differs
                                                                  (Wen et al. 2023, 2307.15190)

All are zero where p = q and nowhere else. A student with enough capacity has the same best point under each; a smaller
one must choose what to give up: KL(p||q) is infinite where q misses what p has, so its student spreads out; KL(q||p) is
infinite where q has what p misses, so its student concentrates on a part of p.

**Temperature.** Both distributions may be softened, p = softmax(z/T), so that what is improbable is heard. The gradient
of a KL then shrinks as 1/T^2, hence the factor T^2: for large T, and logits z of the teacher and y of the student
without their means,

    T^2 d KL / d y  ->  (y - z) / N                                (Hinton et al. 2015, equation 4)

which is matching of logits. Total variation is of first order in the difference and takes the factor T.

An outcome may be a set of tokens ("all others"): every divergence here is an f-divergence, and those never grow when
outcomes are joined, so that the divergence of the joined distributions is a lower bound.
"""

import abc
import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True, kw_only=True)
class Divergence(abc.ABC):
    """A distance of two distributions, given as log-probabilities over the last dimension; -inf is probability 0."""

    order: ClassVar[int] = 2
    """Power of the temperature that keeps the gradient's size."""

    @abc.abstractmethod
    def __call__(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """In nats (total variation: 0 to 1); p is the teacher's, q the student's."""

    def softened(
        self, teacher_logits: Float[Array, "*B V"], student_logits: Float[Array, "*B V"], temperature: float = 1.0
    ) -> Float[Array, "*B"]:
        """T^order times the divergence of softmax(logits / T), float32. The teacher's logits have no gradient."""
        return _softened(self, temperature, jax.lax.stop_gradient(teacher_logits), student_logits)

    @abc.abstractmethod
    def slope(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """q_v dD/dq_v, up to a multiple of q, which no distribution can follow."""


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(teacher || student)."""

    def __call__(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        return kl(log_p, log_q)

    def slope(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return -jnp.exp(log_p)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(student || teacher)."""

    def __call__(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        return kl(log_q, log_p)

    def slope(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return jnp.exp(log_q) * (log_q - log_p)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """beta KL(teacher || m) + (1 - beta) KL(student || m), m the mixture of both with the same weights."""

    beta: float = 0.5
    """Weight of the teacher in the mixture, between 0 and 1; 0.5 is the symmetric divergence."""

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"beta={self.beta} is not between 0 and 1; at its ends the divergence is 0: use ForwardKL() for the "
                "limit at 0, ReverseKL() for that at 1"
            )

    def __call__(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        log_m = self._mixture(log_p, log_q)
        return self.beta * kl(log_p, log_m) + (1.0 - self.beta) * kl(log_q, log_m)

    def slope(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return (1.0 - self.beta) * jnp.exp(log_q) * (log_q - self._mixture(log_p, log_q))

    def _mixture(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return jnp.logaddexp(log_p + jnp.log(self.beta), log_q + jnp.log1p(-self.beta))


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """Half the sum of the differences' sizes."""

    order: ClassVar[int] = 1

    def __call__(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)

    def slope(self, log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        return 0.5 * jnp.exp(log_q) * jnp.sign(log_q - log_p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _softened(
    divergence: Divergence, temperature: float, teacher_logits: jax.Array, student_logits: jax.Array
) -> jax.Array:
    log_p, log_q = (_log_softmax(logits / temperature) for logits in (teacher_logits, student_logits))
    return temperature**divergence.order * divergence(log_p, log_q)


def _softened_forward(
    divergence: Divergence, temperature: float, teacher_logits: jax.Array, student_logits: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The value, and the gradient while both distributions are there: with s_v = dD/dq_v and q = softmax(y / T),
    dD/dy_v = q_v (s_v - sum_u q_u s_u) / T. Left to autodiff, it is twice the time of the value on a CPU."""
    log_p, log_q = (_log_softmax(logits / temperature) for logits in (teacher_logits, student_logits))
    slope = divergence.slope(log_p, log_q)
    gradient = slope - jnp.exp(log_q) * jnp.sum(slope, axis=-1, keepdims=True)
    value = temperature**divergence.order * divergence(log_p, log_q)
    like = jnp.zeros(0, student_logits.dtype)
    return value, (temperature ** (divergence.order - 1) * gradient, like)


def _softened_backward(
    divergence: Divergence, temperature: float, residuals: tuple[jax.Array, jax.Array], d_value: jax.Array
) -> tuple[None, jax.Array]:
    gradient, like = residuals
    return None, (d_value[..., None] * gradient).astype(like.dtype)


_softened.defvjp(_softened_forward, _softened_backward)


def kl(log_p: Float[Array, "*B V"], log_q: Float[Array, "*B V"]) -> Float[Array, "*B"]:
    """sum_v p (log p - log q), in which outcomes of p = 0 count nothing."""
    possible = log_p > -jnp.inf
    difference = jnp.where(possible, log_p, 0.0) - jnp.where(possible, log_q, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(log_p), 0.0) * difference, axis=-1)


def _log_softmax(logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    shifted = logits.astype(jnp.float32)
    shifted = shifted - jnp.max(shifted, axis=-1, keepdims=True)
    return shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
