"""The loss of a trained model on any batches: other rows, longer rows, another corpus.

    validation = run.experiment.data.build(run.tokenizer, sequence_length=512, batch_size=4, seed=0).validation
    mean_loss(run.model, run.experiment.objective, map(validation.batch, range(16)))

A model that was trained on rows of L tokens and is asked for rows of 4 L shows whether its positions mean anything
where it never was (Press et al. 2021, 2108.12409). Longer rows also give most tokens more context, so a model that
extrapolates has a lower loss there and not the same.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx


@runtime_checkable
class Loss(Protocol):
    """What is asked of an objective."""

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the loss takes it."""
        ...

    def loss(self, model: Any, batch: dict[str, Any], *, key: jax.Array | None = None) -> Any:
        """Sums over the batch, as `llmlab.objectives.LossParts`."""
        ...


def mean_loss(model: Any, objective: Loss, batches: Iterable[Mapping[str, np.ndarray]]) -> float:
    """Plain loss in nats per counted token (or whatever the objective counts) over all batches together.

    Args:
        model: a built model.
        objective: gives sums over a batch; smoothing and penalties of it do not count.
        batches: of equal shapes.

    Raises:
        ValueError: nothing is counted; or what the model raises for rows that it cannot read, such as longer ones than
            a learned table of positions holds.
    """
    graphdef, params = nnx.split(model)  # arguments of the compiled function: as constants XLA would fold them

    @jax.jit
    def sums(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        parts = objective.loss(nnx.merge(graphdef, params), objective.prepare(batch))
        return parts.metrics.get("loss", parts.total), parts.count

    found = [sums(params, dict(batch)) for batch in batches]
    count = math.fsum(float(each) for _, each in found)
    if count == 0:
        raise ValueError("there is nothing to score in these batches")
    return math.fsum(float(total) for total, _ in found) / count
