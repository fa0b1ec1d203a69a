import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.json_lines import JSONLines
from llmlab.data.sources import Document, Skipped


def zstd_frames(data: bytes) -> bytes:
    """Two frames one after the other, as parallel compressors write them; cut inside a line."""
    return b"".join(zstandard.compress(part) for part in (data[:17], data[17:]))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "zstd in frames": zstd_frames,
}


def read(path: Path, **changes: str) -> list[str]:
    return [document.text for document in JSONLines(str(path), **changes).documents()]  # pyright: ignore[reportArgumentType]  each case passes what it says


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS.keys())
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), max_size=5), last_newline=st.booleans())
def test_documents_are_the_texts_that_were_written(
    texts: list[str], last_newline: bool, compress: Callable[[bytes], bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "corpus.data"  # what a file is, its content says
    content = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(texts))
    path.write_bytes(compress((content + "\n" * last_newline).encode()))
    assert read(path) == [text for text in texts if text.strip()]


@pytest.mark.parametrize("compress", COMPRESSIONS.values(), ids=COMPRESSIONS.keys())
def test_progress_reaches_the_size_of_the_files_as_they_are_on_the_disk(
    compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"text": f"{i} green bottles hanging on the wall"}) + "\n" for i in range(5000))
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(compress(lines.encode()))
    source = JSONLines(str(tmp_path / "*.jsonl"))
    positions = [item.position for item in source.read() if isinstance(item, Document)]
    assert positions == sorted(positions)
    assert positions[-1] == source.size()


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, zstd_frames])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:30] + b"~~~~" + data[34:]])
def test_compressed_files_that_are_cut_short_or_damaged_are_an_error(
    compress: Callable[[bytes], bytes], damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    lines = "".join(json.dumps({"text": f"{i * i} bottles"}) + "\n" for i in range(1000))
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(damage(compress(lines.encode())))
    with pytest.raises(ValueError, match=r"corpus.jsonl.*(damaged or cut short|not JSON|not UTF-8)"):
        read(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "na\xefve"}', r"not UTF-8 \(byte 12 is 0xef\)"),
        (b'{"text": "half', r"not JSON \(Unterminated string"),
        (b"[" * 100_000, r"not JSON \("),
        (b'["text"]', "not a JSON object but list"),
        (b'{"body": "x", "id": 3}', "no field 'text'; it has 'body', 'id'"),
        (b'{"text": null}', "field 'text' holds no text but NoneType"),
        (b'{"text": "\\ud800"}', "field 'text' holds half of a surrogate pair"),
    ],
)
def test_a_line_that_holds_no_text_fails_with_its_number_or_is_skipped_with_a_note(
    line: bytes, problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(ValueError, match=rf"corpus.jsonl:3: {problem}.*on_error"):
        read(path)
    assert read(path, on_error="skip") == ["first", "last"]
    skipped = [item for item in JSONLines(str(path), on_error="skip").read() if isinstance(item, Skipped)]
    assert [item.name for item in skipped] == [f"{path}:3"]


def test_the_field_is_a_choice_and_counts_in_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a", "body": "b"}\n')
    assert read(path, field="body") == ["b"]
    assert JSONLines(str(path)).fingerprint() != JSONLines(str(path), field="body").fingerprint()
