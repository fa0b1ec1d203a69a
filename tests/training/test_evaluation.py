"""Evaluation sums over the whole split and divides once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objectives import LossParts
from llmlab.training.evaluation import evaluate


class Split:
    """Batches of different counts."""

    sums = (8.0, 1.0, 30.0)
    counts = (4.0, 1.0, 10.0)

    @property
    def num_batches(self) -> int:
        return len(self.sums)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        return {"sum": np.full(1, self.sums[step], np.float32), "count": np.full(1, self.counts[step], np.float32)}


def step(params: Any, batch: Any) -> LossParts:
    total = jnp.asarray(batch["sum"][0] * params["factor"])
    return LossParts(total=total, count=jnp.asarray(batch["count"][0]), metrics={"twice": 2 * total})


def run(split: Any = None, **settings: Any) -> Any:
    return evaluate(step, {"factor": 3.0}, split or Split(), lambda batch: jax.tree.map(jnp.asarray, batch), **settings)


def test_the_mean_is_over_tokens_not_over_batches() -> None:
    assert run() == pytest.approx({"loss": 3 * 39 / 15, "twice": 6 * 39 / 15})


def test_a_metric_with_a_count_of_its_own_is_divided_by_that() -> None:
    def two_terms(params: Any, batch: Any) -> LossParts:
        parts = step(params, batch)
        return dataclasses.replace(parts, counts={"twice": 2 * parts.count})

    found = evaluate(two_terms, {"factor": 3.0}, Split(), lambda batch: jax.tree.map(jnp.asarray, batch))
    assert found == pytest.approx({"loss": 3 * 39 / 15, "twice": 3 * 39 / 15})


def test_at_most_so_many_batches_are_used() -> None:
    assert run(max_batches=2) == pytest.approx({"loss": 3 * 9 / 5, "twice": 6 * 9 / 5})
    assert run(max_batches=100) == run()


def test_progress_is_told_and_a_stop_is_seen_before_every_batch() -> None:
    told: list[tuple[int, int]] = []
    assert run(progress=lambda done, total: told.append((done, total)), stop=lambda: len(told) == 2) is None
    assert told == [(1, 3), (2, 3)]


def test_a_split_without_a_token_to_score_is_an_error() -> None:
    class Empty(Split):
        counts = (0.0, 0.0, 0.0)

    with pytest.raises(ValueError, match="nothing to score"):
        run(Empty())
