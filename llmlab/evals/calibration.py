"""Calibration: is a model right as often as it says it is?

    ECE = sum over bins b of (n_b / n) |accuracy(b) - confidence(b)|        Guo et al. 2017 (1706.04599), equation 3

The confidence of a prediction is the probability of the most probable token. Predictions are put into bins of equal
width by it; a calibrated model is right in 70% of the cases in which it says 70%. The error is small for a model that
knows little and says so: it is to be read beside the loss, which asks for both knowledge and calibration.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float


def expected_calibration_error(
    confidence: Float[np.ndarray, " n"], correct: Bool[np.ndarray, " n"], *, bins: int = 15
) -> float:
    """Mean distance between what a model says and how often it is right, 0 to 1.

    Args:
        confidence: probability of every prediction, 0 to 1.
        correct: whether it was right.
        bins: of equal width; a confidence on an edge belongs to the bin below it, as in the paper.

    Raises:
        ValueError: there is no prediction, or no bin.
    """
    if confidence.size == 0 or bins < 1:
        raise ValueError(f"{confidence.size} predictions in {bins} bins: at least one of each is needed")
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    said = np.bincount(which, confidence.astype(np.float64), bins)
    right = np.bincount(which, correct.astype(np.float64), bins)
    return float(np.abs(right - said).sum() / confidence.size)


def predictions(
    model: Any, inputs: Sequence[str], batches: Iterable[Mapping[str, np.ndarray]]
) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Confidence in the most probable token at every counted place, and whether it was the label.

    Args:
        model: a built model whose output has `logits` for every place of `labels`.
        inputs: names of the arrays that it is called with, those of its objective.
        batches: of equal shapes, with `labels`; -100 is not counted.
    """
    graphdef, params = nnx.split(model)

    @jax.jit
    def predicted(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(**{name: batch[name] for name in inputs if name in batch}).logits
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return probabilities.max(axis=-1), jnp.argmax(logits, axis=-1) == batch["labels"]

    confidences, rights = [], []
    for batch in batches:
        confidence, right = predicted(params, dict(batch))
        counted = batch["labels"] != -100
        confidences.append(np.asarray(confidence)[counted])
        rights.append(np.asarray(right)[counted])
    return np.concatenate(confidences), np.concatenate(rights)
