"""A built data set: training batches by step, validation batches in a fixed order, and what they are made of.

`train.batch(step)` is a pure function of the seed and the step. A resumed run asks for its next step and neither
repeats nor skips anything; any number of hosts gets disjoint parts of the same global batch.

In every epoch, the documents are concatenated in a new order, cut into rows (packing.py), and the rows are dealt out in
a new order again: otherwise the rows of one long document would be neighbours in a batch.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64

from llmlab.data.mixing import Dealer
from llmlab.data.packing import Batch, Corpus, Layout, Rows

_Part = dict[str, Int32[np.ndarray, "_ sequence"]]
_DOCUMENTS, _ROWS, _VALIDATION = range(3)  # what a permutation is for: they must be independent


def permutation(length: int, *key: int) -> Int64[np.ndarray, " length"]:
    """A permutation of range(length) that depends on the key alone.

    The order of Philox's 64-bit outputs. numpy promises that stream for all its versions, unlike that of
    Generator.permutation; runs on different installations see the same order.
    """
    random = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    return np.argsort(random, kind="stable").astype(np.int64)


class _Stream:
    """The endless rows of one corpus: epoch after epoch, each in an order of its own."""

    def __init__(self, corpus: Corpus, layout: Layout, *key: int) -> None:
        self._corpus = corpus
        self._layout = layout
        self._key = key
        self.rows_per_epoch = -(-corpus.num_tokens // layout.sequence_length)
        self._epoch = functools.lru_cache(maxsize=2)(self._order)  # a batch may begin in one epoch and end in the next

    def _order(self, epoch: int) -> tuple[Rows, Int64[np.ndarray, " rows"]]:
        documents = permutation(self._corpus.num_documents, *self._key, epoch, _DOCUMENTS)
        rows = Rows(self._corpus, documents, self._layout)
        return rows, permutation(len(rows), *self._key, epoch, _ROWS)

    def read(self, numbers: Int64[np.ndarray, " rows"]) -> Batch:
        epochs, within = np.divmod(numbers, self.rows_per_epoch)
        parts = []
        for epoch in np.unique(epochs):
            rows, order = self._epoch(int(epoch))
            parts.append((np.flatnonzero(epochs == epoch), rows.read(order[within[epochs == epoch]])))
        return _interleave(parts)


class TrainSplit:
    """The training documents of one or more corpora, as batches without end."""

    def __init__(
        self, corpora: Sequence[Corpus], weights: Sequence[float], layout: Layout, *, batch_size: int, seed: int
    ) -> None:
        self.corpora = tuple(corpora)
        self.layout = layout
        self.batch_size = batch_size
        self._dealer = Dealer(weights)
        self._streams = tuple(_Stream(corpus, layout, seed, i) for i, corpus in enumerate(corpora))

    @property
    def num_documents(self) -> int:
        """Documents of all corpora."""
        return sum(corpus.num_documents for corpus in self.corpora)

    @property
    def num_tokens(self) -> int:
        """Tokens of all corpora, each document once."""
        return sum(corpus.num_tokens for corpus in self.corpora)

    @property
    def num_bytes(self) -> int:
        """Size of all texts in UTF-8."""
        return sum(corpus.num_bytes for corpus in self.corpora)

    def batch(self, step: int, *, host: int = 0, num_hosts: int = 1) -> Batch:
        """The batch of a step, or one host's part of it.

        Args:
            step: Which batch, from 0 on; there is no last one.
            host: Which of the hosts asks.
            num_hosts: Hosts that share the batch. Their parts, one after the other, are the batch of a single host.

        Returns:
            int32 arrays (batch_size / num_hosts, sequence_length): input_ids; labels (the next token, or -100);
            segment_ids (1, 2, ... within a row, 0 for padding); position_ids.

        Raises:
            ValueError: a step before 0, or a batch size that the hosts cannot share.
        """
        if step < 0:
            raise ValueError(f"step={step}; steps begin at 0")
        start, stop = host_rows(self.batch_size, host, num_hosts)
        first = step * self.batch_size
        dealt = np.array([self._dealer.deal(row) for row in range(first + start, first + stop)], np.int64)
        parts = []
        for source in np.unique(dealt[:, 0]):
            places = np.flatnonzero(dealt[:, 0] == source)
            parts.append((places, self._streams[source].read(dealt[places, 1])))
        return _interleave(parts)

    def epochs(self, steps: int) -> tuple[float, ...]:
        """How often each corpus has been read, after so many steps."""
        counts = self._dealer.counts(steps * self.batch_size)
        return tuple(count / stream.rows_per_epoch for count, stream in zip(counts, self._streams, strict=True))


class ValidationSplit:
    """The validation documents of one or more corpora: every token once, in an order that is always the same.

    The rows are in one fixed pseudo-random order, so that the first few batches are a fair sample of the whole.
    """

    def __init__(self, corpora: Sequence[Corpus], layout: Layout, *, batch_size: int) -> None:
        self.corpora = tuple(corpora)
        self.layout = layout
        self.batch_size = batch_size
        self._rows = tuple(Rows(corpus, None, layout) for corpus in corpora)
        self._first = np.cumsum([0, *map(len, self._rows)])
        self._order = permutation(int(self._first[-1]), _VALIDATION)

    @property
    def num_batches(self) -> int:
        """Batches that hold the whole split; the last is filled up with rows of padding."""
        return -(-len(self._order) // self.batch_size)

    @property
    def num_documents(self) -> int:
        """Documents of all corpora."""
        return sum(corpus.num_documents for corpus in self.corpora)

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored: the labels that are not -100, over all batches."""
        return sum(corpus.num_scored(self.layout.isolate) for corpus in self.corpora)

    @property
    def num_bytes(self) -> int:
        """Bytes of text that the scored tokens stand for.

        Bits per byte are nats per token * num_tokens / (num_bytes * ln 2).
        """
        return sum(corpus.num_scored_bytes(self.layout.isolate) for corpus in self.corpora)

    def batch(self, step: int, *, host: int = 0, num_hosts: int = 1) -> Batch:
        """One of the `num_batches` batches, or one host's part of it, as `TrainSplit.batch` gives them.

        Raises:
            ValueError: there is no such batch, or the hosts cannot share it.
        """
        if not 0 <= step < self.num_batches:
            raise ValueError(f"step={step} is not one of the {self.num_batches} validation batches")
        start, stop = host_rows(self.batch_size, host, num_hosts)
        wanted = self._order[step * self.batch_size + start : step * self.batch_size + stop]
        corpus = np.searchsorted(self._first, wanted, side="right") - 1
        parts = [
            (np.flatnonzero(corpus == i), self._rows[i].read(wanted[corpus == i] - self._first[i]))
            for i in np.unique(corpus)
        ]
        missing = np.arange(len(wanted), stop - start)
        beyond = np.full(len(missing), len(self._rows[0]))
        return _interleave([*parts, (missing, self._rows[0].read(beyond))])


@dataclass(frozen=True)
class Dataset:
    """Both sides of the split, and where they come from."""

    train: TrainSplit
    """The batches to learn from."""
    validation: ValidationSplit
    """The batches to measure on."""
    vocab_size: int
    """Ids are below this: the tokenizer's vocabulary."""
    fingerprint: str
    """SHA-256 (hex) of documents, tokenizer, split and mixture: all that decides the batches but seed and sizes."""
    sources: tuple[dict[str, Any], ...]
    """Of every source: what it is, its fingerprint, and what is in it."""
    remarks: tuple[str, ...] = ()
    """What the user should know: files skipped, documents on both sides, a damaged store that was built again."""

    def describe(self) -> dict[str, Any]:
        """What provenance records, as plain JSON values."""
        sides = {"train": self.train, "validation": self.validation}
        sizes = {
            name: {"documents": side.num_documents, "tokens": side.num_tokens, "bytes": side.num_bytes}
            for name, side in sides.items()
        }
        return {
            "fingerprint": self.fingerprint,
            **sizes,
            "isolate": self.train.layout.isolate,
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


def _interleave(parts: Sequence[tuple[Int64[np.ndarray, " _"], _Part]]) -> Batch:
    """One batch from parts and the places of their rows in it."""
    if len(parts) == 1 and len(parts[0][0]) and np.all(np.diff(parts[0][0]) == 1):
        return parts[0][1]
    count = sum(len(places) for places, _ in parts)
    batch = {name: np.empty((count, array.shape[1]), array.dtype) for name, array in parts[0][1].items()}
    for places, part in parts:
        for name, array in part.items():
            batch[name][places] = array
    return batch
