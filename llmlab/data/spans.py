"""Words, runs of words, and other pieces of a row, chosen at random."""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from llmlab.data.draws import Draws

Edges = tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]
"""Where pieces begin and where they end."""


def words_of(starts: Bool[np.ndarray, " tokens"], usable: Bool[np.ndarray, " tokens"]) -> Edges:
    """The words all of whose tokens are usable."""
    if not len(starts):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    begins = np.flatnonzero(starts)
    whole = np.logical_and.reduceat(usable, begins)
    return begins[whole], np.append(begins[1:], len(starts))[whole]


def choose_spans(words: Edges, count: int, length: Callable[[Draws], int], draws: Draws) -> Iterator[tuple[int, int]]:
    """Disjoint runs of whole words, together of at most `count` tokens, and of as many where words fit: their edges.

    Each run begins at a word drawn from those that are free and not longer than what is left, is `length(draws)` words
    long, and ends earlier at a word that is taken, at a gap in the text, or where the count is reached.
    """
    begins, ends = words
    size = ends - begins
    free = np.ones(len(size), bool)
    while count > 0:
        candidates = np.flatnonzero(free & (size <= count))
        if not len(candidates):
            return
        first = int(candidates[draws.one_below(len(candidates))])
        stop = first + 1
        longest = min(first + length(draws), len(size))
        while stop < longest and free[stop] and begins[stop] == ends[stop - 1] and ends[stop] - begins[first] <= count:
            stop += 1
        free[first:stop] = False
        begin, end = int(begins[first]), int(ends[stop - 1])
        count -= end - begin
        yield begin, end


def cut_out(
    total: int, lengths: Int[np.ndarray, " spans"], draws: Draws
) -> tuple[Int[np.ndarray, " spans"], Int[np.ndarray, " spans"]]:
    """Where spans of these lengths, in this order, are cut out of `total` things: (begins, ends).

    Every arrangement is equally likely in which at least one thing lies between two spans; the lengths must leave room
    for that.
    """
    kept = total - int(lengths.sum())
    gaps = np.sort(draws.permutation(kept + 1)[: len(lengths)])  # kept things before each span
    ends = gaps + np.cumsum(lengths)
    return ends - lengths, ends


def poisson_lengths(mean: float, total: int, draws: Draws, *, shortest: int = 0) -> Int[np.ndarray, " spans"]:
    """Poisson numbers, none below `shortest`, that add up to a total; the last is cut to fit."""
    lengths = np.zeros(0, np.int64)
    while lengths.sum() < total:
        lengths = np.append(lengths, np.maximum(draws.poisson(mean, 1 + int(total / mean)), shortest))
    if total:
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), total)) + 1]
        lengths[-1] -= lengths.sum() - total
    return lengths
