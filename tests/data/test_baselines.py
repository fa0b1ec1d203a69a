import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.baselines import BigramModel, next_token, pairs_of, sequences, targets
from llmlab.data.dataset import Batch, Concatenated, Shuffled, Table, TrainSplit, ValidationSplit
from llmlab.data.packing import Corpus, Layout, Rows

CorpusOf = Callable[..., Corpus]
VOCAB = 7
some_documents = st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=9), min_size=1, max_size=6)


def pairs_by_hand(parts: Sequence[Sequence[Sequence[int]]], isolate: bool) -> list[tuple[int, int]]:
    pairs = []
    for documents in parts:
        pieces = documents if isolate else [[token for document in documents for token in document]]
        pairs += [(piece[i], piece[i + 1]) for piece in pieces for i in range(len(piece) - 1)]
    return pairs


def losses_by_hand(train: list[tuple[int, int]], validation: list[tuple[int, int]]) -> dict[str, float]:
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
    return {
        "unigram": -sum(math.log(unigram(w)) for _, w in validation) / len(validation),
        "bigram": -sum(math.log(bigram(v, w)) for v, w in validation) / len(validation),
    }


def validation_of(corpora: Sequence[Corpus], isolate: bool) -> ValidationSplit:
    layout = Layout(sequence_length=4, isolate=isolate, pad_id=0)
    return ValidationSplit(Concatenated([Rows(corpus, None, layout) for corpus in corpora]), batch_size=3)


@given(
    train=st.lists(some_documents, min_size=1, max_size=2),
    validation=some_documents,
    isolate=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_losses_are_those_of_the_formulas_applied_one_token_at_a_time(
    train: list[list[list[int]]], validation: list[list[int]], isolate: bool, chunk: int, corpus_of: CorpusOf
) -> None:
    corpora, held_out = [corpus_of(part) for part in train], [corpus_of(validation)]
    scored = pairs_by_hand([validation], isolate)
    with mock.patch("llmlab.data.baselines._CHUNK", chunk):
        found = next_token(corpora, held_out, VOCAB, isolate=isolate)
    if not scored:
        assert math.isnan(found["unigram"])
        assert math.isnan(found["bigram"])
        return
    expected = losses_by_hand(pairs_by_hand(train, isolate), scored)
    assert found == pytest.approx(expected, rel=1e-12)  # float64 sums in another order


@given(validation=some_documents, isolate=st.booleans())
def test_the_tokens_scored_are_those_of_the_validation_batches(
    validation: list[list[int]], isolate: bool, corpus_of: CorpusOf
) -> None:
    train, held_out = [corpus_of([[0, 1, 2, 3, 1, 1, 0]])], [corpus_of(validation)]
    model = BigramModel.fit(pairs_of(train, VOCAB, isolate), VOCAB)
    total, count, split = np.zeros(2), 0, validation_of(held_out, isolate)
    for step in range(split.num_batches):
        batch = split.batch(step)
        scored = batch["labels"] != -100
        pairs = batch["input_ids"][scored].astype(np.int64) * VOCAB + batch["labels"][scored]
        total -= [log_p.sum() for log_p in model.log_probabilities(pairs)]
        count += int(scored.sum())
    if count:
        found = next_token(train, held_out, VOCAB, isolate=isolate)
        # 1e-12: the order of the sums
        np.testing.assert_allclose([found["unigram"], found["bigram"]], total / count, rtol=1e-12)


def test_a_language_that_the_bigram_knows_costs_it_almost_nothing(corpus_of: CorpusOf) -> None:
    cycle = [i % VOCAB for i in range(70_000)]
    found = next_token([corpus_of([cycle])], [corpus_of([cycle[:700]])], VOCAB, isolate=True)
    assert found["unigram"] == pytest.approx(math.log(VOCAB), rel=1e-3)  # all equally frequent, but for the first
    assert found["bigram"] < 1e-3


class Labels(Table):
    """Rows of two targets each, some of them not counted, and of what comes before each."""

    def __init__(self, labels: list[list[int]]) -> None:
        self.labels = np.array([*labels, [-100, -100]], np.int32)
        self.previous = np.arange(self.labels.size, dtype=np.int32).reshape(-1, 2) % 3

    def __len__(self) -> int:
        return len(self.labels) - 1

    def read(self, numbers: np.ndarray) -> Batch:
        return {"labels": self.labels[numbers], "previous": self.previous[numbers]}

    def pairs(self) -> list[tuple[int, int]]:
        flat = zip(self.previous.reshape(-1).tolist(), self.labels.reshape(-1).tolist(), strict=True)
        return [pair for pair in flat if pair[1] != -100]


some_labels = st.lists(st.lists(st.sampled_from([-100, 0, 1, 2, 3]), min_size=2, max_size=2), min_size=1, max_size=9)


@given(train=some_labels, validation=some_labels)
def test_the_unigram_of_targets_is_fitted_on_a_training_epoch_and_scores_the_validation_targets(
    train: list[list[int]], validation: list[list[int]]
) -> None:
    found = targets(
        TrainSplit(Shuffled(Labels(train), seed=3), batch_size=1),
        ValidationSplit(Labels(validation), batch_size=2),
        VOCAB,
    )
    counts = Counter(label for row in train for label in row if label != -100)
    scored = [label for row in validation for label in row if label != -100]
    total, kinds = sum(counts.values()), len(counts)
    if not scored:
        assert math.isnan(found)
    else:
        p = [(counts[w] + kinds / VOCAB) / (total + kinds) if kinds else 1 / VOCAB for w in scored]
        assert found == pytest.approx(-np.mean(np.log(p)), rel=1e-12)


@given(train=some_labels, validation=some_labels)
def test_the_bigram_of_targets_looks_at_the_array_that_holds_the_target_before(
    train: list[list[int]], validation: list[list[int]]
) -> None:
    tables = Labels(train), Labels(validation)
    found = sequences(
        TrainSplit(Shuffled(tables[0], seed=3), batch_size=1),
        ValidationSplit(tables[1], batch_size=2),
        VOCAB,
        "previous",
    )
    if tables[1].pairs():
        assert found == pytest.approx(losses_by_hand(tables[0].pairs(), tables[1].pairs()), rel=1e-12)
    else:
        assert math.isnan(found["bigram"])
