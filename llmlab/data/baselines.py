"""What counting achieves: the loss of a unigram and of a bigram model, to hold a trained model's loss against.

Both are fitted on the whole training split and score exactly the tokens that the model is scored on, so the numbers
are comparable: nats per token of the validation split.

    unigram   p(w) = (c(w) + T / V) / (N + T)                        N tokens, of T kinds, out of V possible
    bigram    p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v))       c(v) tokens follow v, of T(v) kinds

That is Witten-Bell smoothing (Witten and Bell 1991, "The zero-frequency problem", method C; interpolated as in Chen
and Goodman 1998, section 2.6): the mass given to what was never seen after v is the rate at which new kinds were met
there. It sums to one, leaves nothing at zero, and has no parameter to tune.

Counting costs a sort of the token pairs: about a second per 10 million tokens, and memory for the distinct pairs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from llmlab.data.dataset import Dataset
from llmlab.data.packing import IGNORE, Corpus, Layout, Rows

_CHUNK = 1 << 22  # tokens counted at a time


@dataclass(frozen=True)
class Baselines:
    """Losses on the validation split, in nats per token."""

    unigram: float
    """Of a model that knows how often each token occurs."""
    bigram: float
    """Of a model that knows how often each token follows each other one."""


@dataclass(frozen=True)
class BigramModel:
    """Counts of a training split, and the probabilities that they give."""

    unigram: Float64[np.ndarray, " vocab"]
    """p(w)."""
    followers: Int64[np.ndarray, " vocab"]
    """c(v): how many tokens follow v."""
    kinds: Int64[np.ndarray, " vocab"]
    """T(v): how many different ones."""
    pairs: Int64[np.ndarray, " pairs"]
    """The pairs that occur, as v * vocab_size + w, in ascending order."""
    counts: Int64[np.ndarray, " pairs"]
    """c(v, w)."""

    @classmethod
    def fit(cls, corpora: Sequence[Corpus], vocab_size: int, *, isolate: bool) -> "BigramModel":
        """Counts every scored token of the corpora and the token before it."""
        pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for chunk in _pairs(corpora, vocab_size, isolate):
            pairs, counts = _merge(pairs, counts, *np.unique(chunk, return_counts=True))
        first, second = np.divmod(pairs, vocab_size)
        occurrences = _sum(second, counts, vocab_size)
        seen = np.count_nonzero(occurrences)
        total = occurrences.sum() + seen
        unigram = (occurrences + seen / vocab_size) / total if total else np.full(vocab_size, 1 / vocab_size)
        kinds = np.bincount(first, minlength=vocab_size)
        return cls(unigram, _sum(first, counts, vocab_size), kinds, pairs, counts)

    def log_probabilities(
        self, pairs: Int64[np.ndarray, " scored"]
    ) -> tuple[Float64[np.ndarray, " scored"], Float64[np.ndarray, " scored"]]:
        """log p(w) and log p(w | v) of pairs v * vocab_size + w."""
        first, second = np.divmod(pairs, len(self.unigram))
        unigram = self.unigram[second]
        found = np.searchsorted(self.pairs, pairs)
        found[found == len(self.pairs)] = 0
        count = np.where(self.pairs[found] == pairs, self.counts[found], 0) if len(self.pairs) else 0
        followers, kinds = self.followers[first], self.kinds[first]
        known = followers > 0  # after a token that never had a follower, only the unigram speaks
        bigram = np.where(known, (count + kinds * unigram) / np.where(known, followers + kinds, 1), unigram)
        return np.log(unigram), np.log(bigram)


def baselines(dataset: Dataset) -> Baselines:
    """The losses of both models on a data set's validation split.

    In a mixture, the models are fitted on all training documents as they are, whatever the weights.
    """
    isolate = dataset.train.layout.isolate
    model = BigramModel.fit(dataset.train.corpora, dataset.vocab_size, isolate=isolate)
    unigram, bigram, total = 0.0, 0.0, 0
    for chunk in _pairs(dataset.validation.corpora, dataset.vocab_size, isolate):
        pairs, counts = np.unique(chunk, return_counts=True)
        log_unigram, log_bigram = model.log_probabilities(pairs)
        unigram -= float(log_unigram @ counts)
        bigram -= float(log_bigram @ counts)
        total += len(chunk)
    if not total:
        return Baselines(math.nan, math.nan)
    return Baselines(unigram / total, bigram / total)


def _pairs(corpora: Sequence[Corpus], vocab_size: int, isolate: bool) -> Iterator[Int64[np.ndarray, " pairs"]]:
    """Every scored token with the one before it, as before * vocab_size + token: the rows' own inputs and labels."""
    for corpus in corpora:
        length = min(_CHUNK, max(corpus.num_tokens, 1))
        rows = Rows(corpus, None, Layout(sequence_length=length, isolate=isolate, pad_id=0))
        for number in range(len(rows)):
            row = rows.read(np.array([number]))
            scored = row["labels"] != IGNORE
            yield row["input_ids"][scored].astype(np.int64) * vocab_size + row["labels"][scored]


def _merge(
    pairs: Int64[np.ndarray, " a"],
    counts: Int64[np.ndarray, " a"],
    more_pairs: Int64[np.ndarray, " b"],
    more_counts: Int64[np.ndarray, " b"],
) -> tuple[Int64[np.ndarray, " c"], Int64[np.ndarray, " c"]]:
    """Two sorted tables of counts as one."""
    merged, places = np.unique(np.concatenate([pairs, more_pairs]), return_inverse=True)
    return merged, _sum(places, np.concatenate([counts, more_counts]), len(merged))


def _sum(places: Int64[np.ndarray, " n"], counts: Int64[np.ndarray, " n"], length: int) -> Int64[np.ndarray, " length"]:
    """Sums of counts by place."""
    # bincount adds in float64, which is exact below 2^53.
    return np.bincount(places, weights=counts, minlength=length).astype(np.int64)
