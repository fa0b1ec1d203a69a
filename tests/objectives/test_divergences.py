"""Divergences against NumPy written from the definitions, and against what theorems say of their limits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objectives.divergences import Divergence, ForwardKL, JensenShannon, ReverseKL, TotalVariation

B, V = 4, 7
ALL = [ForwardKL(), ReverseKL(), JensenShannon(beta=0.3), TotalVariation()]


def logits(seed: int) -> Any:
    return jax.random.normal(jax.random.key(seed), (B, V)) * 2


def softmax(x: Any, temperature: float = 1.0) -> np.ndarray:
    e = np.exp(np.asarray(x, np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


def by_hand(divergence: Divergence, p: np.ndarray, q: np.ndarray) -> np.ndarray:
    def kl(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * np.log(a / b)).sum(-1)

    match divergence:
        case ForwardKL():
            return kl(p, q)
        case ReverseKL():
            return kl(q, p)
        case JensenShannon(beta=beta):
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case _:
            return 0.5 * np.abs(p - q).sum(-1)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_softened_divergences_equal_their_definitions(divergence: Divergence, temperature: float) -> None:
    teacher, student = logits(0), logits(1)
    expected = by_hand(divergence, softmax(teacher, temperature), softmax(student, temperature))
    factor = temperature if isinstance(divergence, TotalVariation) else temperature**2
    np.testing.assert_allclose(divergence.softened(teacher, student, temperature), factor * expected, rtol=2e-5)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: type(d).__name__)
def test_a_divergence_is_zero_with_zero_gradient_where_both_agree(divergence: Divergence) -> None:
    teacher = logits(0)
    # A student's logits may differ by a constant; total variation has a kink there, and no gradient to speak of.
    np.testing.assert_allclose(divergence.softened(teacher, teacher + 5.0), 0.0, atol=2e-6)
    if not isinstance(divergence, TotalVariation):
        gradient = jax.grad(lambda y: divergence.softened(teacher, y).sum())(teacher)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=lambda d: type(d).__name__)
def test_the_gradient_tends_to_matching_of_logits_as_the_temperature_grows(divergence: Divergence) -> None:
    teacher, student = logits(0), logits(1)
    centred = [
        np.asarray(x, np.float64) - np.asarray(x, np.float64).mean(-1, keepdims=True) for x in (student, teacher)
    ]
    matching = (centred[0] - centred[1]) / V
    distances = []
    for temperature in (10.0, 100.0):
        gradient = jax.grad(lambda y, t=temperature: divergence.softened(teacher, y, t).sum())(student)
        distances.append(np.abs(np.asarray(gradient) - matching).max())
    # What is left is of first order in 1/T: a tenth at ten times the temperature.
    np.testing.assert_allclose(distances[0] / distances[1], 10.0, rtol=0.2)
    assert distances[1] < 0.05 * np.abs(matching).max()


def test_total_variation_tends_to_the_distance_of_logits_as_the_temperature_grows() -> None:
    teacher, student = (np.asarray(logits(seed), np.float64) for seed in (0, 1))
    difference = teacher - student
    expected = np.abs(difference - difference.mean(-1, keepdims=True)).sum(-1) / (2 * V)
    found = [TotalVariation().softened(jnp.asarray(teacher), jnp.asarray(student), t) for t in (10.0, 100.0)]
    distances = [np.abs(np.asarray(x) - expected).max() for x in found]
    assert distances[0] > 5 * distances[1]  # of first order in 1/T: a tenth, but for the places where |.| has its kink
    np.testing.assert_allclose(found[1], expected, rtol=0.05)


def test_total_variation_is_bounded_by_the_root_of_half_the_kl() -> None:
    p, q = (jax.nn.log_softmax(logits(seed)) for seed in (0, 1))
    for kl in (ForwardKL()(p, q), ReverseKL()(p, q)):  # Pinsker's inequality
        assert np.all(np.asarray(TotalVariation()(p, q)) <= np.sqrt(np.asarray(kl) / 2))


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_closed_gradient_is_that_of_the_value(divergence: Divergence, temperature: float) -> None:
    teacher, student = logits(4), logits(5)

    def plain(y: Any) -> Any:
        log_p, log_q = (jax.nn.log_softmax(x / temperature) for x in (teacher, y))
        return (jnp.arange(1.0, B + 1) * temperature**divergence.order * divergence(log_p, log_q)).sum()

    closed = jax.grad(lambda y: (jnp.arange(1.0, B + 1) * divergence.softened(teacher, y, temperature)).sum())
    np.testing.assert_allclose(closed(student), jax.grad(plain)(student), rtol=1e-4, atol=2e-6)
    assert not np.any(jax.grad(lambda z: divergence.softened(z, student, temperature).sum())(teacher))


def test_generalised_jensen_shannon_tends_to_either_kl() -> None:
    p, q = (jax.nn.log_softmax(logits(seed)) for seed in (0, 1))
    forward, reverse = ForwardKL()(p, q), ReverseKL()(p, q)
    small = 1e-3  # float32: smaller weights leave no digits of a difference of logarithms
    np.testing.assert_allclose(JensenShannon(beta=small)(p, q) / small, forward, rtol=2e-2)
    np.testing.assert_allclose(JensenShannon(beta=1 - small)(p, q) / small, reverse, rtol=2e-2)
    symmetric = JensenShannon(beta=0.5)
    np.testing.assert_allclose(symmetric(p, q), symmetric(q, p), rtol=1e-5)
    assert float(symmetric(p, q).max()) <= np.log(2)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: type(d).__name__)
def test_joining_outcomes_never_makes_a_divergence_larger(divergence: Divergence) -> None:
    p, q = (jax.nn.log_softmax(logits(seed)) for seed in (2, 3))

    def joined(x: Any) -> Any:
        return jnp.concatenate([x[:, :3], jax.nn.logsumexp(x[:, 3:], axis=-1, keepdims=True)], axis=-1)

    whole, part = divergence(p, q), divergence(joined(p), joined(q))
    assert np.all(np.asarray(part) <= np.asarray(whole) + 1e-6)
    assert np.all(np.asarray(part) > 0)


@pytest.mark.parametrize("divergence", ALL, ids=lambda d: type(d).__name__)
def test_an_impossible_outcome_gives_no_nan(divergence: Divergence) -> None:
    p = jnp.log(jnp.asarray([[0.5, 0.5, 0.0]]))
    q = jnp.asarray([[0.2, 0.3, 0.1]])
    value, gradient = jax.value_and_grad(lambda y: divergence(p, jax.nn.log_softmax(y)).sum())(q)
    if isinstance(divergence, ReverseKL):
        assert np.isinf(value)  # q has what p excludes
    else:
        assert np.isfinite(value)
        assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0])
def test_a_mixture_of_one_only_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"use ForwardKL\(\) for the limit at 0"):
        JensenShannon(beta=beta)
