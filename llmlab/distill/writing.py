"""From an experiment with a live teacher to a cache of what the teacher says of its rows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax

from llmlab.distill.cache import Cache, fill
from llmlab.distill.cached_rows import key_of, layout_for, writer
from llmlab.distill.objective import Distill
from llmlab.training.program import Program
from llmlab.training.session import tokenizer_for


def write_cache(
    experiment: Any,
    directory: Path,
    *,
    kind: Literal["top-k", "sampled"] = "top-k",
    entries: int = 32,
    dtype: Literal["float16", "float32"] = "float16",
    rows_per_shard: int = 512,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Cache:
    """The cache for an experiment, begun, gone on with, or found whole.

    Args:
        experiment: with `Distill` of a live teacher.
        directory: of the cache.
        kind: keep the most probable tokens of every distribution, or draw some.
        entries: how many.
        dtype: of log-probabilities.
        rows_per_shard: rows of a file.
        progress: told rows that are there, of how many.

    Raises:
        ValueError: the experiment has no predictions to write, or the directory is another cache's.
        DiskFull: what was written stays; the same call goes on.
    """
    objective, train = experiment.objective, experiment.train
    assert isinstance(objective, Distill)
    dataclasses.replace(objective, cache=str(directory))  # raises where its training could not read a cache
    if rows_per_shard < 1:
        raise ValueError(f"--rows-per-shard {rows_per_shard} is not positive")
    tokenizer = tokenizer_for(experiment)
    objective.check_tokenizer(tokenizer)
    dataset = experiment.data.build(
        tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    model = experiment.model.with_vocabulary(tokenizer.vocab_size)
    placement = experiment.mesh.build(jax.devices())
    program = Program.build(model, objective, experiment.optimizer, placement, train, dataset.train.batch(0))
    layout = layout_for(program, kind, entries, dtype, rows_per_shard)
    made_with = {"tokenizer": tokenizer, "sequence_length": train.sequence_length, "seed": train.seed}
    cache = Cache.begin(directory, key_of(objective, dataset, made_with), layout, train.steps * train.batch_size)
    fill(cache, writer(program, objective, dataset, layout, train.seed), progress)
    return cache
