"""Sampling against a literal recomputation with sorted lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.sampling import Sampling, filtered_logits, sample


def literal(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None) -> np.ndarray:
    """The distribution that is drawn from, by the definitions, in float64."""
    scaled = logits.astype(np.float64) / temperature
    ranked = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k is not None:
        ranked = ranked[:top_k]
    weights = {i: np.exp(scaled[i] - max(scaled)) for i in ranked}
    if top_p is not None:
        mass, kept, total = 0.0, [], sum(weights.values())
        for i in ranked:
            if mass >= top_p:
                break
            kept.append(i)
            mass += weights[i] / total
        weights = {i: weights[i] for i in kept}
    probabilities = np.zeros(len(scaled))
    for i, weight in weights.items():
        probabilities[i] = weight / sum(weights.values())
    return probabilities


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 1.0])
def test_filtered_distribution_is_the_definition(temperature, top_k, top_p):
    logits = np.asarray(jax.random.normal(jax.random.key(3), (3, 17)) * 2)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    ours = jax.nn.softmax(filtered_logits(jnp.asarray(logits), sampling))
    theirs = [literal(row, temperature, top_k, top_p) for row in logits]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)  # float32 softmax against float64


def test_top_k_keeps_exactly_k_when_scores_tie():
    kept = filtered_logits(jnp.zeros((1, 9)), Sampling(top_k=4)) > -jnp.inf
    assert int(kept.sum()) == 4


def test_samples_follow_the_distribution():
    logits, draws = jnp.log(jnp.array([0.5, 0.25, 0.2, 0.05])), 20_000
    rows = jnp.broadcast_to(logits, (draws, 4))
    key = jax.random.key(0)
    tokens = sample(rows, Sampling(), key, jnp.arange(draws), jnp.full(draws, 7))
    frequency = np.bincount(np.asarray(tokens), minlength=4) / draws
    # binomial standard deviation at most sqrt(.25 / 20,000) = 0.0035; five of those
    np.testing.assert_allclose(frequency, [0.5, 0.25, 0.2, 0.05], atol=0.018)


def test_temperature_zero_takes_the_most_probable():
    logits = jax.random.normal(jax.random.key(0), (5, 11))
    tokens = sample(logits, Sampling(temperature=0), jax.random.key(0), jnp.arange(5), jnp.arange(5))
    np.testing.assert_array_equal(tokens, np.argmax(np.asarray(logits), -1))


def test_a_rows_sample_does_not_depend_on_its_batch():
    logits = jax.random.normal(jax.random.key(0), (6, 50))
    key, requests, positions = jax.random.key(1), jnp.arange(6), jnp.arange(6) + 10
    together = sample(logits, Sampling(), key, requests, positions)
    alone = [sample(logits[i : i + 1], Sampling(), key, requests[i : i + 1], positions[i : i + 1])[0] for i in range(6)]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_meaningless_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
