"""What needs no training: losses of counting models, to hold a trained model's loss against.

All are fitted on the training split and score exactly what the model is scored on, so the numbers are comparable:
nats per counted token (or row) of the validation split.

    unigram   p(w) = (c(w) + T / V) / (N + T)                        N tokens, of T kinds, out of V possible
    bigram    p(w | v) = (c(v, w) + T(v) p(w)) / (c(v) + T(v))       c(v) tokens follow v, of T(v) kinds

That is Witten-Bell smoothing (Witten and Bell 1991, "The zero-frequency problem", method C; interpolated as in Chen
and Goodman 1998, section 2.6): the mass given to what was never seen after v is the rate at which new kinds were met
there. It sums to one, leaves nothing at zero, and has no parameter to tune. Where targets are not the text itself
(masked tokens, translations, classes), the unigram is that of the targets, counted over an epoch of training rows.

Counting costs a sort of the token pairs: about a second per 10 million tokens, and memory for the distinct pairs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from llmlab.data.dataset import Batch, TrainSplit, ValidationSplit
from llmlab.data.packing import IGNORE, Corpus, Layout, Rows

_CHUNK = 1 << 22  # tokens counted at a time
_TARGETS = 1 << 20  # targets after which no more are counted: the unigram is known to a thousandth of a nat by then


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
    def fit(cls, chunks: Iterable[Int64[np.ndarray, " _"]], vocab_size: int) -> "BigramModel":
        """Counts pairs of a token and the token after it, given as before * vocab_size + token."""
        pairs, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        for chunk in chunks:
            pairs, counts = _merge(pairs, counts, *np.unique(chunk, return_counts=True))
        first, second = np.divmod(pairs, vocab_size)
        unigram = smoothed(_sum(second, counts, vocab_size))
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


def next_token(
    train: Sequence[Corpus], validation: Sequence[Corpus], vocab_size: int, *, isolate: bool
) -> dict[str, float]:
    """The losses of both models where every token of the text is predicted from those before it.

    In a mixture, the models are fitted on all training documents as they are, whatever the weights.
    """
    model = BigramModel.fit(pairs_of(train, vocab_size, isolate), vocab_size)
    return _score(model, pairs_of(validation, vocab_size, isolate))


def sequences(train: TrainSplit, validation: ValidationSplit, vocab_size: int, previous: str) -> dict[str, float]:
    """The losses of both models where the rows' labels are predicted one after the other.

    `previous` names the array that holds, at the place of each label, the target before it. The models are fitted on
    the labels of an epoch of training rows, or of their first million.
    """

    def pairs(batch: Batch) -> Int64[np.ndarray, " pairs"]:
        scored = batch["labels"] != IGNORE
        return batch[previous][scored].astype(np.int64) * vocab_size + batch["labels"][scored]

    model = BigramModel.fit(map(pairs, _epoch(train, "labels")), vocab_size)
    return _score(model, map(pairs, _all(validation)))


def targets(train: TrainSplit, validation: ValidationSplit, vocab_size: int, labels: str = "labels") -> float:
    """The unigram's loss on the rows' targets, counted over an epoch of training rows or their first million."""
    counts, scored = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    for totals, batches in ((counts, _epoch(train, labels)), (scored, _all(validation))):
        for batch in batches:
            totals += np.bincount(batch[labels][batch[labels] != IGNORE], minlength=vocab_size)
    return -float(np.log(smoothed(counts)) @ scored) / int(scored.sum()) if scored.any() else math.nan


def _epoch(train: TrainSplit, labels: str) -> Iterator[Batch]:
    step = counted = 0
    while min(train.epochs(step)) < 1 and counted < _TARGETS:
        batch = train.batch(step)
        counted += np.count_nonzero(batch[labels] != IGNORE)
        step += 1
        yield batch


def _all(validation: ValidationSplit) -> Iterator[Batch]:
    return map(validation.batch, range(validation.num_batches))


def smoothed(occurrences: Int64[np.ndarray, " kinds"]) -> Float64[np.ndarray, " kinds"]:
    """Witten-Bell probabilities of kinds that were seen so often; all equal where nothing was."""
    seen, possible = np.count_nonzero(occurrences), len(occurrences)
    return (occurrences + seen / possible) / (occurrences.sum() + seen) if seen else np.full(possible, 1 / possible)


def _score(model: BigramModel, chunks: Iterable[Int64[np.ndarray, " _"]]) -> dict[str, float]:
    unigram, bigram, total = 0.0, 0.0, 0
    for chunk in chunks:
        pairs, counts = np.unique(chunk, return_counts=True)
        log_unigram, log_bigram = model.log_probabilities(pairs)
        unigram -= float(log_unigram @ counts)
        bigram -= float(log_bigram @ counts)
        total += len(chunk)
    return {"unigram": unigram / total if total else math.nan, "bigram": bigram / total if total else math.nan}


def pairs_of(corpora: Sequence[Corpus], vocab_size: int, isolate: bool) -> Iterator[Int64[np.ndarray, " _"]]:
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
