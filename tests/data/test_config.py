import dataclasses
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import JSONLines, Mixture, Packed, Source, StandardLibrary, TextFiles, Weighted
from llmlab.data.building import choose_frame
from llmlab.data.dataset import Dataset, TrainSplit, ValidationSplit
from llmlab.data.store import Frame
from llmlab.tokenizers import SentencePiece
from llmlab.tokenizers.base import Tokenizer

BOS, EOS = 256, 257


def write_lines(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return JSONLines(str(path))


def poems(start: int, stop: int) -> list[str]:
    return [f"poem {i}: " + "roses are red, " * (i % 5) for i in range(start, stop)]


@pytest.fixture
def corpus(tmp_path: Path) -> Source:
    return write_lines(tmp_path / "poems.jsonl", poems(0, 200))


def build(data: Packed | Mixture, tokenizer: Tokenizer, **changes: Any) -> Dataset:
    sizes: dict[str, Any] = {"sequence_length": 16, "batch_size": 4, "seed": 0}
    return data.build(tokenizer, **(sizes | changes))


def inputs(split: TrainSplit | ValidationSplit, num_batches: int) -> list[int]:
    batches = [split.batch(step) for step in range(num_batches)]
    return [token for batch in batches for token in batch["input_ids"][batch["segment_ids"] > 0].tolist()]


def documents_in(tokens: list[int]) -> list[str]:
    """The documents in tokens that hold them whole and one after the other."""
    return [bytes(part).decode() for part in _split(tokens)]


def _split(tokens: list[int]) -> list[list[int]]:
    parts: list[list[int]] = []
    for token in tokens:
        if token == BOS:
            parts.append([])
        elif token != EOS:
            parts[-1].append(token)
    return parts


def sides(data: Packed | Mixture, tokenizer: Tokenizer) -> tuple[set[str], set[str]]:
    """The documents of both splits, read back from their batches: one row, which no document exceeds, each time."""
    dataset = build(data, tokenizer, sequence_length=100_000, batch_size=1)
    return set(documents_in(inputs(dataset.train, 1))), set(documents_in(inputs(dataset.validation, 1)))


def test_every_document_is_on_one_side_and_whole(corpus: Source, tokenizer: Tokenizer) -> None:
    train, validation = sides(Packed(corpus, validation_fraction=0.2), tokenizer)
    assert train | validation == set(poems(0, 200))
    assert not train & validation
    assert 20 <= len(validation) <= 60  # 40 of 200, give or take 3.5 standard deviations


def test_a_documents_side_does_not_change_when_others_come_go_or_move(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def validation(texts: list[str]) -> set[str]:
        return sides(Packed(write_lines(tmp_path / "c.jsonl", texts), validation_fraction=0.3), tokenizer)[1]

    before = validation(poems(0, 60))
    assert validation(poems(0, 90)[::-1]) & set(poems(0, 60)) == before
    assert validation(poems(0, 30)) == before & set(poems(0, 30))
    assert validation([*poems(0, 60), *poems(0, 60)]) == before  # copies are on their original's side


@given(fractions=st.tuples(st.floats(0.2, 0.8), st.floats(0.2, 0.8)).map(sorted))
def test_a_larger_fraction_only_adds_documents_to_validation(
    fractions: list[float], tmp_path_factory: pytest.TempPathFactory
) -> None:
    corpus = write_lines(tmp_path_factory.mktemp("corpus") / "poems.jsonl", poems(0, 40))
    less, more = [Packed(corpus, validation_fraction=fraction) for fraction in fractions]
    assert set(more.training_texts()) <= set(less.training_texts())


def test_training_texts_are_those_of_the_training_batches(corpus: Source, tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = write_lines(tmp_path / "other.jsonl", ["other"])
    for data in (
        Packed(corpus),
        Packed(corpus, validation=held_out),
        Mixture(parts=(Weighted(corpus, 2.0), Weighted(corpus, 1.0))),
    ):
        assert Counter(data.training_texts()).keys() == sides(data, tokenizer)[0]


def test_validation_documents_of_their_own_leave_all_others_to_training(
    corpus: Source, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    held_out = write_lines(tmp_path / "other.jsonl", ["not a poem", "nor this"])
    train, validation = sides(Packed(corpus, validation=held_out), tokenizer)
    assert train == set(poems(0, 200))
    assert validation == {"not a poem", "nor this"}


def test_validation_documents_that_are_trained_on_are_remarked(
    corpus: Source, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    held_out = write_lines(tmp_path / "other.jsonl", ["not a poem", *poems(3, 5)])
    dataset = build(Packed(corpus, validation=held_out), tokenizer)
    assert dataset.remarks == ("2 of 3 validation documents are training documents as well",)
    assert build(Packed(corpus), tokenizer).remarks == ()


def test_skipped_files_and_rebuilt_stores_are_remarked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_bytes(b"\xff" if i < 2 else str(i).encode())
    data = Packed(TextFiles(str(tmp_path / "*.txt"), on_error="skip"), validation_fraction=0.5)
    (skipped,) = build(data, tokenizer, cache_dir=tmp_path).remarks
    assert re.search(r"2 pieces of TextFiles.* were skipped: .*00.txt: not UTF-8.*; .*01.txt: not UTF-8", skipped)
    next(tmp_path.glob("tokens/*/tokens.bin")).write_bytes(b"")
    rebuilt, still_skipped = build(data, tokenizer, cache_dir=tmp_path).remarks
    assert re.search(r"damaged token store was built again: .*tokens.bin has 0 bytes", rebuilt)
    assert still_skipped == skipped


def test_documents_are_framed_so_that_their_first_token_is_predicted(corpus: Source, tokenizer: Tokenizer) -> None:
    dataset = build(Packed(corpus), tokenizer)
    texts = sides(Packed(corpus), tokenizer)[1]
    sizes = dataset.sizes["validation"]
    assert sizes["bytes"] == sum(len(text.encode()) for text in texts)
    assert sizes["tokens"] == sizes["bytes"] + len(texts)  # and every eos
    assert dataset.bytes_per_token == sizes["bytes"] / sizes["tokens"]
    without = build(Packed(corpus, bos=False), tokenizer)
    assert BOS not in inputs(without.validation, without.validation.num_batches)
    assert without.sizes["validation"]["tokens"] == sizes["tokens"] - len(texts)


@pytest.mark.parametrize(
    ("special", "bos", "isolate", "frame"),
    [
        ({"bos": 1, "eos": 2}, True, True, Frame(1, 2)),
        ({"bos": 1, "eos": 2}, True, False, Frame(1, 2)),
        ({"bos": 1, "eos": 2}, False, True, Frame(None, 2)),
        ({"bos": None, "eos": 2}, True, True, Frame(None, 2)),
        ({"bos": 1, "eos": None}, True, True, Frame(1, None)),
        ({"bos": None, "eos": None}, True, True, Frame(None, None)),
        ({"bos": 2, "eos": 2}, True, True, Frame(2, 2)),
        ({"bos": 2, "eos": 2}, True, False, Frame(None, 2)),  # one token between documents, not two
    ],
)
def test_the_frame_is_of_the_special_tokens_there_are(
    special: dict[str, int | None], bos: bool, isolate: bool, frame: Frame, make_tokenizer: Callable[..., Tokenizer]
) -> None:
    assert choose_frame(make_tokenizer(**special), bos=bos, isolate=isolate) == frame


def test_a_mixture_draws_rows_by_weight_and_validates_on_every_sources_validation_documents(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    low = write_lines(tmp_path / "low.jsonl", [f"{i:04} " + "low " * 50 for i in range(100)])
    high = write_lines(tmp_path / "high.jsonl", [f"{i:04} " + "HIGH " * 50 for i in range(30)])
    data = Mixture(parts=(Weighted(low, 1.0), Weighted(high, 3.0)), validation_fraction=0.2)
    dataset = build(data, tokenizer, batch_size=8, sequence_length=32)
    rows = np.concatenate([dataset.train.batch(step)["input_ids"] for step in range(10)])
    is_high = [bytes(int(token) for token in row if token < 256).count(b"HIGH") > 1 for row in rows]
    assert sum(is_high) == 60  # of 80
    alone = [build(Packed(source, validation_fraction=0.2), tokenizer).sizes["validation"] for source in (low, high)]
    assert dataset.sizes["validation"] == {name: sum(sizes[name] for sizes in alone) for name in alone[0]}


def test_a_split_without_documents_on_one_side_is_an_error_with_ways_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "book.txt").write_text("one\n\ntwo\n\nthree\n\n" * 9 + "\n\n".join(map(str, range(200))))
    book = TextFiles(str(tmp_path / "book.txt"))
    with pytest.raises(
        ValueError,
        match=r"leaves no document for validation: .*book.txt.* has 1 document, .*validation=TextFiles.*separator=",
    ):
        build(Packed(book), tokenizer)
    with pytest.raises(ValueError, match="leaves no document for training"):
        build(Packed(book, validation_fraction=1 - 1e-9), tokenizer)
    paragraphs = dataclasses.replace(book, separator="\n\n")
    assert build(Packed(paragraphs), tokenizer).sizes["validation"]["documents"] > 0


def test_a_corpus_without_training_texts_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"no training document with text in it in Packed\(.*blank.txt"):
        list(Packed(TextFiles(str(tmp_path / "blank.txt"))).training_texts())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda corpus: Packed(corpus, validation_fraction=0.0), r"validation_fraction=0.0 must be between 0 and 1"),
        (lambda corpus: Packed(corpus, validation_fraction=1.0), r"validation_fraction=1.0 must be between 0 and 1"),
        (lambda corpus: Mixture(parts=()), "no sources"),
        (lambda corpus: Mixture(parts=(Weighted(corpus, -1.0),)), "weight=-1.0 must be positive"),
    ],
)
def test_configs_that_make_no_sense_are_refused_when_written(
    make: Callable[[Source], object], message: str, corpus: Source
) -> None:
    with pytest.raises(ValueError, match=message):
        make(corpus)


@pytest.mark.parametrize("change", [{"sequence_length": 0}, {"batch_size": 0}, {"seed": -1}])
def test_sizes_that_make_no_batch_are_refused_before_any_work(
    change: dict[str, int], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"=(0|-1) must be at least"):
        build(Packed(TextFiles(str(tmp_path / "not read"))), tokenizer, **change)


def test_fingerprints_tell_data_apart_and_recognise_it(
    corpus: Source, tmp_path: Path, tokenizer: Tokenizer, make_tokenizer: Callable[..., Tokenizer]
) -> None:
    copy = write_lines(tmp_path / "copy.jsonl", poems(0, 200))
    other = write_lines(tmp_path / "other.jsonl", poems(0, 201))
    data = Packed(corpus)
    variants = [
        Packed(other),
        Packed(corpus, isolate=False),
        Packed(corpus, bos=False),
        Packed(corpus, validation_fraction=0.1),
        Packed(corpus, validation=copy),
        Mixture(parts=(Weighted(corpus, 1.0), Weighted(other, 2.0))),
    ]
    assert Packed(copy).fingerprint() == data.fingerprint()
    assert len({variant.fingerprint() for variant in (data, *variants)}) == 1 + len(variants)
    built = [build(variant, tokenizer).fingerprint for variant in (data, *variants)]
    assert build(Packed(copy), tokenizer, seed=1, batch_size=8).fingerprint == built[0]
    assert len({*built, build(data, make_tokenizer(eos=None)).fingerprint}) == 2 + len(variants)


def test_the_description_is_json_and_counts_documents_tokens_and_bytes(corpus: Source, tokenizer: Tokenizer) -> None:
    dataset = build(Packed(corpus), tokenizer)
    description = json.loads(json.dumps(dataset.describe()))
    total = sum(len(text.encode()) for text in poems(0, 200))
    train, validation = description["train"], description["validation"]
    assert train["documents"] + validation["documents"] == 200
    assert train["bytes"] + validation["bytes"] == total
    assert description["sources"][0] | {"fingerprint": "", "source": ""} == {
        "source": "",
        "fingerprint": "",
        "documents": 200,
        "tokens": total + 400,
        "bytes": total,
        "skipped": 0,
    }


def test_with_a_trained_tokenizer_validation_text_is_what_was_held_out_and_baselines_are_finite() -> None:
    data = Packed(StandardLibrary(include=("json", "asyncio", "email")), validation_fraction=0.2)
    tokenizer = SentencePiece(vocab_size=400).build(data.training_texts)
    dataset = build(data, tokenizer, sequence_length=64, batch_size=32)
    held_out = {document.text for document in data.source.documents()} - set(data.training_texts())
    assert dataset.sizes["validation"]["documents"] == len(held_out)
    whole = build(data, tokenizer, sequence_length=1 << 20, batch_size=1).validation.batch(0)
    decoded = [tokenizer.decode(whole["input_ids"][0, whole["segment_ids"][0] == i + 1]) for i in range(len(held_out))]
    assert set(decoded) == held_out
    found = dataset.baselines(1)
    assert 0 < found["bigram"] < found["unigram"] < math.log(tokenizer.vocab_size)


def test_configs_import_neither_numpy_nor_anything_heavier() -> None:
    program = (
        "import sys, llmlab.data; "
        "print([name for name in ('numpy', 'jax', 'zstandard', 'tensorflow_datasets', 'grain') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
