"""Soft targets in chunks against whole logits, a live teacher against a stored one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objectives.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from llmlab.objectives.soft_targets import LiveTeacher, Mixing, StoredTeacher, soft_target_loss

B, S, D, E, V = 2, 7, 5, 6, 11
HEADS = (("hidden", "head"), ("teacher", "teacher_head"))
DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(beta=0.4), TotalVariation()]


def arrays(seed: int = 0) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = {"hidden": (B, S, D), "head": (D, V), "teacher": (B, S, E), "teacher_head": (E, V)}
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


LABELS = jnp.asarray(np.where(np.random.default_rng(0).random((B, S)) < 0.3, -100, 4), jnp.int32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).random((B, S)), jnp.float32)


def live(a: dict[str, Any]) -> LiveTeacher:
    return LiveTeacher(hidden=a["teacher"], project=lambda h: h @ a["teacher_head"])


def whole(a: dict[str, Any], mixing: Mixing) -> Any:
    """The loss from whole logits."""
    student, teacher = a["hidden"] @ a["head"], a["teacher"] @ a["teacher_head"]
    soft = mixing.divergence.softened(teacher, student, mixing.temperature)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(student), jnp.maximum(LABELS, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(LABELS == -100, 0.0, WEIGHTS) * (mixing.soft * soft + mixing.hard * nll))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
@pytest.mark.parametrize("chunk", [2, None])
def test_chunks_equal_whole_logits_and_the_teacher_has_no_gradient(divergence: Any, chunk: int | None) -> None:
    a, mixing = arrays(), Mixing(divergence=divergence, temperature=2.0, soft=0.7, hard=0.3)

    def chunked(a: dict[str, Any]) -> Any:
        return soft_target_loss(
            a["hidden"], lambda h: h @ a["head"], live(a), LABELS, WEIGHTS, mixing=mixing, chunk=chunk
        ).total

    value, gradient = jax.jit(jax.value_and_grad(chunked))(a)
    expected, expected_gradient = jax.jit(jax.value_and_grad(lambda a: whole(a, mixing)))(a)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for name in ("hidden", "head"):
        np.testing.assert_allclose(gradient[name], expected_gradient[name], rtol=2e-4, atol=2e-6)
    for name in ("teacher", "teacher_head"):
        assert not np.any(gradient[name])


@pytest.mark.parametrize("chunk", [2, 3, None])
def test_heads_may_flatten_their_positions(chunk: int | None) -> None:
    """As a dense head does on a CPU: what is traced of it holds for one shape alone."""
    a, mixing = arrays(), Mixing(temperature=2.0, hard=0.3)

    def flat(head: str) -> Any:
        return lambda h: (h.reshape(-1, h.shape[-1]) @ a[head]).reshape(*h.shape[:-1], -1)

    teacher = LiveTeacher(hidden=a["teacher"], project=flat("teacher_head"))
    got = soft_target_loss(a["hidden"], flat("head"), teacher, LABELS, WEIGHTS, mixing=mixing, chunk=chunk).total
    np.testing.assert_allclose(got, whole(a, mixing), rtol=2e-5)


def test_labels_are_mixed_in_as_defined() -> None:
    a, mixing = arrays(), Mixing(temperature=3.0, soft=0.6, hard=0.4)
    found = soft_target_loss(a["hidden"], lambda h: h @ a["head"], live(a), LABELS, WEIGHTS, mixing=mixing)
    y, z = (np.asarray(a[x], np.float64) @ np.asarray(a[h], np.float64) for x, h in HEADS)

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q, nll = log_softmax(z / 3), log_softmax(y / 3), -log_softmax(y)
    counted = np.asarray(LABELS) != -100
    total = 0.0
    for b, s in zip(*np.nonzero(counted), strict=True):
        kl = np.sum(np.exp(log_p[b, s]) * (log_p[b, s] - log_q[b, s]))
        total += float(WEIGHTS[b, s]) * (0.6 * 9 * kl + 0.4 * nll[b, s, int(LABELS[b, s])])
    np.testing.assert_allclose(found.total, total, rtol=1e-5)


def test_a_teacher_that_is_sure_of_the_label_is_a_label() -> None:
    """One that puts all its mass on the labels teaches what cross-entropy does, value and gradient."""
    a = arrays()
    sure = jax.nn.one_hot(jnp.maximum(LABELS, 0), V) * 200.0
    teacher = LiveTeacher(hidden=sure, project=lambda h: h)

    def loss(hidden: Any, mixing: Mixing) -> Any:
        return soft_target_loss(hidden, lambda h: h @ a["head"], teacher, LABELS, WEIGHTS, mixing=mixing).total

    soft, hard = (
        jax.value_and_grad(lambda h, m=m: loss(h, m))(a["hidden"]) for m in (Mixing(), Mixing(soft=0.0, hard=1.0))
    )
    np.testing.assert_allclose(soft[0], hard[0], rtol=1e-5)
    np.testing.assert_allclose(soft[1], hard[1], rtol=1e-4, atol=1e-6)


def stored(a: dict[str, Any], k: int, temperature: float, sampled: bool = False) -> StoredTeacher:
    log_p = jax.nn.log_softmax(a["teacher"] @ a["teacher_head"] / temperature)
    top, ids = jax.lax.top_k(log_p, k)
    others = jnp.log(jnp.maximum(1 - jnp.exp(top).sum(-1), 1e-30))
    return StoredTeacher(ids=ids, log_probabilities=top, log_rest=others, sampled=sampled)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
def test_a_stored_teacher_equals_the_live_one_at_k_of_the_vocabulary(divergence: Any) -> None:
    a, mixing = arrays(), Mixing(divergence=divergence, temperature=2.0)

    def loss(hidden: Any, teacher: Any) -> Any:
        return soft_target_loss(hidden, lambda h: h @ a["head"], teacher, LABELS, mixing=mixing, chunk=3).total

    value, gradient = jax.value_and_grad(lambda h: loss(h, stored(a, V, 2.0)))(a["hidden"])
    expected, expected_gradient = jax.value_and_grad(lambda h: loss(h, live(a)))(a["hidden"])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: type(d).__name__)
def test_fewer_entries_are_a_lower_bound_that_rises_to_the_whole(divergence: Any) -> None:
    a, mixing = arrays(), Mixing(divergence=divergence)

    def loss(teacher: Any) -> float:
        return float(soft_target_loss(a["hidden"], lambda h: h @ a["head"], teacher, LABELS, mixing=mixing).total)

    values = [loss(stored(a, k, 1.0)) for k in (1, 4, V - 1)]
    assert values == sorted(values)
    np.testing.assert_allclose(values[-1], loss(live(a)), rtol=1e-3)  # one other token: nothing is joined
    assert values[0] < 0.9 * loss(live(a))


def test_drawn_tokens_give_the_gradient_of_forward_kl_on_average() -> None:
    a, draws = arrays(), 20_000
    log_p = jax.nn.log_softmax(a["teacher"] @ a["teacher_head"])
    ids = jnp.moveaxis(jax.random.categorical(jax.random.key(5), log_p, shape=(draws, B, S)), 0, -1)
    teacher = StoredTeacher(
        ids=ids,
        log_probabilities=jnp.full(ids.shape, -np.log(draws), jnp.float32),
        log_rest=jnp.full((B, S), -jnp.inf),
        sampled=True,
    )

    def gradient(teacher: Any) -> Any:
        return jax.grad(lambda h: soft_target_loss(h, lambda h: h @ a["head"], teacher, LABELS).total)(a["hidden"])

    # The mean of n draws is off by 1/sqrt(n) of their spread, here about 2: four of those.
    np.testing.assert_allclose(gradient(teacher), gradient(live(a)), atol=4 * 2 / np.sqrt(draws))
    with pytest.raises(ValueError, match="drawn tokens"):
        soft_target_loss(a["hidden"], lambda h: h @ a["head"], teacher, LABELS, mixing=Mixing(divergence=ReverseKL()))


def test_rows_of_a_vocabulary_that_are_no_tokens_are_left_out() -> None:
    a = arrays()
    wide = jnp.concatenate([a["teacher_head"], jnp.full((E, 3), 9.0)], axis=1)
    teacher = LiveTeacher(hidden=a["teacher"], project=lambda h: h @ wide)
    parts = soft_target_loss(a["hidden"], lambda h: h @ a["head"], teacher, LABELS, num_tokens=V)
    same = soft_target_loss(a["hidden"], lambda h: h @ a["head"], live(a), LABELS)
    np.testing.assert_allclose(parts.total, same.total, rtol=1e-6)
    assert set(parts.metrics) == {"loss", "divergence", "accuracy", "agreement"}


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"soft": 0.0}, {"soft": -1.0}])
def test_mixtures_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not"):
        Mixing(**wrong)
