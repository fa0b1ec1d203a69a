"""Calibration error against bins that are filled one prediction at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.evals.calibration import expected_calibration_error, predictions
from llmlab.models.llama import llama
from tests.drawing import built


def by_hand(confidence: np.ndarray, correct: np.ndarray, bins: int) -> float:
    error = 0.0
    for b in range(bins):
        inside = [
            (c, r)
            for c, r in zip(confidence.tolist(), correct.tolist(), strict=True)
            if b / bins < c <= (b + 1) / bins or (b == 0 and c == 0.0)
        ]
        if inside:
            said, right = (np.mean([pair[i] for pair in inside]) for i in (0, 1))
            error += len(inside) / len(confidence) * abs(said - right)
    return float(error)


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_the_error_is_that_of_bins_filled_one_by_one(bins: int) -> None:
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.uniform(size=500), [0.0, 0.5, 1.0]])
    correct = rng.uniform(size=503) < confidence**2  # overconfident
    found = expected_calibration_error(confidence, correct, bins=bins)
    assert found == pytest.approx(by_hand(confidence, correct, bins), abs=1e-12)


def test_a_model_that_is_right_as_often_as_it_says_has_no_error_and_a_boastful_one_its_boast() -> None:
    assert expected_calibration_error(np.full(10, 0.7), np.arange(10) < 7) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error(np.ones(10), np.arange(10) < 7) == pytest.approx(0.3)


def test_no_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="0 predictions"):
        expected_calibration_error(np.zeros(0), np.zeros(0, bool))


def test_predictions_are_those_of_the_models_logits_at_counted_places() -> None:
    model: Any = built(llama(vocab_size=16, embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16))
    rng = np.random.default_rng(0)
    batches = []
    for _ in range(2):
        ids = rng.integers(0, 16, (3, 5)).astype(np.int32)
        labels = np.where(rng.uniform(size=(3, 5)) < 0.3, -100, rng.integers(0, 16, (3, 5))).astype(np.int32)
        batches.append({"input_ids": ids, "labels": labels})
    confidence, correct = predictions(model, ("input_ids", "segment_ids"), batches)
    expected, right = [], []
    for batch in batches:
        p = np.asarray(jax.nn.softmax(model(jnp.asarray(batch["input_ids"])).logits, -1))
        for row, col in np.argwhere(batch["labels"] != -100):
            expected.append(p[row, col].max())
            right.append(p[row, col].argmax() == batch["labels"][row, col])
    np.testing.assert_allclose(confidence, expected, rtol=1e-5)
    np.testing.assert_array_equal(correct, right)
