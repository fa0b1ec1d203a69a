import json
from pathlib import Path

import pytest

import llmlab
from llmlab.tokenizers import Bytes, SpecialTokens, Tokenizer, load_tokenizer

TEXTS = ["def f(x):\n\treturn  x", "▁ 😀", "<s> <|user|>"]


def test_a_saved_tokenizer_opens_as_the_same_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "deep" / "down")
    opened = load_tokenizer(tmp_path / "deep" / "down")
    assert type(opened) is type(tokenizer)
    assert opened.special == tokenizer.special
    assert opened.fingerprint == tokenizer.fingerprint
    assert opened.vocabulary == tokenizer.vocabulary
    for parse in (False, True):
        expected = tokenizer.encode_batch(TEXTS, add_special_tokens=True, parse_special_tokens=parse)
        assert opened.encode_batch(TEXTS, add_special_tokens=True, parse_special_tokens=parse) == expected


def test_saving_twice_writes_the_same_bytes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a")
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert contents[0] == contents[1]


def test_fingerprints_differ_where_tokenizers_do(trained: dict[str, Tokenizer]) -> None:
    names = ("bytes", "bytes-all-roles", "bpe", "bpe-indentation", "byte-level-bpe", "wordpiece", "char")
    assert len({trained[name].fingerprint for name in names}) == len(names)
    # The same model with other roles packs other documents.
    first, second = (Bytes(special=SpecialTokens(bos=bos, eos="b")).build() for bos in ("a", None))
    assert first.fingerprint != second.fingerprint


def test_a_run_and_its_checkpoints_hold_the_runs_tokenizer(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    trained["bpe"].save(tmp_path / "tokenizer")
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "checkpoints" / "100", tmp_path / "tokenizer" / "llmlab_tokenizer.json"):
        assert llmlab.load_tokenizer(str(path)).fingerprint == trained["bpe"].fingerprint


def test_what_is_missing_is_named(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: none of .* \(it holds weights.bin\)"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"weights.bin is no tokenizer file"):
        load_tokenizer(tmp_path / "weights.bin")
    trained["bpe"].save(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer model at .*tokenizer.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100, b"{}"])
@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_a_file_that_is_no_model_is_an_error_that_names_it(
    tmp_path: Path, name: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} (is empty|cannot be opened)"):
        load_tokenizer(tmp_path)


def test_a_truncated_or_changed_model_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    model = tmp_path / tokenizer.model_file
    content = model.read_bytes()
    for damaged in (content[: len(content) // 2], content.replace(b"s", b"S", 1)):
        model.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{tokenizer.model_file} (cannot be opened|is not the file|is damaged)"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"kind": "tiktoken"},
        {"model_file": "../elsewhere"},
        {"special": {"boss": "<s>"}},
        {"special": {"bos": 3}},
        {"special": None},
    ],
)
def test_a_damaged_manifest_is_an_error_that_names_it(
    trained: dict[str, Tokenizer], tmp_path: Path, change: dict[str, object]
) -> None:
    trained["bytes"].save(tmp_path)
    manifest = tmp_path / "llmlab_tokenizer.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(ValueError, match=r"llmlab_tokenizer.json"):
        load_tokenizer(tmp_path)
    manifest.write_text("{")
    with pytest.raises(ValueError, match=r"llmlab_tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
