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

Everything here is index arithmetic on the documents' lengths: any row of any order is computed in a time that does
not depend on where it is, but for a binary search.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, UInt64

from llmlab.data.store import TokenStore

IGNORE = -100
"""Label of a position that is not scored."""

Batch = dict[str, Int32[np.ndarray, "rows sequence"]]
"""input_ids, labels, segment_ids and position_ids."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows are made of documents."""

    sequence_length: int
    """Tokens in a row."""
    isolate: bool
    """Whether documents in a row are kept apart."""
    pad_id: int
    """Token that fills the last row."""


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


class Rows:
    """The rows of a corpus whose documents are in a given order (None: as they are)."""

    def __init__(self, corpus: Corpus, order: Int64[np.ndarray, " documents"] | None, layout: Layout) -> None:
        lengths = corpus.lengths if order is None else corpus.lengths[order]
        self._tokens = corpus.tokens
        self._starts = corpus.starts if order is None else corpus.starts[order]
        self._ends = np.cumsum(lengths)
        # Where a document's tokens lie in the store, less where they lie in the sequence.
        self._shifts = self._starts - (self._ends - lengths)
        self._num_tokens = int(self._ends[-1]) if len(lengths) else 0
        self._layout = layout

    def __len__(self) -> int:
        return -(-self._num_tokens // self._layout.sequence_length)

    def read(self, rows: Int64[np.ndarray, " rows"]) -> Batch:
        """The rows of these numbers; a number beyond the last is a row of padding."""
        length = self._layout.sequence_length
        position = rows[:, None] * length + np.arange(length + 1)  # one more than a row: the last label
        exists = position < self._num_tokens
        position = np.where(exists, position, 0)
        document = np.searchsorted(self._ends, position, side="right")  # skips documents without tokens
        token = self._tokens[position + self._shifts[document]].astype(np.int32)
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
