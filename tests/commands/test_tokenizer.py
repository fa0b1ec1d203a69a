import io
import json
from pathlib import Path

import pytest

from llmlab.cli import main
from llmlab.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained tokenizer, and the text it was trained on beside it."""
    root = tmp_path_factory.mktemp("tokenizer")
    (root / "a.txt").write_text("def f(x):\n    return x + 1\n" * 50)
    line = ["tokenizer", "train", str(root / "*.txt"), "--kind", "bpe", "--vocab-size", "285", "--symbol", "\\n    "]
    assert main([*line, "--out", str(root / "out")]) == 0
    return root / "out"


def test_train_writes_a_tokenizer_that_opens(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.vocab_size == 285
    assert tokenizer.decode(tokenizer.encode("x:\n    y")) == "x:\n    y"
    assert "\n▁▁▁▁" in tokenizer.vocabulary


@pytest.mark.parametrize("kind", ["unigram", "char", "word", "byte-bpe", "wordpiece", "bytes"])
def test_train_knows_every_kind(kind: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"unigram": 276, "char": 273, "word": 267, "byte-bpe": 265, "wordpiece": 33, "bytes": 259}[kind]
    text = directory.parent / "a.txt"
    out = tmp_path / "out"
    line = ["tokenizer", "train", str(text), "--kind", kind, "--vocab-size", str(size), "--out", str(out), "--json"]
    assert main(line) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["vocab_size"] == load_tokenizer(out).vocab_size == size
    assert record["fingerprint"] == load_tokenizer(out).fingerprint


def test_train_reads_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": "some words here"}) + "\n" for _ in range(99)))
    line = ["tokenizer", "train", str(tmp_path / "a.jsonl"), "--field", "body", "--kind", "bpe", "--vocab-size", "284"]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    assert "▁words" in load_tokenizer(tmp_path / "out").vocabulary


def test_encode_and_decode_invert_each_other(
    directory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, path = "return  é\n", str(directory)
    assert main(["tokenizer", "encode", path, text]) == 0
    ids = capsys.readouterr().out.split()
    assert [int(index) for index in ids] == load_tokenizer(directory).encode(text)
    assert main(["tokenizer", "decode", path, *ids]) == 0
    assert capsys.readouterr().out == text + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(" ".join(ids)))
    assert main(["tokenizer", "decode", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"text": text}
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["tokenizer", "encode", path, "--json", "--add-special-tokens"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["ids"] == [1, *map(int, ids)]
    assert record["tokens"][0] == "<s>"
    assert main(["tokenizer", "encode", path, "</s>x", "--tokens", "--parse-special-tokens"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["2", '"</s>"']


def test_info_measures_a_text(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = directory.parent / "a.txt"
    assert main(["tokenizer", "info", str(directory), "--text", str(text), "--json", "--vocabulary"]) == 0
    record = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(directory)
    assert record["special"]["eos"] == {"token": "</s>", "id": 2}
    assert record["vocabulary"] == dict(tokenizer.vocabulary)
    size, count = text.stat().st_size, len(tokenizer.encode(text.read_text()))
    assert record["text"] == {
        "path": str(text), "bytes": size, "tokens": count, "bytes_per_token": size / count, "unknown": 0,
        "lossless": True,
    }  # fmt: skip
    assert main(["tokenizer", "info", str(directory), "--text", str(text), "--vocabulary"]) == 0
    shown = capsys.readouterr().out
    assert tokenizer.fingerprint[:20] in shown
    index = tokenizer.token_to_id("\n▁▁▁▁")
    assert f'{index:>7}  "\\n▁▁▁▁"' in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["train", "nothing-*.txt", "--out", "NEW"], "no file matches 'nothing-"),
        (["train", "--out", "NEW"], "nothing to train on"),
        (["train", "TEXT", "--out", "OLD"], "exists; choose another --out"),
        (["train", "TEXT", "--out", "NEW", "--vocab-size", "5000"], "more than this corpus supports"),
        (["encode", "NEW", "x"], "there is no tokenizer at"),
        (["decode", "OLD", "x1"], "'x1' is no token id"),
        (["decode", "OLD", "999"], "id 999 is not in this vocabulary"),
        (["info", "OLD", "--text", "NEW"], "there is no text file"),
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(
    line: list[str], message: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"NEW": tmp_path / "new", "OLD": directory, "TEXT": directory.parent / "a.txt"}
    assert main(["tokenizer", *(str(places.get(word, word)) for word in line)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "new").exists()
