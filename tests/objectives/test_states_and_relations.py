"""Matching of states and of attention against NumPy, and what must not matter: padding, rotations, other widths."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objectives.relations import attention_transfer, map_error, masked_log_softmax, relation
from llmlab.objectives.states import cosine_distance, normalised, projected_error, statistics_error

B, S, D, E, N, H = 2, 4, 3, 5, 2, 3
RNG = np.random.default_rng(0)
X, T = RNG.normal(size=(B, S, D)).astype(np.float32), RNG.normal(size=(B, S, E)).astype(np.float32)
W = RNG.normal(size=(D, E)).astype(np.float32)
WEIGHTS = np.asarray([[1, 1, 0, 0], [1, 2, 1, 1]], np.float32)
ALLOWED = np.tril(np.ones((B, 1, S, S), bool))
ALLOWED[0, :, :, 3] = False


def test_states_equal_their_definitions() -> None:
    expected = sum(WEIGHTS[b, s] * np.mean((X[b, s] @ W - T[b, s]) ** 2) for b in range(B) for s in range(S))
    np.testing.assert_allclose(projected_error(*map(jnp.asarray, (X, T, WEIGHTS, W))), expected, rtol=1e-5)
    other = T[..., :D]
    plain = (WEIGHTS * ((X - other) ** 2).mean(-1)).sum()
    np.testing.assert_allclose(projected_error(*map(jnp.asarray, (X, other, WEIGHTS))), plain, rtol=1e-5)
    cosines = (X * other).sum(-1) / np.linalg.norm(X, axis=-1) / np.linalg.norm(other, axis=-1)
    np.testing.assert_allclose(
        cosine_distance(*map(jnp.asarray, (X, other, WEIGHTS))), (WEIGHTS * (1 - cosines)).sum(), rtol=1e-5
    )
    moments = (X.mean(-1) - T.mean(-1)) ** 2 + np.abs(X.var(-1) - T.var(-1))
    np.testing.assert_allclose(
        statistics_error(*map(jnp.asarray, (X, T, WEIGHTS))), (WEIGHTS * moments).sum(), rtol=1e-5
    )


def test_the_best_projection_is_that_of_least_squares() -> None:
    x, t = (RNG.normal(size=(2, 40, width)).astype(np.float32) for width in (D, E))
    weights = RNG.uniform(0.5, 2.0, size=(2, 40)).astype(np.float32)
    root = np.sqrt(weights)[..., None]
    best, residual, _, _ = np.linalg.lstsq((root * x).reshape(-1, D), (root * t).reshape(-1, E), rcond=None)
    loss = jax.value_and_grad(lambda w: projected_error(jnp.asarray(x), jnp.asarray(t), jnp.asarray(weights), w))
    value, gradient = loss(jnp.asarray(best))
    np.testing.assert_allclose(value, residual.sum() / E, rtol=1e-4)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-4)


def test_the_cosine_of_unit_vectors_is_half_their_squared_distance() -> None:
    x, t = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (X, T[..., :D]))
    args = [jnp.asarray(v) for v in (x, t, WEIGHTS)]
    np.testing.assert_allclose(cosine_distance(*args), projected_error(*args) * D / 2, rtol=1e-4)


def test_states_that_differ_in_scale_and_shift_differ_in_statistics_alone() -> None:
    moved = 2.0 * X + 1.0
    same = [normalised(jnp.asarray(v)) for v in (X, moved)]
    np.testing.assert_allclose(projected_error(*same, weights=jnp.asarray(WEIGHTS)), 0.0, atol=1e-5)
    expected = (WEIGHTS * ((X.mean(-1) + 1.0) ** 2 + 3.0 * X.var(-1))).sum()
    found = statistics_error(*map(jnp.asarray, (X, moved, WEIGHTS)))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_directions_alone_count_for_cosines_and_a_state_of_nothing_has_a_gradient() -> None:
    x, weights = jnp.asarray(X), jnp.asarray(WEIGHTS)
    np.testing.assert_allclose(cosine_distance(x, 7.0 * x, weights), 0.0, atol=1e-5)
    np.testing.assert_allclose(cosine_distance(x, -x, weights), 2 * WEIGHTS.sum(), rtol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda x: cosine_distance(x, jnp.asarray(X), weights))(jnp.zeros_like(x))))


@pytest.mark.parametrize("function", [projected_error, cosine_distance, statistics_error])
def test_teachers_states_have_no_gradient(function: Any) -> None:
    x, weights = jnp.asarray(X), jnp.asarray(WEIGHTS)
    assert not np.any(jax.grad(lambda t: function(x, t, weights))(x + 1.0))


def masked(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    e = np.where(allowed, np.exp(logits.astype(np.float64)), 0.0)
    return e / np.maximum(e.sum(-1, keepdims=True), 1e-300)


def kl_by_hand(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), 0).sum(-1)


def test_attention_maps_and_transfer_equal_their_definitions() -> None:
    a, b = RNG.normal(size=(2, B, N, S, S)).astype(np.float32)
    seen = ALLOWED.sum(-1)
    expected = (WEIGHTS * (np.where(ALLOWED, (a - b) ** 2, 0).sum(-1) / np.maximum(seen, 1)).mean(1)).sum()
    np.testing.assert_allclose(map_error(*map(jnp.asarray, (a, b, ALLOWED, WEIGHTS))), expected, rtol=1e-5)
    logs = [masked_log_softmax(jnp.asarray(x), jnp.asarray(ALLOWED)) for x in (a, b)]
    np.testing.assert_allclose(np.exp(logs[0]), masked(a, ALLOWED), rtol=1e-5, atol=1e-7)
    divergence = (WEIGHTS * kl_by_hand(masked(b, ALLOWED), masked(a, ALLOWED)).mean(1)).sum()
    np.testing.assert_allclose(attention_transfer(logs[0], logs[1], jnp.asarray(WEIGHTS)), divergence, rtol=1e-5)


def test_attention_that_differs_little_differs_by_half_the_variance_of_its_logits() -> None:
    """KL(softmax(b) || softmax(b + e d)) -> e^2 / 2 Var(d), the variance under softmax(b)."""
    b, d = (RNG.normal(size=(B, N, S, S)).astype(np.float32) for _ in range(2))
    p = masked(b, ALLOWED)
    variance = (p * d**2).sum(-1) - (p * d).sum(-1) ** 2
    expected = 0.5 * (WEIGHTS * variance.mean(1)).sum()

    def transfer(e: float) -> float:
        logs = [masked_log_softmax(jnp.asarray(x), jnp.asarray(ALLOWED)) for x in (b + np.float32(e) * d, b)]
        return float(attention_transfer(*logs, weights=jnp.asarray(WEIGHTS))) / e**2

    # Float32: a smaller e leaves no digits of a KL of e^2.
    np.testing.assert_allclose(transfer(0.03), expected, rtol=0.05)
    assert abs(transfer(0.3) - expected) > 3 * abs(transfer(0.03) - expected)


def test_what_all_keys_of_a_query_have_in_common_is_seen_by_maps_alone() -> None:
    b = RNG.normal(size=(B, N, S, S)).astype(np.float32)
    shift = RNG.normal(size=(B, N, S, 1)).astype(np.float32)
    args = jnp.asarray(ALLOWED), jnp.asarray(WEIGHTS)
    seen = ALLOWED.sum(-1, keepdims=True) > 0
    expected = (WEIGHTS * (np.where(seen, shift, 0.0)[..., 0] ** 2).mean(1)).sum()
    np.testing.assert_allclose(map_error(jnp.asarray(b + shift), jnp.asarray(b), *args), expected, rtol=1e-4)
    logs = [masked_log_softmax(jnp.asarray(x), args[0]) for x in (b + shift, b)]
    np.testing.assert_allclose(attention_transfer(*logs, weights=args[1]), 0.0, atol=1e-5)


def test_relations_equal_their_definition_and_do_not_know_rotations_of_a_head() -> None:
    x = RNG.normal(size=(B, S, N, H)).astype(np.float32)
    found = np.asarray(relation(jnp.asarray(x), jnp.asarray(ALLOWED), 3))
    split = x.reshape(B, S, 3, 2)
    expected = masked(np.einsum("bsrd,btrd->brst", split, split) / np.sqrt(2), ALLOWED)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-5, atol=1e-7)
    turn = np.linalg.qr(RNG.normal(size=(2, 2)))[0].astype(np.float32)
    turned = (split @ turn).reshape(x.shape)
    np.testing.assert_allclose(relation(jnp.asarray(turned), jnp.asarray(ALLOWED), 3), found, rtol=1e-4, atol=1e-5)


def test_a_student_of_another_width_and_head_count_can_have_the_same_relations() -> None:
    x = RNG.normal(size=(B, S, 1, 4)).astype(np.float32)
    # Twice as wide, each number twice: products double, and the root of the width takes sqrt(2) of it.
    wide = np.repeat(x, 2, axis=-1).reshape(B, S, 4, 2) / np.float32(2**0.25)
    args = (jnp.asarray(ALLOWED), 2)
    weights = jnp.asarray(WEIGHTS)
    same = attention_transfer(relation(jnp.asarray(x), *args), relation(jnp.asarray(wide), *args), weights)
    np.testing.assert_allclose(same, 0.0, atol=1e-5)
    with pytest.raises(ValueError, match="relation_heads=3 does not divide 4"):
        relation(jnp.asarray(x), jnp.asarray(ALLOWED), 3)


def test_what_no_query_sees_changes_nothing_and_gives_finite_gradients() -> None:
    x = jnp.asarray(RNG.normal(size=(B, S, N, H)), jnp.float32)
    allowed = np.array(ALLOWED)
    allowed[:, :, :, 2:] = False
    allowed[0, 0, 1] = False  # a query that sees nothing
    moved = x.at[:, 2:].add(9.0)
    weights = jnp.asarray(np.asarray([[1, 1, 0, 0], [1, 1, 0, 0]], np.float32))

    def loss(y: Any) -> Any:
        return attention_transfer(
            relation(y, jnp.asarray(allowed), N), relation(x + 0.3, jnp.asarray(allowed), N), weights
        )

    np.testing.assert_allclose(loss(moved), loss(x), rtol=1e-6)
    assert np.all(np.isfinite(jax.grad(loss)(x)))
