import dataclasses
import json
import multiprocessing.pool
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmlab.data import store as store_module
from llmlab.data.sources import Document, Skipped, Source, TextFiles
from llmlab.data.splitting import text_hash
from llmlab.data.store import DamagedStoreError, Frame, TokenStore, default_cache_dir, open_or_build, open_store
from llmlab.tokenizers.base import Tokenizer

FRAME = Frame(bos=256, eos=257)


@dataclasses.dataclass(frozen=True)
class Texts(Source):
    """Documents in memory."""

    texts: tuple[str, ...]

    def read(self) -> Iterator[Document | Skipped]:
        for i, text in enumerate(self.texts):
            yield Document(text, str(i), i + 1)

    def size(self) -> int:
        return len(self.texts)

    def fingerprint(self) -> str:
        return repr(self.texts)


def documents(store: TokenStore) -> list[list[int]]:
    return [store.tokens[start:stop].tolist() for start, stop in zip(store.offsets, store.offsets[1:], strict=False)]


def directories(cache: Path) -> list[Path]:
    return [path for path in (cache / "tokens").iterdir() if path.is_dir()]


@settings(
    max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixtures are the same for all examples
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=6),
    bos=st.none() | st.just(256),
    eos=st.none() | st.just(257),
)
def test_a_store_holds_every_documents_tokens_in_its_frame(
    texts: list[str],
    bos: int | None,
    eos: int | None,
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    store = open_or_build(Texts(tuple(texts)), tokenizer, Frame(bos, eos), cache_dir=cache)
    before, after = [[] if token is None else [token] for token in (bos, eos)]
    assert documents(store) == [[*before, *text.encode(), *after] for text in texts]
    assert store.num_bytes.tolist() == [len(text.encode()) for text in texts]
    assert store.hashes.tolist() == [text_hash(text) for text in texts]
    assert isinstance(store.tokens, np.memmap)


def test_a_corpus_is_tokenized_once_for_each_content_tokenizer_and_frame(
    tmp_path: Path, make_tokenizer: Callable[..., Tokenizer]
) -> None:
    tokenizer, cache = make_tokenizer(), tmp_path / "cache"
    (tmp_path / "a.txt").write_text("first")
    source = TextFiles(str(tmp_path / "*.txt"))

    def num_encoded() -> int:
        open_or_build(source, tokenizer, FRAME, cache_dir=cache)
        return tokenizer.num_encoded  # pyright: ignore[reportAttributeAccessIssue]  the tests' tokenizer counts

    assert [num_encoded(), num_encoded()] == [1, 1]
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert num_encoded() == 1  # moved, not changed
    (tmp_path / "b.txt").write_text("other")
    assert num_encoded() == 2
    open_or_build(source, tokenizer, Frame(None, 257), cache_dir=cache)
    open_or_build(source, make_tokenizer(bos=None), FRAME, cache_dir=cache)
    assert len(directories(cache)) == 4


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_ids_take_two_bytes_where_that_is_enough(
    vocab_size: int, dtype: type, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", vocab_size)
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [[vocab_size - 1] for _ in texts])
    store = open_or_build(Texts(("a",)), tokenizer, Frame(None, None), cache_dir=tmp_path)
    assert store.tokens.dtype == dtype
    assert store.tokens.tolist() == [vocab_size - 1]


def test_ids_beyond_the_vocabulary_are_an_error_and_leave_nothing(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "vocab_size", 100)
    with pytest.raises(ValueError, match=r"ids from 97 to 122, but its vocab_size is 100"):
        open_or_build(Texts(("az",)), tokenizer, Frame(None, None), cache_dir=tmp_path)
    assert not directories(tmp_path)


def test_progress_is_reported_from_the_first_batch_to_the_end(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_BATCH_DOCUMENTS", 2)
    reported: list[tuple[int, int | None, str]] = []
    source = Texts(("a", "b", "c", "d", "e"))
    store = open_or_build(source, tokenizer, FRAME, cache_dir=tmp_path, report=lambda *event: reported.append(event))
    assert reported == [(2, 5, "tokenize"), (4, 5, "tokenize"), (5, 5, "tokenize")]
    assert documents(store) == [[256, ord(text), 257] for text in "abcde"]


def test_what_could_not_be_read_is_counted_in_the_store(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_bytes(b"fine" if i == 0 else b"\xff")
    source = TextFiles(str(tmp_path / "*.txt"), on_error="skip")
    for _ in ("built", "opened"):
        store = open_or_build(source, tokenizer, FRAME, cache_dir=tmp_path / "cache")
        assert (store.num_skipped, len(store.skipped)) == (29, 20)
        assert store.skipped[0].endswith("01.txt: not UTF-8 (byte 0 is 0xff)")


def test_an_empty_corpus_is_an_error_that_says_what_was_skipped(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"the corpus is empty: no document with text in TextFiles\(.*blank.txt"):
        open_or_build(TextFiles(str(tmp_path / "blank.txt")), tokenizer, FRAME, cache_dir=tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"; 1 skipped, the first: .*bad.txt: not UTF-8"):
        open_or_build(TextFiles(str(tmp_path / "*.txt"), on_error="skip"), tokenizer, FRAME, cache_dir=tmp_path)
    assert not directories(tmp_path)


def test_a_corpus_that_changes_while_it_is_tokenized_is_an_error(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("before")

    def encode_batch(texts: list[str]) -> list[list[int]]:
        (tmp_path / "a.txt").write_text("after")
        return [[1] for _ in texts]

    monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
    with pytest.raises(ValueError, match="the corpus changed while it was being tokenized"):
        open_or_build(TextFiles(str(tmp_path / "a.txt")), tokenizer, FRAME, cache_dir=tmp_path / "cache")
    assert not directories(tmp_path / "cache")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, Path.unlink])
@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "num_bytes.npy", "hashes.npy", "manifest.json"])
def test_a_damaged_store_is_noticed_and_built_again(
    damage: Callable[[Path], None], name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    source = Texts(("one", "two"))
    fingerprint = open_or_build(source, tokenizer, FRAME, cache_dir=tmp_path).fingerprint
    (directory,) = directories(tmp_path)
    damage(directory / name)
    if (name, damage) == ("manifest.json", flip_a_bit):  # its last character: "}" becomes "|"
        assert (directory / name).read_text().endswith("|")
    with pytest.raises(DamagedStoreError):
        open_store(directory, fingerprint)
    after = open_or_build(source, tokenizer, FRAME, cache_dir=tmp_path)
    assert name in after.rebuilt
    assert documents(after) == [[256, *text.encode(), 257] for text in ("one", "two")]
    assert open_or_build(source, tokenizer, FRAME, cache_dir=tmp_path).rebuilt == ""
    assert directories(tmp_path) == [directory]


def test_of_tokens_too_large_to_hash_at_every_opening_the_size_is_checked(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_ALWAYS_VERIFY", 1)
    fingerprint = open_or_build(Texts(("one", "two")), tokenizer, FRAME, cache_dir=tmp_path).fingerprint
    (directory,) = directories(tmp_path)
    assert documents(open_store(directory, fingerprint)) == [[256, *b"one", 257], [256, *b"two", 257]]
    truncate(directory / "tokens.bin")
    with pytest.raises(DamagedStoreError, match=r"tokens.bin has 19 bytes where its manifest says 20"):
        open_store(directory, fingerprint)


def test_the_work_of_a_builder_on_another_host_is_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    store = open_or_build(Texts(("one",)), tokenizer, FRAME, cache_dir=tmp_path)
    (directory,) = directories(tmp_path)
    shutil.rmtree(directory)
    dead, alive = (directory.with_name(f"{directory.name}.building-{host}-0") for host in (socket.gethostname(), "far"))
    dead.mkdir()
    alive.mkdir()
    assert open_or_build(Texts(("one",)), tokenizer, FRAME, cache_dir=tmp_path).fingerprint == store.fingerprint
    assert set(directories(tmp_path)) == {directory, alive}


@pytest.mark.parametrize(
    "change",
    [
        {"num_tokens": 9},
        {"num_documents": 3},
        {"dtype": "uint32"},
        {"dtype": "object"},
        {"files": {}},
        {"fingerprint": "another"},
        {"frame": {}},
        {"num_skipped": None},
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_never_mapped(
    change: dict[str, object], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    store = open_or_build(Texts(("one", "two")), tokenizer, FRAME, cache_dir=tmp_path)
    (directory,) = directories(tmp_path)
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(DamagedStoreError):
        open_store(directory, store.fingerprint)


# A builder as a process of its own, slow enough to be killed in the middle.
BUILDER = """
import sys, time
from pathlib import Path
from llmlab.data.sources import TextFiles
from llmlab.data.store import Frame, open_or_build
import llmlab.data.store as module

class Slow:
    vocab_size, fingerprint = 300, "slow"
    def encode_batch(self, texts):
        print("encoding", flush=True)
        time.sleep(float(sys.argv[2]))
        return [list(text.encode()) for text in texts]

module._BATCH_DOCUMENTS = 1
root = Path(sys.argv[1])
store = open_or_build(TextFiles(str(root / "*.txt")), Slow(), Frame(None, 257), cache_dir=root / "cache")
print(store.tokens.tolist(), flush=True)
"""


def start_builder(root: Path, seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILDER, str(root), str(seconds)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    return tmp_path


EXPECTED = str([97, 257, 98, 257, 99, 257])


def test_a_builder_killed_in_the_middle_leaves_nothing_that_is_taken_for_a_store(corpus: Path) -> None:
    killed = start_builder(corpus, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "encoding\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    (leftover,) = directories(corpus / "cache")
    assert f"building-{socket.gethostname()}" in leftover.name
    out, _ = start_builder(corpus, 0).communicate()
    assert out.splitlines() == ["encoding"] * 3 + [EXPECTED]
    (directory,) = directories(corpus / "cache")  # the leftover is gone
    assert "building" not in directory.name


def test_of_builders_at_the_same_time_one_builds_and_all_have_the_same_store(corpus: Path) -> None:
    builders = [start_builder(corpus, 0.2) for _ in range(3)]
    outputs = [builder.communicate()[0].splitlines() for builder in builders]
    assert sorted(len(lines) for lines in outputs) == [1, 1, 4]
    assert {lines[-1] for lines in outputs} == {EXPECTED}
    assert len(directories(corpus / "cache")) == 1


def test_without_locks_concurrent_builders_still_leave_one_good_store(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import contextlib

    monkeypatch.setattr(store_module, "_lock", lambda path, report: contextlib.nullcontext(False))
    together = threading.Barrier(4)
    encode = tokenizer.encode_batch

    def encode_batch(texts: list[str]) -> list[list[int]]:
        together.wait(30)
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode_batch", encode_batch)
    with multiprocessing.pool.ThreadPool(4) as pool:
        stores = pool.map(lambda _: open_or_build(Texts(("one",)), tokenizer, FRAME, cache_dir=tmp_path), range(4))
    assert [documents(store) for store in stores] == [[[256, *b"one", 257]]] * 4
    assert len(directories(tmp_path)) == 1


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("LLMLAB_CACHE")
    assert default_cache_dir() == Path(os.path.expanduser("~/.cache/llmlab"))


def test_a_cache_that_cannot_be_made_is_an_error_with_the_way_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="set LLMLAB_CACHE to a directory that can be written"):
        open_or_build(Texts(("one",)), tokenizer, FRAME, cache_dir=tmp_path / "file" / "cache")
