"""Rows of examples: every text, label and position in its place, whatever is cut, padded or shuffled."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmlab.data import Data, Digits, LabelledTexts, LabelledWords, Pairs, Questions, Sentences, TextFiles
from llmlab.data.dataset import Dataset
from llmlab.tokenizers import ByteLevelBPE, Bytes, SpecialTokens, Tokenizer, WordPiece

SPECIAL = SpecialTokens(cls="[CLS]", sep="[SEP]", mask="[MASK]")
TOKENIZER = Bytes(special=SPECIAL).build()
LENGTH = 16


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def build(data: Data, *, tokenizer: Tokenizer = TOKENIZER, length: int | None = LENGTH, **sizes: Any) -> Dataset:
    settings: dict[str, Any] = {"batch_size": 4, "seed": 0}
    return data.build(tokenizer, sequence_length=length, **(settings | sizes))


def rows_of(dataset: Dataset, side: str = "validation") -> list[dict[str, Any]]:
    """Every row of a side, blanks left out."""
    split = dataset.validation if side == "validation" else dataset.train
    batch_size, count = split.batch_size, dataset.sizes[side]["rows"]
    batches = [split.batch(step) for step in range(-(-count // batch_size))]
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    if side == "validation":
        for name in ("labels", "start_positions"):
            assert name not in whole or (whole[name][count:] == -100).all()
        assert "loss_mask" not in whole or whole["loss_mask"].tolist() == [1] * count + [0] * (
            len(whole["loss_mask"]) - count
        )
    return [{name: array[i] for name, array in whole.items()} for i in range(count)]


def real(row: dict[str, Any], name: str = "input_ids", mask: str = "attention_mask") -> list[int]:
    ids = row[name][row[mask] == 1].tolist()
    assert (row[name][row[mask] == 0] == TOKENIZER.pad_id).all()
    return ids


def decoded(ids: list[int], tokenizer: Tokenizer = TOKENIZER) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


# --- what holds for all --------------------------------------------------------------------------------------------


def some_data(directory: Path) -> dict[str, Data]:
    words = [f"w{i} said so {'x' * (i % 7)}" for i in range(60)]
    labelled = [{"text": word, "pair": word[::-1], "label": str(i % 3)} for i, word in enumerate(words)]
    tagged = [{"words": word.split(), "labels": [str(len(w) % 2) for w in word.split()]} for word in words]
    asked = [{"question": "who?", "context": word, "answer": "said"} for word in words]
    paths = {
        "labelled": write_records(directory / "labelled.jsonl", labelled),
        "tagged": write_records(directory / "tagged.jsonl", tagged),
        "asked": write_records(directory / "asked.jsonl", asked),
    }
    for name, text in (("source.txt", words), ("target.txt", [word.upper() for word in words])):
        (directory / name).write_text("\n".join(text) + "\n")
    lines = TextFiles(str(directory / "source.txt"), separator="\n")
    return {
        "texts": LabelledTexts(paths["labelled"], validation_fraction=0.3),
        "pairs of texts": LabelledTexts(paths["labelled"], pair="pair", validation_fraction=0.3),
        "words": LabelledWords(paths["tagged"], validation_fraction=0.3),
        "questions": Questions(paths["asked"], validation_fraction=0.3),
        "pairs": Pairs(str(directory / "source.txt"), str(directory / "target.txt"), validation_fraction=0.3),
        "sentences": Sentences(lines, validation_fraction=0.3),
        "digits": Digits(),
        "captions": Digits(captions=True),
    }


every_kind = pytest.mark.parametrize(
    "kind", ["texts", "pairs of texts", "words", "questions", "pairs", "sentences", "digits", "captions"]
)


@every_kind
def test_batches_depend_on_seed_and_step_alone_and_hosts_share_them(kind: str, tmp_path: Path) -> None:
    data = some_data(tmp_path)[kind]
    first, again = build(data), build(data)
    for step in (7, 2):
        batch = again.train.batch(step)
        parts = [first.train.batch(step, host=host, num_hosts=2) for host in range(2)]
        for name, array in batch.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
    other = build(data, seed=1)
    assert first.fingerprint == again.fingerprint == other.fingerprint
    assert any((other.train.batch(0)[name] != array).any() for name, array in first.train.batch(0).items())
    for step in range(first.validation.num_batches):
        for name, array in first.validation.batch(step).items():
            np.testing.assert_array_equal(array, other.validation.batch(step)[name])


@every_kind
def test_every_epoch_has_every_training_example_once(kind: str, tmp_path: Path) -> None:
    dataset = build(some_data(tmp_path)[kind], batch_size=1)
    count = dataset.sizes["train"]["rows"]

    def epoch(number: int) -> Counter[bytes]:
        batches = [dataset.train.batch(number * count + step) for step in range(count)]
        return Counter(b"".join(array.tobytes() for array in batch.values()) for batch in batches)

    if kind not in ("digits", "captions"):  # 1,400 rows of which many are alike are not worth the time
        assert epoch(0) == epoch(1)


@every_kind
def test_a_baseline_is_reported_and_the_description_is_json(kind: str, tmp_path: Path) -> None:
    dataset = build(some_data(tmp_path)[kind])
    found = dataset.baselines(1)
    assert found
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    json.dumps(dataset.describe())


@every_kind
def test_texts_need_a_length_and_pictures_do_not(kind: str, tmp_path: Path) -> None:
    data = some_data(tmp_path)[kind]
    problems = data.problems(SPECIAL, None)
    assert (problems == []) == (kind == "digits")
    assert data.problems(SPECIAL, LENGTH) == []
    if problems:
        with pytest.raises(ValueError, match=r"train\.sequence_length"):
            build(data, length=None)


@every_kind
def test_the_fingerprint_is_that_of_contents_and_choices(kind: str, tmp_path: Path) -> None:
    data = some_data(tmp_path)[kind]
    (tmp_path / "copy").mkdir()
    assert some_data(tmp_path / "copy")[kind].fingerprint() == data.fingerprint()
    changed = dataclasses.replace(data, validation_fraction=0.31)
    assert changed.fingerprint() != data.fingerprint()


# --- labelled texts ------------------------------------------------------------------------------------------------


def test_a_text_and_its_class_share_a_row(tmp_path: Path) -> None:
    records = [{"text": f"text {i} {'long ' * (i % 5)}", "label": i % 2 == 0} for i in range(40)]
    data = LabelledTexts(write_records(tmp_path / "x.jsonl", records), validation_fraction=0.4)
    dataset = build(data)
    found = [
        (decoded(real(row)), int(row["labels"])) for side in ("train", "validation") for row in rows_of(dataset, side)
    ]
    expected = []
    for record in records:
        text = record["text"][: LENGTH - 2]
        expected.append((f"[CLS]{text}[SEP]", ["False", "True"].index(str(record["label"]))))
    assert Counter(found) == Counter(expected)
    assert dataset.num_labels == 2
    cut = sum(len(record["text"]) + 2 > LENGTH for record in records)
    assert f"{cut} of 40 rows are longer than {LENGTH} tokens" in dataset.remarks[0]


def test_the_second_of_two_texts_is_of_another_type(tmp_path: Path) -> None:
    texts = [("a", "b"), ("long text here", "b"), ("a", "long text here"), ("long text here", "another long")]
    records = [{"first": a, "second": b, "label": "x"} for a, b in texts]
    path = write_records(tmp_path / "x.jsonl", records)
    data = LabelledTexts(path, path, text="first", pair="second")
    found = []
    for row in rows_of(build(data)):
        ids, types = real(row), row["token_type_ids"].tolist()
        second = ids.index(TOKENIZER.token_to_id("[SEP]")) + 1
        assert types == [0] * second + [1] * (len(ids) - second) + [0] * (LENGTH - len(ids))
        found.append(decoded(ids))
    assert sorted(found) == sorted(
        [
            "[CLS]a[SEP]b[SEP]",
            "[CLS]long text he[SEP]b[SEP]",  # 13 tokens of text: the longer one is cut
            "[CLS]a[SEP]long text he[SEP]",
            "[CLS]long te[SEP]anothe[SEP]",
        ]
    )
    plain = build(dataclasses.replace(data, token_types=False))
    assert "token_type_ids" not in plain.validation.batch(0)


def test_classes_are_numbered_by_size_then_spelling_or_as_they_are_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.jsonl", [{"text": label, "label": label} for label in ("10", "b", "9", "a")])

    def numbers(**settings: Any) -> dict[str, int]:
        rows = rows_of(build(LabelledTexts(path, path, **settings)))
        return {decoded(real(row)[1:-1]): int(row["labels"]) for row in rows}

    assert numbers() == {"9": 0, "10": 1, "a": 2, "b": 3}
    assert numbers(labels=("b", "a", "10", "9", "c")) == {"b": 0, "a": 1, "10": 2, "9": 3}
    with pytest.raises(ValueError, match=r"labels '9' are not among 'b', 'a', '10'; name all of them"):
        numbers(labels=("b", "a", "10"))


def test_what_knowing_class_frequencies_achieves_is_their_cross_entropy(tmp_path: Path) -> None:
    train = write_records(tmp_path / "t.jsonl", [{"text": str(i), "label": int(i < 6)} for i in range(8)])
    held = write_records(tmp_path / "v.jsonl", [{"text": f"v{i}", "label": int(i < 1)} for i in range(4)])
    found = build(LabelledTexts(train, held), batch_size=1).baselines(1)
    p = {1: (6 + 2 / 2) / 10, 0: (2 + 2 / 2) / 10}  # Witten-Bell: two kinds seen, of two
    assert found == pytest.approx({"class frequencies": -(math.log(p[1]) + 3 * math.log(p[0])) / 4})


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"label": "a"}, "x.jsonl:1: no field 'text'; it has 'label'"),
        ({"text": 1, "label": "a"}, "field 'text' holds int, not str"),
        ({"text": "a", "label": 0.5}, "field 'label' holds float, which names no class"),
    ],
)
def test_records_without_their_fields_are_refused(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(LabelledTexts(write_records(tmp_path / "x.jsonl", [record])))


def test_a_side_without_examples_is_refused(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.jsonl", [{"text": "a", "label": "b"}])
    with pytest.raises(ValueError, match="there is no example for validation"):
        build(LabelledTexts(path, validation_fraction=1e-9))
    both = build(LabelledTexts(path, path))
    assert both.remarks == ("1 of 1 validation examples are training examples as well",)


# --- labelled words ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", ["bytes", "wordpiece", "byte-level"])
def test_a_words_label_stands_at_its_first_token(vocabulary: str, tmp_path: Path) -> None:
    sentences = [["Ada", "Lovelace", "left", "London", "."], ["No", "names", "here"], ["Londonderry"] * 6]
    records = [{"words": s, "labels": ["name" if w[0].isupper() else "other" for w in s]} for s in sentences]
    path = write_records(tmp_path / "x.jsonl", records)
    texts = [" ".join(s) for s in sentences] * 5
    tokenizer = {
        "bytes": Bytes(special=SPECIAL),
        "wordpiece": WordPiece(vocab_size=60),
        "byte-level": ByteLevelBPE(vocab_size=290, special=SPECIAL),
    }[vocabulary].build(lambda: iter(texts))
    rows = rows_of(build(LabelledWords(path, path), tokenizer=tokenizer, length=24))
    assert len(rows) == 3
    for row in rows:
        ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
        marked = [i for i, label in enumerate(labels) if label != -100]
        assert marked[0] == 1  # behind [CLS]
        spans = [ids[a:b] for a, b in zip(marked, [*marked[1:], int(row["attention_mask"].sum()) - 1], strict=True)]
        words = [tokenizer.decode(span).strip().lower() for span in spans]
        [sentence] = [s for s in sentences if s[0].lower() == words[0]]
        expected = [w.lower() for w in sentence][: len(words)]
        assert words[:-1] == expected[:-1]
        assert expected[-1].startswith(words[-1])  # the last may be cut
        assert [labels[i] for i in marked] == [0 if w[0].isupper() else 1 for w in sentence[: len(words)]]


def test_words_and_labels_that_do_not_match_are_refused(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.jsonl", [{"words": ["a", "b"], "labels": ["x"]}])
    with pytest.raises(ValueError, match="2 words and 1 labels; give one to each word"):
        build(LabelledWords(path))


# --- questions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_types", [True, False])
def test_positions_are_those_of_the_answers_words(token_types: bool, tmp_path: Path) -> None:
    context = "It was Ada Lovelace (born 1815), they say; Ada again. " + "And so on. " * 3
    answers = [("Ada Lovelace", 7), ("1815", None), ("Ada", 43), ("It", 0), ("so on", None), ("velace (b", None)]
    records = [
        {"question": f"q{i}?", "context": context, "answer": answer} | ({} if at is None else {"answer_start": at})
        for i, (answer, at) in enumerate(answers)
    ]
    path = write_records(tmp_path / "x.jsonl", records)
    for length in (128, 40):
        rows = rows_of(build(Questions(path, path, token_types=token_types), length=length))
        for row in rows:
            ids = row["input_ids"].tolist()
            separators = [i for i, token in enumerate(ids) if token == TOKENIZER.sep_id]
            number = int(decoded(ids[1 : separators[0]])[1:-1])
            start, end = int(row["start_positions"]), int(row["end_positions"])
            assert separators[0] < start <= end < separators[1]
            expected = "Lovelace (born" if number == 5 else answers[number][0]
            assert decoded(ids[start : end + 1]).strip() == expected
            shown = decoded(ids[separators[0] + 1 : separators[1]])
            assert shown in context
            if answers[number] == ("Ada", 43):  # the second of them
                assert decoded(ids[start:]).strip().startswith("Ada again")
            assert ("token_type_ids" in row) == token_types


def test_a_guess_at_any_token_is_the_baseline_of_answers(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.jsonl", [{"question": "q", "context": "abc", "answer": "b"}])
    # [CLS] q [SEP] a b c [SEP]
    assert build(Questions(path, path), batch_size=1).baselines(1) == pytest.approx({"any token": math.log(7)})


def test_answers_that_do_not_stand_where_they_should_are_refused(tmp_path: Path) -> None:
    for record in ({"answer": "x"}, {"answer": "b", "answer_start": 0}):
        path = write_records(tmp_path / "x.jsonl", [{"question": "q", "context": "abc"} | record])
        with pytest.raises(ValueError, match="does not stand at character"):
            build(Questions(path, path))
    with pytest.raises(ValueError, match=r"cls='\[CLS\]'"):
        build(Questions(path, path), tokenizer=Bytes().build())


# --- pairs ---------------------------------------------------------------------------------------------------------


def write_pairs(directory: Path, pairs: list[tuple[str, str]]) -> tuple[str, str]:
    for i, name in enumerate(("source", "target")):
        (directory / name).write_text("".join(pair[i] + "\n" for pair in pairs))
    return str(directory / "source"), str(directory / "target")


@pytest.mark.parametrize(("start", "bos"), [("pad", False), ("eos", True), ("bos", False)])
def test_the_decoder_reads_what_it_wrote_behind_the_start_token(start: Any, bos: bool, tmp_path: Path) -> None:
    pairs = [("eins", "one"), ("zwei", "two"), ("", "nothing"), ("eine ganz lange Zeile", "a line of some length")]
    files = write_pairs(tmp_path, pairs)
    data = Pairs(*files, *files, target_length=12, start=start, bos=bos, prefix="say: ")
    rows = rows_of(build(data))
    frame = "<s>" if bos else ""
    first = TOKENIZER.token_to_id({"pad": "<pad>", "eos": "</s>", "bos": "<s>"}[start])
    found = []
    for row in rows:
        targets = row["labels"][row["labels"] != -100].tolist()
        assert real(row, "decoder_input_ids", "decoder_attention_mask") == [first, *targets[:-1]]
        assert row["labels"].tolist() == targets + [-100] * (12 - len(targets))
        found.append((decoded(real(row)), decoded(targets)))
    expected = []
    for source, target in (pair for pair in pairs if all(pair)):
        room = LENGTH - 1 - bos, 12 - 1 - bos
        expected.append((f"{frame}{('say: ' + source)[: room[0]]}</s>", f"{frame}{target[: room[1]]}</s>"))
    assert sorted(found) == sorted(expected)


def test_pairs_are_split_by_their_sources(tmp_path: Path) -> None:
    files = write_pairs(tmp_path, [(f"source {i % 50}", f"target {i}") for i in range(200)])
    train, validation = Pairs(*files, validation_fraction=0.3).read()
    assert {source for source, _ in train} | {source for source, _ in validation} == {f"source {i}" for i in range(50)}
    assert not {source for source, _ in train} & {source for source, _ in validation}


def test_files_of_different_lengths_are_refused(tmp_path: Path) -> None:
    files = write_pairs(tmp_path, [("a", "b")] * 3)
    (tmp_path / "target").write_text("b\n")
    with pytest.raises(ValueError, match=r"have 3 and 1 lines"):
        Pairs(*files).read()
    with pytest.raises(ValueError, match="belong together"):
        Pairs(*files, validation_source=files[0])
    assert "no bos" in Pairs(*files, bos=True).problems(SpecialTokens(bos=None), 8)[0]


def test_a_bigram_of_the_targets_is_the_baseline_of_pairs(tmp_path: Path) -> None:
    files = write_pairs(tmp_path, [("x", "ababab"), ("y", "ababab")])
    found = build(Pairs(*files, *files), batch_size=1).baselines(1)
    assert found["bigram"] < found["unigram"] < math.log(TOKENIZER.vocab_size)


# --- sentences, digits ---------------------------------------------------------------------------------------------


def test_guessing_costs_the_logarithm_of_the_rows_compared(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(f"sentence {i}" for i in range(10)))
    source = TextFiles(str(tmp_path / "x.txt"), separator="\n")
    dataset = build(Sentences(source, source), batch_size=4)  # batches of 4, 4 and 2
    assert dataset.baselines(1)["any row of the batch"] == pytest.approx((8 * math.log(4) + 2 * math.log(2)) / 10)
    # in two parts of alternate rows: pairs, and in the last batch one by one
    assert dataset.baselines(2)["any row of the batch"] == pytest.approx(8 * math.log(2) / 10)
    assert sorted(decoded(real(row)) for row in rows_of(dataset))[0] == "[CLS]sentence 0[SEP]"


def test_digits_are_scikit_learns_in_their_places() -> None:
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    known = {
        (image.reshape(8, 8) / 8 - 1).astype(np.float32).tobytes(): int(d)
        for image, d in zip(images, digits, strict=True)
    }
    dataset = build(Digits(), length=None)
    rows = rows_of(dataset)
    assert dataset.num_labels == 10
    assert dataset.sizes["train"]["rows"] + len(rows) == 1797
    assert abs(len(rows) - 0.2 * 1797) < 5 * math.sqrt(1797 * 0.16)
    for row in rows:
        assert row["pixel_values"].shape == (8, 8, 1)
        assert known[row["pixel_values"].tobytes()] == row["labels"]


def test_digits_can_be_larger_and_have_captions() -> None:
    small = rows_of(build(Digits(), length=None))
    rows = rows_of(build(Digits(captions=True, scale=3, mean=(0.0,), std=(2.0,)), length=24))
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for row, plain in zip(rows, small, strict=True):
        assert row["pixel_values"].shape == (24, 24, 1)
        grey = (plain["pixel_values"] + 1) / 2
        for i, j in ((0, 0), (5, 13), (23, 20)):
            assert row["pixel_values"][i, j, 0] == pytest.approx(grey[i // 3, j // 3, 0] / 2)
        assert decoded(real(row)) == f"<s>a handwritten {names[plain['labels']]}</s>"


def test_a_caption_that_is_cut_keeps_its_end() -> None:
    row = rows_of(build(Digits(captions=True), length=8))[0]
    assert decoded(real(row)) == "<s>a hand</s>"


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"scale": 0}, {"std": (0.0,)}, {"caption": "a digit"}, {"validation_fraction": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Digits(**wrong)  # pyright: ignore[reportArgumentType]  the values are what is tested
