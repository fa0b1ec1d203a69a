"""A built data set: training batches by step, validation batches in a fixed order, and what they are made of.

`train.batch(step)` is a pure function of the seed and the step. A resumed run asks for its next step and neither
repeats nor skips anything; any number of hosts gets disjoint parts of the same global batch.

A batch is a dict of arrays whose first dimension is the batch; what else there is (tokens, pixels, labels) and how it
is shaped is the data's own affair. Rows come from two kinds of places:

    Table     finitely many rows, each read by its number             validation, and what an epoch is made of
    Stream    rows without end, each read by its number               training: epoch after epoch, in new orders
"""

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from llmlab.data.draws import Draws
from llmlab.data.mixing import Dealer

Batch = dict[str, np.ndarray]
"""Named arrays whose first dimension is the batch."""
Numbers = Int64[np.ndarray, " rows"]
"""Which rows."""

_TABLE_ROWS, _VALIDATION = 3, 2  # what a permutation is for: they must be independent (packed.py has 0 and 1)


def permutation(length: int, *key: int) -> Int64[np.ndarray, " length"]:
    """A permutation of range(length) that depends on the key alone.

    The order of Philox's 64-bit outputs. numpy promises that stream for all its versions, unlike that of
    Generator.permutation; runs on different installations see the same order.
    """
    random = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(random, kind="stable").astype(np.int64)


class Table(abc.ABC):
    """Finitely many rows."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many rows there are."""

    @abc.abstractmethod
    def read(self, numbers: Numbers) -> Batch:
        """The rows of these numbers; one beyond the last is a blank: same shapes, and nothing in it is counted."""

    def other(self, number: int, draws: Draws) -> Batch:
        """One row (a batch of one) of another document than this row's, drawn at random."""
        raise ValueError(f"{type(self).__name__} does not know which of its rows are of the same document")


class Stream(abc.ABC):
    """Rows without end."""

    @abc.abstractmethod
    def read(self, numbers: Numbers) -> Batch:
        """The rows of these numbers."""

    @abc.abstractmethod
    def epochs(self, rows: int) -> tuple[float, ...]:
        """How often each source has been read, after so many rows."""

    def other(self, number: int, draws: Draws) -> Batch:
        """One row of another document of the same epoch; as in a `Table`."""
        raise ValueError(f"{type(self).__name__} does not know which of its rows are of the same document")


class Concatenated(Table):
    """Several tables, one after the other."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self._tables = tuple(tables)
        self._first = np.cumsum([0, *map(len, self._tables)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, numbers: Numbers) -> Batch:
        # a number beyond the last is beyond the last table's last; tables without rows are skipped
        table = np.minimum(np.searchsorted(self._first, numbers, side="right") - 1, len(self._tables) - 1)
        parts = []
        for i in np.unique(table):
            places = np.flatnonzero(table == i)
            parts.append((places, self._tables[i].read(numbers[places] - self._first[i])))
        return interleave(parts)

    def other(self, number: int, draws: Draws) -> Batch:
        table = min(int(np.searchsorted(self._first, number, side="right")) - 1, len(self._tables) - 1)
        return self._tables[table].other(number - int(self._first[table]), draws)


class Shuffled(Stream):
    """A table, epoch after epoch, each in an order of its own."""

    def __init__(self, table: Table, seed: int) -> None:
        self._table = table
        self._seed = seed
        self._epoch = functools.lru_cache(maxsize=2)(self._order)  # a batch may begin in one epoch and end in the next

    def _order(self, epoch: int) -> Numbers:
        return permutation(len(self._table), self._seed, epoch, _TABLE_ROWS)

    def read(self, numbers: Numbers) -> Batch:
        epochs, within = np.divmod(numbers, len(self._table))
        wanted = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            wanted[epochs == epoch] = self._epoch(int(epoch))[within[epochs == epoch]]
        return self._table.read(wanted)

    def epochs(self, rows: int) -> tuple[float, ...]:
        return (rows / len(self._table),)


class Mixed(Stream):
    """Several streams, each giving its share of the rows."""

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float]) -> None:
        self._streams = tuple(streams)
        self._dealer = Dealer(weights)

    def read(self, numbers: Numbers) -> Batch:
        dealt = np.array([self._dealer.deal(int(row)) for row in numbers], np.int64).reshape(-1, 2)
        parts = []
        for source in np.unique(dealt[:, 0]):
            places = np.flatnonzero(dealt[:, 0] == source)
            parts.append((places, self._streams[source].read(dealt[places, 1])))
        return interleave(parts)

    def epochs(self, rows: int) -> tuple[float, ...]:
        counts = self._dealer.counts(rows)
        return tuple(
            epochs for stream, count in zip(self._streams, counts, strict=True) for epochs in stream.epochs(count)
        )

    def other(self, number: int, draws: Draws) -> Batch:
        source, within = self._dealer.deal(number)
        return self._streams[source].other(within, draws)


class TrainSplit:
    """Batches without end."""

    def __init__(self, rows: Stream, *, batch_size: int) -> None:
        self.rows = rows
        self.batch_size = batch_size

    def batch(self, step: int, *, host: int = 0, num_hosts: int = 1) -> Batch:
        """The batch of a step, or one host's part of it.

        Args:
            step: Which batch, from 0 on; there is no last one.
            host: Which of the hosts asks.
            num_hosts: Hosts that share the batch. Their parts, one after the other, are the batch of a single host.

        Raises:
            ValueError: a step before 0, or a batch size that the hosts cannot share.
        """
        return self.part(step, np.arange(*host_rows(self.batch_size, host, num_hosts)))

    def part(self, step: int, places: Numbers) -> Batch:
        """The rows at these places of the batch of a step.

        Raises:
            ValueError: a step before 0.
        """
        if step < 0:
            raise ValueError(f"step={step}; steps begin at 0")
        return self.rows.read(step * self.batch_size + places)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """How often each source has been read, after so many steps."""
        return self.rows.epochs(steps * self.batch_size)


class ValidationSplit:
    """Every row of a table once, in an order that is always the same.

    The rows are in one fixed pseudo-random order, so that the first few batches are a fair sample of the whole.
    """

    def __init__(self, rows: Table, *, batch_size: int) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self._order = permutation(len(rows), _VALIDATION)

    @property
    def num_batches(self) -> int:
        """Batches that hold the whole split; the last is filled up with blank rows."""
        return -(-len(self._order) // self.batch_size)

    def batch(self, step: int, *, host: int = 0, num_hosts: int = 1) -> Batch:
        """One of the `num_batches` batches, or one host's part of it, as `TrainSplit.batch` gives them.

        Raises:
            ValueError: there is no such batch, or the hosts cannot share it.
        """
        return self.part(step, np.arange(*host_rows(self.batch_size, host, num_hosts)))

    def part(self, step: int, places: Numbers) -> Batch:
        """The rows at these places of one of the `num_batches` batches.

        Raises:
            ValueError: there is no such batch.
        """
        if not 0 <= step < self.num_batches:
            raise ValueError(f"step={step} is not one of the {self.num_batches} validation batches")
        numbers = step * self.batch_size + places
        inside = numbers < len(self._order)
        wanted = np.full(len(numbers), len(self.rows))  # blank
        wanted[inside] = self._order[numbers[inside]]
        return self.rows.read(wanted)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Both sides of the split, and where they come from."""

    train: TrainSplit
    """The batches to learn from."""
    validation: ValidationSplit
    """The batches to measure on."""
    vocab_size: int
    """Token ids are below this: the tokenizer's vocabulary."""
    fingerprint: str
    """SHA-256 (hex) of documents, tokenizer, split and mixture: all that decides the batches but seed and sizes."""
    sources: tuple[dict[str, Any], ...]
    """Of every source: what it is, its fingerprint, and what is in it."""
    sizes: Mapping[str, Mapping[str, int]]
    """Of "train" and "validation": how much there is, by what is counted ("documents", "tokens", "bytes", "rows"). Of
    the validation split's tokens and bytes, those are counted that are scored."""
    baselines: Callable[[int], dict[str, float]]
    """Losses on the validation split, by name, of models that need no training. The argument is the number of parts
    that a batch is computed in (`train.accumulation`): where rows are compared with each other, it counts."""
    num_labels: int | None = None
    """Labels are below this, where rows are classified."""
    bytes_per_token: float | None = None
    """Bytes of text that a counted token of the validation split stands for, where the counted tokens are the text."""
    remarks: tuple[str, ...] = ()
    """What the user should know: files skipped, documents on both sides, a damaged store that was built again."""

    def describe(self) -> dict[str, Any]:
        """What provenance records, as plain JSON values."""
        return {
            "fingerprint": self.fingerprint,
            **{name: dict(sizes) for name, sizes in self.sizes.items()},
            "sources": list(self.sources),
            "remarks": list(self.remarks),
        }


def check_sizes(**sizes: int) -> None:
    """Raises a ValueError unless every size is positive (a seed may be 0)."""
    for name, size in sizes.items():
        if size < (name != "seed"):
            raise ValueError(f"{name}={size} must be at least {int(name != 'seed')}")


def host_rows(batch_size: int, host: int, num_hosts: int) -> tuple[int, int]:
    """First row of a host's part of a batch, and the row after its last.

    Raises:
        ValueError: there is no such host, or the hosts cannot share the batch evenly.
    """
    if not 0 <= host < num_hosts:
        raise ValueError(f"host={host} is not one of num_hosts={num_hosts}")
    if batch_size % num_hosts:
        below, above = batch_size // num_hosts * num_hosts, -(-batch_size // num_hosts) * num_hosts
        works = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"batch_size={batch_size} is not divisible by {num_hosts} hosts; use {works}")
    share = batch_size // num_hosts
    return host * share, (host + 1) * share


def interleave(parts: Sequence[tuple[Int64[np.ndarray, " _"], Batch]]) -> Batch:
    """One batch from parts and the places of their rows in it."""
    if len(parts) == 1 and np.array_equal(parts[0][0], np.arange(len(parts[0][0]))):
        return parts[0][1]
    count = sum(len(places) for places, _ in parts)
    batch = {name: np.empty((count, *array.shape[1:]), array.dtype) for name, array in parts[0][1].items()}
    for places, part in parts:
        for name, array in part.items():
            batch[name][places] = array
    return batch
