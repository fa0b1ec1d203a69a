from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab.data.dataset import (
    Batch,
    Concatenated,
    Mixed,
    Shuffled,
    Table,
    TrainSplit,
    ValidationSplit,
    permutation,
)
from llmlab.data.draws import Draws
from llmlab.data.packing import Corpus, Layout, PackedStream, Rows

CorpusOf = Callable[..., Corpus]
LAYOUT = Layout(sequence_length=6, isolate=True, pad_id=999)

# Each token of the corpus is different, so a batch tells where its tokens come from.
corpora = st.lists(st.integers(1, 20), min_size=1, max_size=9).map(
    lambda lengths: [list(range(30 * i, 30 * i + length)) for i, length in enumerate(lengths)]
)


def train_split(corpus_of: CorpusOf, *corpora: list[list[int]], **changes: Any) -> TrainSplit:
    arguments: dict[str, Any] = {"batch_size": 4, "seed": 0, "weights": [1.0] * len(corpora), "layout": LAYOUT}
    arguments |= changes
    streams = [
        PackedStream(corpus_of(documents), arguments["layout"], arguments["seed"], i)
        for i, documents in enumerate(corpora)
    ]
    return TrainSplit(Mixed(streams, arguments["weights"]), batch_size=arguments["batch_size"])


def validation_split(corpora: list[Corpus], layout: Layout, batch_size: int) -> ValidationSplit:
    return ValidationSplit(Concatenated([Rows(corpus, None, layout) for corpus in corpora]), batch_size=batch_size)


def stacked(split: TrainSplit | ValidationSplit, steps: range) -> dict[str, np.ndarray]:
    batches = [split.batch(step) for step in steps]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@given(documents=corpora, isolate=st.booleans(), epochs=st.integers(1, 3))
def test_every_epoch_reads_every_training_token_exactly_once(
    documents: list[list[int]], isolate: bool, epochs: int, corpus_of: CorpusOf
) -> None:
    layout = Layout(sequence_length=6, isolate=isolate, pad_id=999)
    split = train_split(corpus_of, documents, layout=layout, batch_size=1)
    rows_per_epoch = -(-sum(map(len, documents)) // 6)
    every_token = Counter(token for document in documents for token in document)
    for epoch in range(epochs):
        batch = stacked(split, range(epoch * rows_per_epoch, (epoch + 1) * rows_per_epoch))
        assert Counter(batch["input_ids"][batch["segment_ids"] > 0].tolist()) == every_token
    assert split.epochs(rows_per_epoch) == (1.0,)


@given(documents=corpora, seed=st.integers(0, 2**63), steps=st.permutations(range(8)))
def test_a_batch_depends_on_seed_and_step_alone(
    documents: list[list[int]], seed: int, steps: list[int], corpus_of: CorpusOf
) -> None:
    in_order, shuffled = (train_split(corpus_of, documents, seed=seed) for _ in range(2))
    expected = [in_order.batch(step) for step in range(8)]
    for step in steps:  # as a resumed run would: from anywhere, with nothing before
        for name, array in shuffled.batch(step).items():
            np.testing.assert_array_equal(array, expected[step][name])


@given(documents=corpora, other=corpora, step=st.integers(0, 30), num_hosts=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_parts_of_any_number_of_hosts_make_the_same_batch(
    documents: list[list[int]], other: list[list[int]], step: int, num_hosts: int, corpus_of: CorpusOf
) -> None:
    split = train_split(corpus_of, documents, other, batch_size=12, weights=[2.0, 1.0])
    parts = [split.batch(step, host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    for name, array in split.batch(step).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_epochs_and_seeds_differ_in_the_order_of_documents_and_of_rows(corpus_of: CorpusOf) -> None:
    documents = [list(range(300 * i, 300 * i + 30)) for i in range(40)]  # 5 rows each, cut at the same places
    layout = Layout(sequence_length=6, isolate=True, pad_id=999)

    def first_tokens(seed: int, epoch: int) -> list[int]:
        split = train_split(corpus_of, documents, seed=seed, layout=layout, batch_size=10)
        return stacked(split, range(20 * epoch, 20 * (epoch + 1)))["input_ids"][:, 0].tolist()

    orders = [first_tokens(seed, epoch) for seed in range(2) for epoch in range(2)]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_rows_are_cut_at_other_places_in_every_epoch(corpus_of: CorpusOf) -> None:
    documents = [list(range(30 * i, 30 * i + 7)) for i in range(40)]
    split = train_split(corpus_of, documents, batch_size=1)
    epochs = [set(stacked(split, range(47 * epoch, 47 * epoch + 47))["input_ids"][:, 0]) for epoch in range(2)]
    assert epochs[0] != epochs[1]  # were the documents in the same order, the rows would begin with the same tokens


def test_a_single_documents_rows_are_in_another_order_in_every_epoch(corpus_of: CorpusOf) -> None:
    split = train_split(corpus_of, [list(range(600))], batch_size=100)
    first, second = (split.batch(epoch)["input_ids"][:, 0].tolist() for epoch in range(2))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(0, 600, 6))


def test_rows_of_one_long_document_are_spread_over_the_epoch(corpus_of: CorpusOf) -> None:
    long, short = list(range(0, 600)), [list(range(1000 * i, 1000 * i + 60)) for i in range(1, 31)]
    split = train_split(corpus_of, [long, *short], batch_size=20)  # 100 rows are the long one's, 300 the others'
    shares = [np.mean(split.batch(step)["input_ids"][:, 0] < 600) for step in range(20)]
    # A fair deal gives 5 of 20 rows a batch; rows in the order of the text would give whole batches of the one.
    assert max(shares) < 0.7


def test_a_mixture_gives_each_source_its_share_and_reads_each_in_its_own_order(corpus_of: CorpusOf) -> None:
    first, second = [[i] * 6 for i in range(1, 6)], [[i] * 6 for i in range(11, 31)]
    split = train_split(corpus_of, first, second, weights=[3.0, 1.0], batch_size=8)
    seen = stacked(split, range(20))["input_ids"][:, 0]
    assert np.count_nonzero(seen < 10) == 120  # of 160
    alone = train_split(corpus_of, first, batch_size=8)
    np.testing.assert_array_equal(seen[seen < 10], stacked(alone, range(15))["input_ids"][:, 0])
    assert split.epochs(20) == (120 / 5, 40 / 20)


@settings(max_examples=50)
@given(parts=st.lists(corpora, min_size=1, max_size=3), isolate=st.booleans(), batch_size=st.integers(1, 7))
def test_validation_scores_every_token_exactly_once(
    parts: list[list[list[int]]], isolate: bool, batch_size: int, corpus_of: CorpusOf
) -> None:
    layout = Layout(sequence_length=6, isolate=isolate, pad_id=999)
    held_out = [corpus_of(documents) for documents in parts]
    split = validation_split(held_out, layout, batch_size)
    batches = stacked(split, range(split.num_batches))
    assert batches["labels"].shape == (split.num_batches * batch_size, 6)
    expected: Counter[int] = Counter()
    for documents in parts:
        pieces = documents if isolate else [[token for document in documents for token in document]]
        expected.update(token for piece in pieces for token in piece[1:])
    scored = batches["labels"][batches["labels"] != -100]
    assert Counter(scored.tolist()) == expected
    assert sum(corpus.num_scored(isolate) for corpus in held_out) == len(scored)
    assert not batches["segment_ids"][batches["input_ids"] == 999].any()


def test_the_first_validation_batches_are_a_sample_of_all_documents(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([[i] * 6 for i in range(100)])  # a row each
    split = validation_split([corpus], LAYOUT, 10)
    first = stacked(split, range(3))["input_ids"][:, 0]
    # The mean of 30 of 0..99 has a standard deviation of 4.4 around 49.5; the first 30 alone have the mean 14.5.
    assert 32 < first.mean() < 67


def test_validation_is_in_the_same_order_for_any_number_of_hosts_and_ends(corpus_of: CorpusOf) -> None:
    corpus = corpus_of([list(range(30 * i, 30 * i + 17)) for i in range(9)])
    split = validation_split([corpus], LAYOUT, 4)
    for step in range(split.num_batches):
        parts = [split.batch(step, host=host, num_hosts=2) for host in range(2)]
        for name, array in split.batch(step).items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    with pytest.raises(ValueError, match="not one of the 7 validation batches"):
        split.batch(7)


def test_hosts_that_cannot_share_a_batch_are_told_which_sizes_work(corpus_of: CorpusOf) -> None:
    split = train_split(corpus_of, [[1, 2, 3]], batch_size=10)
    with pytest.raises(ValueError, match=r"batch_size=10 is not divisible by 4 hosts; use 8 or 12"):
        split.batch(0, host=0, num_hosts=4)
    with pytest.raises(ValueError, match=r"host=2 is not one of num_hosts=2"):
        split.batch(0, host=2, num_hosts=2)
    with pytest.raises(ValueError, match="steps begin at 0"):
        split.batch(-1)


@given(length=st.integers(0, 50), key=st.lists(st.integers(0, 2**64), min_size=1, max_size=4))
def test_a_permutation_is_one_and_depends_on_its_key(length: int, key: list[int]) -> None:
    order = permutation(length, *key)
    assert sorted(order.tolist()) == list(range(length))
    np.testing.assert_array_equal(order, permutation(length, *key))
    if length > 20:  # 1 in 20! that two keys agree
        assert permutation(length, *key, 1).tolist() != order.tolist()


class Images(Table):
    """Rows of another shape: image i is full of i, its label is i; a blank has the label -1."""

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def read(self, numbers: np.ndarray) -> Batch:
        label = np.where(numbers < self.count, numbers + self.first, -1).astype(np.int32)
        return {"pixel_values": np.broadcast_to(label[:, None, None, None], (len(label), 2, 3, 1)), "labels": label}


@given(count=st.integers(1, 20), batch_size=st.sampled_from([4, 12]), num_hosts=st.sampled_from([1, 2, 4]))
def test_arrays_of_any_shape_make_batches(count: int, batch_size: int, num_hosts: int) -> None:
    train = TrainSplit(Shuffled(Images(count), seed=5), batch_size=batch_size)
    steps = -(-2 * count // batch_size)
    batches = [train.batch(s, host=h, num_hosts=num_hosts) for s in range(steps) for h in range(num_hosts)]
    assert all(batch["pixel_values"].shape == (batch_size // num_hosts, 2, 3, 1) for batch in batches)
    labels = np.concatenate([batch["labels"] for batch in batches])
    for epoch in range(2):
        assert sorted(labels[epoch * count : (epoch + 1) * count].tolist()) == list(range(count))
    assert train.epochs(steps) == (steps * batch_size / count,)


def test_a_mixture_of_tables_and_their_concatenation_keep_shapes_and_end_with_blanks() -> None:
    tables = [Images(3), Images(0, 100), Images(4, 10)]
    mixed = TrainSplit(Mixed([Shuffled(tables[0], 0), Shuffled(tables[2], 1)], [1.0, 1.0]), batch_size=8)
    batch = mixed.batch(3)
    assert batch["pixel_values"].shape == (8, 2, 3, 1)
    assert np.count_nonzero(batch["labels"] >= 10) == 4
    np.testing.assert_array_equal(batch["pixel_values"][:, 1, 2, 0], batch["labels"])
    split = ValidationSplit(Concatenated(tables), batch_size=4)
    assert sorted(stacked(split, range(split.num_batches))["labels"].tolist()) == [-1, 0, 1, 2, 10, 11, 12, 13]


@settings(max_examples=25)  # 600 draws each
@given(documents=corpora.filter(lambda documents: len(documents) > 1), seed=st.integers(0, 99))
def test_another_documents_row_is_never_the_same_documents_and_any_of_them(
    documents: list[list[int]], seed: int, corpus_of: CorpusOf
) -> None:
    layout = Layout(sequence_length=6, isolate=True, pad_id=999, share=False)
    stream = Mixed([PackedStream(corpus_of(documents), layout, seed)], [1.0])
    for number in range(12):
        own = stream.read(np.array([number]))["input_ids"][0, 0] // 30
        assert stream.other(number, Draws(seed, number))["input_ids"][0, 0] // 30 != own
    rows = Rows(corpus_of(documents), None, layout)
    found = {int(rows.other(0, Draws(seed, i))["input_ids"][0, 0]) for i in range(600)}
    starts = {document[i] for document in documents[1:] for i in range(0, len(document), 6)}
    assert found <= starts
    if len(starts) < 20:  # a row is missed in 600 draws with probability below 20 (19/20)^600 = 1e-12
        assert found == starts
