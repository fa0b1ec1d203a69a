"""A teacher's written predictions, beside the rows that they are of: writing them, and reading them in training."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmlab.data.dataset import Batch, Dataset, Numbers, Stream, Table, TrainSplit, ValidationSplit
from llmlab.data.draws import Draws
from llmlab.distill.cache import Cache, CacheError, Key, Layout, Rows, row_checks
from llmlab.distill.objective import Distill
from llmlab.distill.taught import IDS, LOG_PROBABILITIES, LOG_REST
from llmlab.distill.teacher import digest
from llmlab.nn.module import merge
from llmlab.objectives.base import named
from llmlab.objectives.cross_entropy import default_chunk
from llmlab.objectives.tokens import TokenObjective
from llmlab.sharding import activate
from llmlab.training.program import Program

_NAMES = {"ids": IDS, "log_probabilities": LOG_PROBABILITIES, "log_rest": LOG_REST}
# fold_in constant that separates the tokens drawn of a row's distributions from everything else drawn by its seed.
_DRAWING_KEY = 0xCAC4E


def key_of(objective: Distill, dataset: Dataset, made_with: dict[str, Any]) -> Key:
    """What a cache for this run must be made of."""
    (term,) = objective.predictions
    return Key(
        teacher=digest(objective.teacher),
        data=dataset.fingerprint,
        tokenizer=made_with["tokenizer"].fingerprint,
        sequence_length=made_with["sequence_length"],
        seed=made_with["seed"],
        temperature=term.temperature,
    )


def with_cache(objective: Distill, dataset: Dataset, **made_with: Any) -> Dataset:
    """The data set whose batches have what the teacher said of them.

    Raises:
        FileNotFoundError: there is no cache.
        CacheError: it is of another teacher or of other rows, or has fewer than the run reads.
    """
    assert objective.cache is not None
    cache = Cache(Path(objective.cache))
    cache.check(key_of(objective, dataset, made_with))
    needed = made_with["steps"] * dataset.train.batch_size
    if cache.complete() < needed:
        raise CacheError(
            f"{cache.directory} has {cache.complete()} rows and the run reads {needed}; give llmlab distill cache with "
            f"this experiment again, which goes on from there"
        )
    if cache.layout.kind == "sampled" and type(objective.predictions[0].divergence).__name__ != "ForwardKL":
        raise CacheError(
            f"{cache.directory} holds drawn tokens, which estimate ForwardKL() alone; use it, or a top-k cache"
        )
    size = dataset.train.batch_size
    return dataclasses.replace(
        dataset,
        train=TrainSplit(CachedStream(dataset.train.rows, cache), batch_size=size),
        validation=ValidationSplit(BlankTeacher(dataset.validation.rows, cache.layout), batch_size=size),
    )


class CachedStream(Stream):
    """Rows, each with what the teacher said of it."""

    def __init__(self, rows: Stream, cache: Cache) -> None:
        self._rows, self._cache = rows, cache

    def read(self, numbers: Numbers) -> Batch:
        batch = self._rows.read(numbers)
        return batch | as_batch(self._cache.read(numbers, row_checks(batch)))

    def epochs(self, rows: int) -> tuple[float, ...]:
        return self._rows.epochs(rows)

    def other(self, number: int, draws: Draws) -> Batch:
        return self._rows.other(number, draws)


class BlankTeacher(Table):
    """Rows to validate on, of which the teacher said nothing: a step has one shape of batches, and validation looks at
    the plain loss."""

    def __init__(self, rows: Table, layout: Layout) -> None:
        self._rows, self._layout = rows, layout

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, numbers: Numbers) -> Batch:
        fields = self._layout.fields(len(numbers))
        return self._rows.read(numbers) | as_batch(
            {name: np.zeros(shape, dtype) for name, (dtype, shape) in fields.items()}
        )


def as_batch(rows: Rows) -> Batch:
    """As arrays of a batch."""
    found = {_NAMES[name]: array for name, array in rows.items() if name in _NAMES}
    found[IDS] = found[IDS].astype(np.int32)
    if LOG_PROBABILITIES not in found:
        found[LOG_PROBABILITIES] = np.full(found[IDS].shape, -np.log(found[IDS].shape[-1]), np.float32)
    return found


def writer(
    program: Program, objective: Distill, dataset: Dataset, layout: Layout, seed: int
) -> Callable[[Numbers], Rows]:
    """Function of the numbers of rows that gives what the live teacher says of them.

    Args:
        program: of the experiment with its live teacher.
        objective: what it is asked.
        dataset: gives the rows.
        layout: what is kept.
        seed: of what is drawn.
    """
    ask = teacher_says(program, objective, layout, seed)
    size = dataset.train.batch_size
    frozen = program.frozen

    def rows_at(numbers: Numbers) -> Rows:
        parts: list[Rows] = []
        for first in range(0, len(numbers), size):
            wanted = numbers[first : first + size]
            batch = dataset.train.rows.read(np.pad(wanted, (0, size - len(wanted)), mode="edge"))
            said = jax.device_get(ask(frozen, program.place(batch), np.uint32(wanted[0])))
            rows = {"check": row_checks(batch)} | {name: np.asarray(array) for name, array in said.items()}
            parts.append({name: array[: len(wanted)] for name, array in rows.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return rows_at


def teacher_says(program: Program, objective: Distill, layout: Layout, seed: int) -> Any:
    """Jitted function (teacher's parameters, batch, number of its first row) -> what is kept of the distributions."""
    from llmlab.distill.teacher import Teacher

    companion, base = program.companion, objective.base
    assert isinstance(companion, Teacher)
    assert isinstance(base, TokenObjective)
    graphdef, temperature = companion.config.abstract()[0], objective.predictions[0].temperature
    num_tokens = companion.num_tokens

    def say(frozen: Any, batch: Any, first: jax.Array) -> dict[str, jax.Array]:
        with activate(program.placement):
            teacher = merge(graphdef, frozen)
            hidden = teacher.hidden_states(**named(batch, base.inputs))
            states = base.scored(hidden.states, batch)[0]
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DRAWING_KEY), first)

            def of_place(place: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
                logits = teacher.project(place[0])[..., :num_tokens].astype(jnp.float32) / temperature
                return kept(jax.nn.log_softmax(logits), layout, jax.random.fold_in(key, place[1]))

            # Some places of every row at a time: as with a loss, the logits of all would be the largest array.
            together = default_chunk(states.shape[0], program.model.vocab_size or 1, jax.default_backend())
            places = (jnp.moveaxis(states, 1, 0), jnp.arange(states.shape[1]))
            said = jax.lax.map(of_place, places, batch_size=together)
            return {name: jnp.moveaxis(array, 0, 1) for name, array in said.items()}

    return jax.jit(say)


def kept(log_p_BV: jax.Array, layout: Layout, key: jax.Array) -> dict[str, jax.Array]:
    """Entries of distributions that a cache keeps."""
    if layout.kind == "sampled":
        drawn = jax.random.categorical(key, log_p_BV, shape=(layout.entries, log_p_BV.shape[0]))
        return {"ids": jnp.moveaxis(drawn, 0, -1).astype(layout.id_dtype)}
    top, ids = jax.lax.top_k(log_p_BV, layout.entries)
    is_kept = jnp.put_along_axis(jnp.zeros(log_p_BV.shape, bool), ids, True, axis=-1, inplace=False)
    # Summed over what is left, for 1 - sum(kept) has no digits where the kept ones have almost all.
    rest = jax.nn.logsumexp(jnp.where(is_kept, -jnp.inf, log_p_BV), axis=-1)
    return {
        "ids": ids.astype(layout.id_dtype),
        "log_probabilities": top.astype(layout.dtype),
        "log_rest": rest.astype(jnp.float32),
    }


def layout_for(program: Program, kind: Any, entries: int, dtype: Any, rows_per_shard: int) -> Layout:
    """The layout of a cache for a program.

    Raises:
        ValueError: there are not so many entries.
    """
    from llmlab.distill.teacher import Teacher

    assert isinstance(program.companion, Teacher)
    size = program.companion.num_tokens
    assert size is not None
    if not entries >= 1 or (kind == "top-k" and entries > size):
        raise ValueError(f"--entries {entries} is not between 1 and the vocabulary's {size}")
    labels = program.shapes.get("masked_positions", program.shapes["labels"])
    return Layout(
        kind=kind,
        entries=entries,
        places=labels[1],
        dtype=dtype,
        id_dtype="uint16" if size <= 1 << 16 else "uint32",
        rows_per_shard=rows_per_shard,
    )
