"""Evaluation: the loss over the validation split, every token once, without dropout, in a fixed order."""

import contextlib
import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from llmlab.data.prefetch import prefetch
from llmlab.nn.module import Params
from llmlab.objectives import Batch, LossParts

Place = Callable[[dict[str, np.ndarray]], Batch]


@runtime_checkable
class Split(Protocol):
    """What is asked of a validation split."""

    @property
    def num_batches(self) -> int:
        """How many batches hold the whole split."""
        ...

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """One of them."""
        ...


def evaluate(
    evaluate_step: Callable[[Params, Batch], LossParts],
    params: Params,
    split: Split,
    place: Place,
    *,
    max_batches: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float] | None:
    """Means of all the objective's sums over what they count, by name; None where `stop` said to stop.

    Sums of batches are added in float64 on the host, so the result does not depend on the order of the batches and
    hardly on their number.

    Args:
        evaluate_step: from `make_evaluate_step`.
        params: what is evaluated.
        split: the validation split.
        place: puts a batch on the devices.
        max_batches: at most so many batches, the first ones; None for all.
        stop: asked before every batch.
        progress: told about batches done, of how many.

    Raises:
        ValueError: the split has nothing to score.
    """
    sums = evaluated(evaluate_step, params, split, place, max_batches=max_batches, stop=stop, progress=progress)
    return None if sums is None else means(sums)


def evaluated(
    evaluate_step: Callable[[Params, Batch], LossParts],
    params: Params,
    split: Split,
    place: Place,
    *,
    max_batches: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[LossParts] | None:
    """The sums of every batch, on the host; arguments as for `evaluate`."""
    total = split.num_batches if max_batches is None else min(split.num_batches, max_batches)
    sums: list[LossParts] = []
    pending: LossParts | None = None
    with contextlib.closing(prefetch(split.batch, 0, place, stop=total)) as batches:
        for done, batch in enumerate(batches):
            if stop():
                return None
            running = evaluate_step(params, batch)
            if pending is not None:  # fetched while the next one runs
                sums.append(jax.device_get(pending))
            pending = running
            progress(done + 1, total)
    if pending is not None:
        sums.append(jax.device_get(pending))
    return sums


def means(sums: list[LossParts]) -> dict[str, float]:
    """What the sums of batches come to, by name. Raises ValueError where nothing is scored."""
    if math.fsum(float(parts.count) for parts in sums) == 0:
        raise ValueError("the validation split has nothing to score; give it more documents (validation_fraction)")
    values = {}
    for name in {"loss": None} | sums[0].metrics:
        total = math.fsum(float(parts.metrics.get(name, parts.total)) for parts in sums)
        count = math.fsum(float(parts.counts.get(name, parts.count)) for parts in sums)
        values[name] = total / count if count else math.nan
    return values
