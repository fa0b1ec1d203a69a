import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.baselines import Baselines, BigramModel, baselines
from llmlab.data.dataset import Dataset, TrainSplit, ValidationSplit
from llmlab.data.packing import Corpus, Layout

CorpusOf = Callable[..., Corpus]
VOCAB = 7
some_documents = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=9), min_size=1, max_size=6)


def pairs_by_hand(parts: Sequence[Sequence[Sequence[int]]], isolate: bool) -> list[tuple[int, int]]:
    pairs = []
    for documents in parts:
        pieces = documents if isolate else [[token for document in documents for token in document]]
        pairs += [(piece[i], piece[i + 1]) for piece in pieces for i in range(len(piece) - 1)]
    return pairs


def losses_by_hand(train: list[tuple[int, int]], validation: list[tuple[int, int]]) -> Baselines:
    """Witten-Bell as the formulas read, one token at a time."""
    occurrences = Counter(w for _, w in train)
    following: dict[int, Counter[int]] = defaultdict(Counter)
    for v, w in train:
        following[v][w] += 1

    def unigram(w: int) -> float:
        if not train:
            return 1 / VOCAB
        return (occurrences[w] + len(occurrences) / VOCAB) / (len(train) + len(occurrences))

    def bigram(v: int, w: int) -> float:
        kinds = len(following[v])
        if not kinds:
            return unigram(w)
        return (following[v][w] + kinds * unigram(w)) / (sum(following[v].values()) + kinds)

    for v in range(VOCAB):
        assert math.isclose(sum(bigram(v, w) for w in range(VOCAB)), 1)
    return Baselines(
        -sum(math.log(unigram(w)) for _, w in validation) / len(validation),
        -sum(math.log(bigram(v, w)) for v, w in validation) / len(validation),
    )


def dataset_of(train: list[Corpus], validation: list[Corpus], isolate: bool) -> Dataset:
    layout = Layout(sequence_length=4, isolate=isolate, pad_id=0)
    return Dataset(
        train=TrainSplit(train, [1.0] * len(train), layout, batch_size=2, seed=0),
        validation=ValidationSplit(validation, layout, batch_size=3),
        vocab_size=VOCAB,
        fingerprint="",
        sources=(),
    )


@given(
    train=st.lists(some_documents, min_size=1, max_size=2),
    validation=some_documents,
    isolate=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_losses_are_those_of_the_formulas_applied_one_token_at_a_time(
    train: list[list[list[int]]], validation: list[list[int]], isolate: bool, chunk: int, corpus_of: CorpusOf
) -> None:
    dataset = dataset_of([corpus_of(part) for part in train], [corpus_of(validation)], isolate)
    scored = pairs_by_hand([validation], isolate)
    with mock.patch("llmlab.data.baselines._CHUNK", chunk):
        found = baselines(dataset)
    if not scored:
        assert math.isnan(found.unigram)
        assert math.isnan(found.bigram)
        return
    expected = losses_by_hand(pairs_by_hand(train, isolate), scored)
    assert found.unigram == pytest.approx(expected.unigram, rel=1e-12)  # float64 sums in another order
    assert found.bigram == pytest.approx(expected.bigram, rel=1e-12)


@given(validation=some_documents, isolate=st.booleans())
def test_the_tokens_scored_are_those_of_the_validation_batches(
    validation: list[list[int]], isolate: bool, corpus_of: CorpusOf
) -> None:
    dataset = dataset_of([corpus_of([[0, 1, 2, 3, 1, 1, 0]])], [corpus_of(validation)], isolate)
    model = BigramModel.fit(dataset.train.corpora, VOCAB, isolate=isolate)
    total, count = np.zeros(2), 0
    for step in range(dataset.validation.num_batches):
        batch = dataset.validation.batch(step)
        scored = batch["labels"] != -100
        pairs = batch["input_ids"][scored].astype(np.int64) * VOCAB + batch["labels"][scored]
        total -= [log_p.sum() for log_p in model.log_probabilities(pairs)]
        count += int(scored.sum())
    if count:
        found = baselines(dataset)
        np.testing.assert_allclose([found.unigram, found.bigram], total / count, rtol=1e-12)  # order of the sums


def test_a_language_that_the_bigram_knows_costs_it_almost_nothing(corpus_of: CorpusOf) -> None:
    cycle = [i % VOCAB for i in range(70_000)]
    found = baselines(dataset_of([corpus_of([cycle])], [corpus_of([cycle[:700]])], isolate=True))
    assert found.unigram == pytest.approx(math.log(VOCAB), rel=1e-3)  # all equally frequent, but for the first
    assert found.bigram < 1e-3
