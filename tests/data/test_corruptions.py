"""What holds for every corruption: rows of fixed shapes that depend on (seed, split, row number) alone."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llmlab.data import (
    Blanks,
    Corruption,
    Denoising,
    FactorizationOrder,
    NextSentence,
    Packed,
    RandomPrefix,
    SentenceOrder,
    SpanCorruption,
    SpanMasking,
    TextFiles,
    TokenMasking,
    sentinels,
)
from llmlab.data.corrupting import CorruptedStream, CorruptedTable
from llmlab.data.dataset import Dataset, TrainSplit, ValidationSplit
from llmlab.data.packing import Corpus, Layout, PackedStream, Rows
from llmlab.tokenizers import Bytes, SpecialTokens, Tokenizer

CorpusOf = Callable[..., Corpus]
SPECIAL = SpecialTokens(mask="[MASK]", cls="[CLS]", sep="[SEP]", extra=sentinels(8))
TOKENIZER: Tokenizer = Bytes(special=SPECIAL).build()
LENGTH = 32
CORRUPTIONS: list[Corruption] = [
    TokenMasking(),
    TokenMasking(whole_words=True),
    SpanMasking(),
    NextSentence(),
    SentenceOrder(masking=SpanMasking()),
    FactorizationOrder(),
    RandomPrefix(),
    SpanCorruption(mean_length=1.5),
    Denoising(rotate=0.5, delete_rate=0.1),
    Blanks(),
    Blanks(two_dimensional=False),
]
every_corruption = pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda c: type(c).__name__)


def documents(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdef"), rng.integers(1, 7))) for _ in range(30)]
    texts = [" ".join(rng.choice(words, rng.integers(1, 30))) + ". More. Yes?" for _ in range(count)]
    return [TOKENIZER.encode(text) for text in texts]


def layout(corruption: Corruption) -> Layout:
    length = corruption.text_length(LENGTH)
    return Layout(sequence_length=length, isolate=True, pad_id=258, share=not corruption.whole_row)


@pytest.fixture
def train(corruption: Corruption, corpus_of: CorpusOf) -> Callable[..., TrainSplit]:
    def make(seed: int = 0) -> TrainSplit:
        rows = PackedStream(corpus_of(documents(20)), layout(corruption), seed)
        corrupted = CorruptedStream(rows, corruption.build(TOKENIZER, LENGTH), seed)
        return TrainSplit(corrupted, batch_size=8)

    return make


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])
        assert found[name].dtype == expected[name].dtype


@every_corruption
def test_a_batch_depends_on_seed_and_step_alone(train: Callable[..., TrainSplit]) -> None:
    in_order = train()
    expected = [in_order.batch(step) for step in range(5)]
    resumed = train()
    for step in (3, 1, 4):
        assert_same(resumed.batch(step), expected[step])


@every_corruption
@pytest.mark.parametrize("num_hosts", [2, 4, 8])
def test_the_parts_of_any_number_of_hosts_make_the_same_batch(train: Callable[..., TrainSplit], num_hosts: int) -> None:
    split = train(seed=1)
    parts = [split.batch(2, host=host, num_hosts=num_hosts) for host in range(num_hosts)]
    assert_same({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, split.batch(2))


@every_corruption
def test_rows_are_corrupted_anew_in_every_epoch_and_differently_by_seed(
    corruption: Corruption, corpus_of: CorpusOf
) -> None:
    # One document of one row: the same text every time, so only the corruption can differ.
    text = TOKENIZER.encode("abc de f. gh ijk. l")
    other = [TOKENIZER.encode("no pqr. st uv. w xyz")] if corruption.compares else []
    rows = PackedStream(corpus_of([text, *other]), layout(corruption), 0)

    def corrupted(seed: int) -> set[bytes]:
        stream = CorruptedStream(rows, corruption.build(TOKENIZER, LENGTH), seed)
        batch = stream.read(np.arange(24))
        return {b"".join(array[i].tobytes() for array in batch.values()) for i in range(24)}

    first, second = corrupted(0), corrupted(1)
    assert len(first) > 8
    assert first != second


@every_corruption
def test_shapes_and_types_do_not_depend_on_the_rows_and_a_blank_row_counts_nothing(
    corruption: Corruption, train: Callable[..., TrainSplit], corpus_of: CorpusOf
) -> None:
    table = CorruptedTable(Rows(corpus_of(documents(3)), None, layout(corruption)), corruption.build(TOKENIZER, LENGTH))
    batches = [train().batch(0), ValidationSplit(table, batch_size=4).batch(0), table.read(np.zeros(0, np.int64))]
    shapes = [{name: (array.shape[1:], array.dtype) for name, array in batch.items()} for batch in batches]
    assert shapes[0] == shapes[1] == shapes[2]
    blank = table.read(np.array([len(table)]))
    for name in ("labels", "next_sentence_label"):
        assert name not in blank or (blank[name] == -100).all()
    for name in ("attention_mask", "decoder_attention_mask"):  # a row that sees nothing has no softmax
        if name in blank and not isinstance(corruption, FactorizationOrder):
            assert blank[name].sum() == 1


@every_corruption
def test_validation_is_the_same_for_every_seed(corruption: Corruption, tmp_path: Any) -> None:
    dataset, again = (build(corruption, tmp_path, seed=seed) for seed in (0, 1))
    assert dataset.validation.num_batches > 1
    for step in range(dataset.validation.num_batches):
        assert_same(dataset.validation.batch(step), again.validation.batch(step))
    assert dataset.fingerprint == again.fingerprint


def build(corruption: Corruption, directory: Any, *, seed: int = 0, isolate: bool = True) -> Dataset:
    path = directory / "text.txt"
    path.write_text("\n".join(TOKENIZER.decode(document) for document in documents(60)))
    source = TextFiles(str(path), separator="\n")
    data = Packed(source, validation_fraction=0.3, corruption=corruption, isolate=isolate)
    return data.build(TOKENIZER, sequence_length=LENGTH, batch_size=4, seed=seed, cache_dir=directory)


@every_corruption
def test_baselines_are_finite_and_counting_beats_guessing(corruption: Corruption, tmp_path: Any) -> None:
    dataset = build(corruption, tmp_path)
    found = dataset.baselines(1)
    # guessing among all tokens, and between two answers where there is a second question
    guess = np.log(TOKENIZER.vocab_size) + (np.log(2) if corruption.compares else 0)
    assert found
    assert all(0 < value < guess for value in found.values()), found
    assert dataset.bytes_per_token is None


@every_corruption
def test_plain_concatenation_gives_full_rows(corruption: Corruption, tmp_path: Any) -> None:
    if corruption.compares:
        with pytest.raises(ValueError, match=r"puts different documents together: set data\.isolate=True"):
            build(corruption, tmp_path, isolate=False)
        return
    batch = build(corruption, tmp_path, isolate=False).train.batch(0)
    assert "segment_ids" not in batch
    if "attention_mask" in batch and not isinstance(corruption, Denoising):
        assert batch["attention_mask"].all()


@every_corruption
def test_a_tokenizer_without_the_special_tokens_is_refused_and_told_which(corruption: Corruption) -> None:
    bare = SpecialTokens(bos=None, eos=None, pad=None)
    data = Packed(TextFiles("x.txt"), corruption=corruption)
    problems = "; ".join(data.problems(bare, LENGTH))
    for role in corruption.needs:
        assert f"{role}='" in problems
    assert data.problems(SPECIAL, LENGTH) == []
    assert data.problems(None, LENGTH) == []  # a tokenizer that is still to be opened
    assert "set train.sequence_length" in data.problems(SPECIAL, None)[0]
    if corruption.needs:
        with pytest.raises(ValueError, match="SpecialTokens"):
            data.build(Bytes(special=bare).build(), sequence_length=LENGTH, batch_size=2, seed=0)


def test_pairs_of_documents_need_two_of_them_on_both_sides(tmp_path: Any) -> None:
    (tmp_path / "one.txt").write_text("a b c. d e f.")
    (tmp_path / "two.txt").write_text("a b c. d e f.\ng h. i")
    one, two = TextFiles(str(tmp_path / "one.txt")), TextFiles(str(tmp_path / "two.txt"), separator="\n")
    for source, validation in ((one, two), (two, one)):
        data = Packed(source, validation=validation, corruption=NextSentence())
        with pytest.raises(ValueError, match="need two documents at least on both sides"):
            data.build(TOKENIZER, sequence_length=LENGTH, batch_size=2, seed=0, cache_dir=tmp_path)
    data = Packed(two, validation=two, corruption=NextSentence())
    data.build(TOKENIZER, sequence_length=LENGTH, batch_size=2, seed=0, cache_dir=tmp_path)


def test_too_few_sentinels_are_refused_with_the_number_needed() -> None:
    special = SpecialTokens(extra=sentinels(3))
    [problem] = Packed(TextFiles("x"), corruption=SpanCorruption()).problems(special, 512)
    assert (
        "needs 28 sentinels for rows of 512 tokens, <extra_id_0> to <extra_id_27>, and the tokenizer has 3" in problem
    )
    assert Packed(TextFiles("x"), corruption=SpanCorruption()).problems(SpecialTokens(extra=sentinels(28)), 512) == []


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_too_short_for_any_text_are_refused(length: int) -> None:
    for corruption in (NextSentence(), SpanCorruption(), Denoising(), Blanks()):
        fits = corruption.text_length(length) >= (2 if corruption.compares else 1)
        problems = corruption.problems(SPECIAL, length)
        assert bool(problems) != fits
        assert all(f"train.sequence_length={length} leaves no room" in problem for problem in problems)
