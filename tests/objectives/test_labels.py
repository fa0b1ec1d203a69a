"""Objectives over labels, against loops in float64."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objectives import Classification, QuestionAnswering, TokenClassification
from llmlab.objectives.labels import LabelObjective

B, S, C = 5, 7, 4
RNG = np.random.default_rng(1)


class Model:
    """Scores that the test has drawn; keeps what it was called with."""

    def __init__(self, terms: dict[str, float] | None = None, **scores: Any) -> None:
        self.scores = {name: jnp.asarray(array, jnp.float32) for name, array in scores.items()}
        self.terms = terms or {}
        self.called: set[str] = set()

    def __call__(self, *, key: Any = None, **inputs: jax.Array) -> Any:
        self.called = set(inputs)
        return SimpleNamespace(**self.scores, auxiliary={"load": jnp.ones(2)} if self.terms else {})

    def auxiliary_losses(self, auxiliary: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: value * jnp.mean(auxiliary["load"]) for name, value in self.terms.items()}


def by_hand(logits: Any, labels: Any, smoothing: float, weights: Any = None) -> tuple[float, float, float, float]:
    """(objective, nll, correct, count)."""
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    objective = nll = correct = count = 0.0
    for place in np.ndindex(labels.shape):
        if labels[place] == -100:
            continue
        z, w = logits[place], 1.0 if weights is None else float(weights[place])
        log_p = z - np.log(np.exp(z).sum())
        target = np.full(len(z), smoothing / len(z))
        target[labels[place]] += 1 - smoothing
        objective -= w * (target @ log_p)
        nll -= w * log_p[labels[place]]
        correct += w * (z.argmax() == labels[place])
        count += w
    return objective, nll, correct, count


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("objective", "shape"), [(Classification, (B,)), (TokenClassification, (B, S))])
def test_sums_are_those_of_a_loop_over_labels(objective: type[LabelObjective], shape: Any, smoothing: float) -> None:
    logits = RNG.normal(size=(*shape, C))
    labels = np.where(RNG.random(shape) < 0.3, -100, RNG.integers(0, C, shape))
    weights = RNG.choice([0.0, 0.5, 2.0], shape)
    batch = {
        "labels": jnp.asarray(labels, jnp.int32),
        "loss_mask": jnp.asarray(weights, jnp.float32),
        "input_ids": jnp.zeros((B, S), jnp.int32),
    }
    made = objective(label_smoothing=smoothing)
    parts = made.loss(Model(logits=logits), batch)
    expected = by_hand(logits, labels, smoothing, weights)
    np.testing.assert_allclose(
        (parts.total, parts.metrics["loss"], parts.metrics["accuracy"], parts.count), expected, rtol=1e-5
    )
    assert made.count(batch) == parts.count
    assert ("objective" in parts.metrics) == bool(smoothing)


def test_rows_of_any_kind_go_to_the_model_by_name() -> None:
    scores = RNG.normal(size=(B, C))
    pixels = {"pixel_values": jnp.ones((B, 4, 4, 1)), "labels": jnp.zeros(B, jnp.int32)}
    text = {name: jnp.ones((B, S), jnp.int32) for name in ("input_ids", "attention_mask", "token_type_ids")}
    for batch, names in ((pixels, {"pixel_values"}), (text | {"labels": jnp.zeros(B, jnp.int32)}, set(text))):
        model = Model(logits=scores)
        Classification().loss(model, batch)
        assert model.called == names


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_answers_are_scored_at_both_ends(smoothing: float) -> None:
    starts, ends = RNG.normal(size=(2, B, S))
    start, end = np.array([0, 2, S, -100, 6]), np.array([3, 2, S, -100, 6])  # beyond the row; a blank row
    starts[4, 6] = ends[4, 6] = 9.0
    batch = {
        "input_ids": jnp.zeros((B, S), jnp.int32),
        "start_positions": jnp.asarray(start, jnp.int32),
        "end_positions": jnp.asarray(end, jnp.int32),
    }
    objective = QuestionAnswering(label_smoothing=smoothing)
    parts = objective.loss(Model(start_logits=starts, end_logits=ends), batch)
    labels = [np.where(x == S, -100, x) for x in (start, end)]
    first, second = by_hand(starts, labels[0], smoothing), by_hand(ends, labels[1], smoothing)
    np.testing.assert_allclose(parts.total, (first[0] + second[0]) / 2, rtol=1e-5)
    np.testing.assert_allclose(parts.metrics["loss"], (first[1] + second[1]) / 2, rtol=1e-5)
    exact = sum(starts[b].argmax() == start[b] and ends[b].argmax() == end[b] for b in (0, 1, 4))
    assert parts.metrics["exact_accuracy"] == exact >= 1
    assert parts.count == objective.count(batch) == 3


def test_terms_of_the_layers_are_added() -> None:
    batch = {"labels": jnp.zeros(B, jnp.int32), "input_ids": jnp.zeros((B, S), jnp.int32)}
    logits = RNG.normal(size=(B, C))
    plain = Classification().loss(Model(logits=logits), batch)
    parts = Classification().loss(Model(terms={"balance": 0.5}, logits=logits), batch)
    np.testing.assert_allclose(parts.total / parts.count, plain.total / plain.count + 0.5, rtol=1e-6)


def test_smoothing_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing=1\.0"):
        Classification(label_smoothing=1.0)
