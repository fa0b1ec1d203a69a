"""Packing: documents cut into rows of equal length, without attention or prediction across documents.

The documents, one after the other in some order, are one long sequence of tokens; row r holds the tokens from
r * sequence_length on. No token is dropped and none is repeated; the last row is filled up with padding. A row with
sequence_length = 8, where documents A, B, C and D have 11, 3, 2 and many tokens, in that order:

    input_ids       A8  A9  A10 B0  B1  B2  C0  C1
    labels          A9  A10 -   B1  B2  -   C1  -          - is -100: what follows is another document's
    segment_ids     1   1   1   2   2   2   3   3          attention stays within equal numbers; 0 is padding
    position_ids    0   1   2   0   1   2   0   1

The label of the last column is the first token of the next row where that is the same document's, so that cutting
loses no prediction. Without isolation (plain concatenation, as GPT-2 was trained) every label is the next token, the
whole row is one segment, and positions count through.

A corruption that rewrites a row as a whole cannot keep documents apart inside it. Its rows hold a single document
each (share=False): a document's last row is filled up with padding, which costs half a row per document on average.

Everything here is index arithmetic on the documents' lengths: any row of any order is computed in a time that does
not depend on where it is, but for a binary search.
"""

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, Integer, UInt64

from llmlab.data.dataset import Batch, Numbers, Stream, Table, interleave, permutation
from llmlab.data.draws import Draws
from llmlab.data.store import TokenStore

IGNORE = -100
"""Label of a position that is not scored."""

_DOCUMENTS, _ROWS = range(2)  # what a permutation is for: they must be independent (dataset.py has 2 and 3)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are made of documents."""

    sequence_length: int
    """Tokens in a row."""
    isolate: bool
    """Whether documents in a row are kept apart."""
    pad_id: int
    """Token that fills the last row."""
    share: bool = True
    """Whether documents share rows."""

    def num_rows(self, lengths: Int64[np.ndarray, " documents"]) -> int:
        """Rows that documents of these lengths fill, in whatever order."""
        return int(self.padded(lengths).sum() + self.sequence_length - 1) // self.sequence_length

    def padded(self, lengths: Int64[np.ndarray, " documents"]) -> Int64[np.ndarray, " documents"]:
        """Columns that each document takes: its tokens, or whole rows where it shares none."""
        return lengths if self.share else -(-lengths // self.sequence_length) * self.sequence_length


@dataclass(frozen=True)
class Corpus:
    """Some of a token store's documents: one side of the split."""

    tokens: Integer[np.ndarray, " store_tokens"]
    """All tokens of the store."""
    starts: Int64[np.ndarray, " documents"]
    """Where each document begins in `tokens`."""
    lengths: Int64[np.ndarray, " documents"]
    """Tokens of each document, its frame included."""
    hashes: UInt64[np.ndarray, " documents"]
    """Hash of each document's text."""
    num_bytes: int
    """Size of the documents' texts in UTF-8."""
    has_bos: bool
    """Whether the documents begin with a token that is not their text's."""

    @classmethod
    def select(cls, store: TokenStore, chosen: Bool[np.ndarray, " documents"]) -> "Corpus":
        """The chosen documents of a store, in the store's order."""
        return cls(
            tokens=store.tokens,
            starts=store.offsets[:-1][chosen],
            lengths=np.diff(store.offsets)[chosen],
            hashes=store.hashes[chosen],
            num_bytes=int(store.num_bytes[chosen].sum()),
            has_bos=store.frame.bos is not None,
        )

    @property
    def num_documents(self) -> int:
        """How many documents there are."""
        return len(self.starts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, frames included."""
        return int(self.lengths.sum())

    def num_scored(self, isolate: bool) -> int:
        """Labels that are not -100, when every row is read once: all tokens that follow one they may depend on."""
        if isolate:
            return int(np.maximum(self.lengths - 1, 0).sum())
        return max(self.num_tokens - 1, 0)

    def num_scored_bytes(self, isolate: bool) -> int:
        """Bytes of text that the scored tokens stand for.

        All of them, where documents begin with a token of their own. Without one, nothing predicts a document's first
        token (or, in plain concatenation, the very first one); the bytes are then scaled down by the share of tokens
        that is predicted.
        """
        if self.has_bos or not self.num_tokens:
            return self.num_bytes
        return round(self.num_bytes * self.num_scored(isolate) / self.num_tokens)


class Rows(Table):
    """The rows of a corpus whose documents are in a given order (None: as they are)."""

    def __init__(self, corpus: Corpus, order: Int64[np.ndarray, " documents"] | None, layout: Layout) -> None:
        self._lengths = corpus.lengths if order is None else corpus.lengths[order]
        self._tokens = corpus.tokens
        self._starts = corpus.starts if order is None else corpus.starts[order]
        padded = layout.padded(self._lengths)
        self._ends = np.cumsum(padded)
        # Where a document's tokens lie in the store, less where they lie in the sequence of all rows.
        self._shifts = self._starts - (self._ends - padded)
        self._total = int(self._ends[-1]) if len(padded) else 0
        self._layout = layout

    def __len__(self) -> int:
        return -(-self._total // self._layout.sequence_length)

    def read(self, numbers: Numbers) -> Batch:
        """input_ids, labels (the next token, or -100), segment_ids (1, 2, ... within a row, 0 for padding) and
        position_ids of these rows, each int32 of shape (rows, sequence_length); beyond the last, rows of padding."""
        length = self._layout.sequence_length
        position = numbers[:, None] * length + np.arange(length + 1)  # one more than a row: the last label
        exists = position < self._total
        position = np.where(exists, position, 0)
        document = np.searchsorted(self._ends, position, side="right")  # skips documents without tokens
        index = position + self._shifts[document]
        if not self._layout.share:  # what a document leaves of its last row
            exists &= index < self._starts[document] + self._lengths[document]
            index = np.where(exists, index, 0)
        token = self._tokens[index].astype(np.int32)
        here, scored = exists[:, :-1], exists[:, 1:]
        column = np.broadcast_to(np.arange(length), here.shape)
        if self._layout.isolate:
            changes = document[:, 1:] != document[:, :-1]
            scored = scored & ~changes
            begins = np.concatenate([np.zeros_like(changes[:, :1]), changes[:, :-1]], axis=1)
            segment_ids = 1 + np.cumsum(begins, axis=1)
            position_ids = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
        else:
            segment_ids, position_ids = np.ones_like(column), column
        return {
            "input_ids": np.where(here, token[:, :-1], self._layout.pad_id).astype(np.int32),
            "labels": np.where(scored, token[:, 1:], IGNORE).astype(np.int32),
            "segment_ids": np.where(here, segment_ids, 0).astype(np.int32),
            "position_ids": np.where(here, position_ids, 0).astype(np.int32),
        }

    def other(self, number: int, draws: Draws) -> Batch:
        assert not self._layout.share, "a row of several documents has no other document's row"
        length = self._layout.sequence_length
        document = int(np.searchsorted(self._ends, number * length, side="right"))
        first = (int(self._ends[document - 1]) if document else 0) // length
        own = int(self._ends[document]) // length - first
        chosen = draws.one_below(len(self) - own)
        return self.read(np.array([chosen if chosen < first else chosen + own]))


class PackedStream(Stream):
    """The endless rows of one corpus.

    In every epoch, the documents are concatenated in a new order, cut into rows, and the rows are dealt out in a new
    order again: otherwise the rows of one long document would be neighbours in a batch.
    """

    def __init__(self, corpus: Corpus, layout: Layout, *key: int) -> None:
        self._corpus = corpus
        self._layout = layout
        self._key = key
        self.rows_per_epoch = layout.num_rows(corpus.lengths)
        self._epoch = functools.lru_cache(maxsize=2)(self._order)  # a batch may begin in one epoch and end in the next

    def _order(self, epoch: int) -> tuple[Rows, Int64[np.ndarray, " rows"]]:
        documents = permutation(self._corpus.num_documents, *self._key, epoch, _DOCUMENTS)
        rows = Rows(self._corpus, documents, self._layout)
        return rows, permutation(len(rows), *self._key, epoch, _ROWS)

    def read(self, numbers: Numbers) -> Batch:
        epochs, within = np.divmod(numbers, self.rows_per_epoch)
        parts = []
        for epoch in np.unique(epochs):
            rows, order = self._epoch(int(epoch))
            parts.append((np.flatnonzero(epochs == epoch), rows.read(order[within[epochs == epoch]])))
        return interleave(parts)

    def epochs(self, rows: int) -> tuple[float, ...]:
        return (rows / self.rows_per_epoch,)

    def other(self, number: int, draws: Draws) -> Batch:
        epoch, within = divmod(number, self.rows_per_epoch)
        rows, order = self._epoch(epoch)
        return rows.other(int(order[within]), draws)
