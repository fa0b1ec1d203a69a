"""The linear probe against scikit-learn's logistic regression, and summaries of rows against rows one at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from llmlab.evals.probe import fit_probe, mean_states, probe_accuracy
from llmlab.models.llama import llama
from llmlab.nn.module import merge, split
from tests.drawing import built


def blobs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three overlapping clouds in five dimensions of different sizes."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).standard_normal((3, 5))
    classes = rng.integers(0, 3, count)
    return (centres[classes] + 1.5 * rng.standard_normal((count, 5))) * [1, 10, 0.1, 1, 1] + 3.0, classes


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_the_probe_is_sklearns_logistic_regression(l2: float) -> None:
    (x, y), (other, labels) = blobs(300, 0), blobs(200, 1)
    scaler = StandardScaler().fit(x)
    reference = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(scaler.transform(x), y)
    weights, bias = fit_probe(np.asarray(scaler.transform(x)), y, l2=l2)
    # Both stop at a gradient of about 1e-6 of the data's; the biases are known up to a common constant.
    np.testing.assert_allclose(weights.T, reference.coef_, atol=1e-4)
    np.testing.assert_allclose(bias - bias.mean(), reference.intercept_ - reference.intercept_.mean(), atol=1e-4)
    expected = reference.score(scaler.transform(other), labels)
    assert probe_accuracy((x, y), (other, labels), l2=l2) == pytest.approx(expected, abs=1e-12)
    assert 0.4 < expected < 0.95  # neither chance nor trivial


def test_a_constant_state_does_no_harm() -> None:
    x, y = blobs(100, 0)
    with_constant = np.concatenate([x, np.full((100, 1), 7.0)], axis=1)
    assert probe_accuracy((with_constant, y), (with_constant, y)) == probe_accuracy((x, y), (x, y))


def test_one_class_is_refused() -> None:
    with pytest.raises(ValueError, match="1 classes"):
        fit_probe(np.zeros((3, 2)), np.zeros(3, int))


def test_summaries_do_not_depend_on_padding_or_on_the_batch() -> None:
    model: Any = built(llama(vocab_size=16, embed_dim=8, num_layers=2, num_heads=2, hidden_dim=16))
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 16, length).tolist() for length in (1, 7, 4, 12, 9)]

    def states(model: Any, ids: Any, mask: Any) -> Any:
        return model.hidden_states(ids, attention_mask=mask).states

    graphdef, params = split(model)
    whole = jax.jit(lambda params, ids: merge(graphdef, params).hidden_states(ids).states)
    found = mean_states(model, states, rows, length=10, batch_size=2)
    for row, summary in zip(rows, found, strict=True):
        alone = np.asarray(whole(params, jnp.asarray([row[:10]], jnp.int32)))[0]
        np.testing.assert_allclose(summary, alone.mean(axis=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="row 1 has no token"):
        mean_states(model, states, [[1], []], length=4)
