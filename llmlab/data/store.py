"""The token store: a corpus, tokenized once, on disk, and mapped into memory by every run that uses it.

A store is a directory named after what is in it: a hash of the corpus' content, the tokenizer and the frame around
each document. Its files:

    tokens.bin       all documents one after the other, each [bos] text [eos], as uint16 or uint32
    offsets.npy      int64 (documents + 1): document i is tokens[offsets[i]:offsets[i + 1]]
    num_bytes.npy    int64 (documents): size of the text in UTF-8
    hashes.npy       uint64 (documents): hash of the text, which decides whether it is for training or validation
    manifest.json    what this is, and the size and SHA-256 of every other file

It is built in a directory of its own, the manifest is written last, everything is flushed to the disk, and a rename
gives it its name: a directory of that name is complete whatever happened to the process or the machine. A lock makes
a second builder on the same machine wait and then use the first one's store; where locks do not reach (other hosts
on a shared disk), both build, the first rename wins, and the second adopts the winner's.
"""

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from llmlab.buckets import default_cache_dir
from llmlab.data.sources import Document, Report, Skipped, Source
from llmlab.data.splitting import text_hash
from llmlab.tokenizers.base import Tokenizer

FORMAT = 1
"""Version of the layout above; part of the name, so that stores of another version are not even looked at."""

_MANIFEST = "manifest.json"
_TOKENS = "tokens.bin"
_PER_DOCUMENT = {"offsets.npy": np.int64, "num_bytes.npy": np.int64, "hashes.npy": np.uint64}
_BATCH_CHARACTERS = 1 << 20  # text given to the tokenizer's threads at once: about a second of work
_BATCH_DOCUMENTS = 4096
_ALWAYS_VERIFY = 1 << 30  # bytes of tokens hashed at every opening (a second); of larger files only the size is checked
_NAMED_SKIPPED = 20  # pieces left out that the manifest names; all are counted


@dataclass(frozen=True)
class Frame:
    """Tokens put around every document."""

    bos: int | None
    """Token before the text; None for none."""
    eos: int | None
    """Token after the text; None for none."""


@dataclass(frozen=True)
class TokenStore:
    """A tokenized corpus, opened."""

    tokens: Integer[np.ndarray, " tokens"]
    """All documents' tokens, mapped from the disk."""
    offsets: Int64[np.ndarray, " documents_and_one"]
    """Where each document begins, and the end."""
    num_bytes: Int64[np.ndarray, " documents"]
    """Size of each document's text in UTF-8."""
    hashes: UInt64[np.ndarray, " documents"]
    """Hash of each document's text."""
    frame: Frame
    """Tokens around every document."""
    fingerprint: str
    """SHA-256 (hex) of what the store was made from."""
    num_skipped: int
    """Pieces of the corpus that could not be read."""
    skipped: tuple[str, ...]
    """The first of them, with reasons."""
    rebuilt: str = ""
    """Why an earlier store of this name could not be used; empty where there was none."""


class DamagedStoreError(ValueError):
    """A token store that is not what its manifest says."""


def open_or_build(
    source: Source,
    tokenizer: Tokenizer,
    frame: Frame,
    *,
    cache_dir: Path | None = None,
    report: Report | None = None,
) -> TokenStore:
    """The token store of a corpus: the one on disk, or a new one.

    Raises:
        FileNotFoundError, ValueError: the source cannot be read, has no document, or changed while it was read.
        OSError: the cache directory cannot be written.
    """
    report = report or _no_report
    root = (cache_dir or default_cache_dir()) / "tokens"
    source_fingerprint = source.fingerprint()
    made_from = {
        "format": FORMAT,
        "source": source_fingerprint,
        "tokenizer": tokenizer.fingerprint,
        "frame": asdict(frame),
        "byteorder": sys.byteorder,
    }
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    path = root / fingerprint[:32]
    if path.exists():
        with contextlib.suppress(DamagedStoreError):
            return open_store(path, fingerprint)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make {root}: {error}; set LLMLAB_CACHE to a directory that can be written") from error
    with _lock(root / f"{fingerprint[:32]}.lock", report) as locked:
        rebuilt = ""
        if path.exists():  # another builder was first, or it is the damaged one
            try:
                return open_store(path, fingerprint)
            except DamagedStoreError as error:
                rebuilt = str(error)
                shutil.rmtree(path)
        if locked:  # no other builder of this machine is at work on this store: what is left is of dead ones
            for leftover in root.glob(f"{glob.escape(_building_prefix(path))}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        building = root / f"{_building_prefix(path)}{secrets.token_hex(8)}"
        building.mkdir()
        try:
            _write(building, source, tokenizer, frame, fingerprint, report)
            if source.fingerprint() != source_fingerprint:
                raise ValueError("the corpus changed while it was being tokenized; run again when it is at rest")
            _adopt(building, path)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return dataclasses.replace(open_store(path, fingerprint), rebuilt=rebuilt)


def open_store(path: Path, fingerprint: str) -> TokenStore:
    """Opens a store, nothing of it unchecked: manifest, sizes, headers and digests first, then the mapping.

    Raises:
        DamagedStoreError: it is not what it should be; the message says how.
    """
    manifest = _read_manifest(path, fingerprint)
    num_tokens, num_documents = manifest["num_tokens"], manifest["num_documents"]
    dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[manifest["dtype"]])
    for name, entry in manifest["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else 0
        if size != entry["size"]:
            raise DamagedStoreError(f"{file} has {size} bytes where its manifest says {entry['size']}")
        if (name != _TOKENS or size <= _ALWAYS_VERIFY) and _digest(file) != entry["sha256"]:
            raise DamagedStoreError(f"{file} is not what was written: its SHA-256 differs from the manifest's")
    if manifest["files"][_TOKENS]["size"] != num_tokens * dtype.itemsize:
        raise DamagedStoreError(f"{path / _TOKENS} does not hold {num_tokens} tokens of type {dtype}")
    arrays = {name: np.load(path / name, allow_pickle=False) for name in _PER_DOCUMENT}
    for name, array in arrays.items():
        shape = (num_documents + (name == "offsets.npy"),)
        if array.dtype != _PER_DOCUMENT[name] or array.shape != shape:
            raise DamagedStoreError(f"{path / name} is {array.dtype}{array.shape}, not {_PER_DOCUMENT[name]}{shape}")
    offsets = arrays["offsets.npy"]
    if offsets[0] != 0 or offsets[-1] != num_tokens or np.any(np.diff(offsets) < 0):
        raise DamagedStoreError(f"{path / 'offsets.npy'} does not divide {num_tokens} tokens into documents")
    return TokenStore(
        tokens=np.memmap(path / _TOKENS, dtype=dtype, mode="r", shape=(num_tokens,)),
        offsets=offsets,
        num_bytes=arrays["num_bytes.npy"],
        hashes=arrays["hashes.npy"],
        frame=Frame(**manifest["frame"]),
        fingerprint=fingerprint,
        num_skipped=manifest["num_skipped"],
        skipped=tuple(manifest["skipped"]),
    )


def _read_manifest(path: Path, fingerprint: str) -> dict[str, Any]:
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        files, numbers = manifest["files"], (manifest["num_tokens"], manifest["num_documents"], manifest["num_skipped"])
        well_formed = (
            manifest["fingerprint"] == fingerprint
            and manifest["dtype"] in ("uint16", "uint32")
            and set(files) == {_TOKENS, *_PER_DOCUMENT}
            and all(set(entry) == {"size", "sha256"} for entry in files.values())
            and all(type(number) is int and number >= 0 for number in numbers)
            and set(manifest["frame"]) == {"bos", "eos"}
            and isinstance(manifest["skipped"], list)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedStoreError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if not well_formed:
        raise DamagedStoreError(f"{file} does not describe a token store with the fingerprint {fingerprint}")
    return manifest


def _write(
    directory: Path, source: Source, tokenizer: Tokenizer, frame: Frame, fingerprint: str, report: Report
) -> None:
    """Tokenizes the corpus into a directory; the manifest comes last, when all else is on the disk."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    num_bytes: list[int] = []
    hashes: list[int] = []
    skipped: list[Skipped] = []
    total = source.size()
    with (directory / _TOKENS).open("wb") as file:
        for documents in _batches(source, skipped):
            texts = [document.text for document in documents]
            tokens, batch_lengths = _encode(texts, tokenizer, frame)
            file.write(tokens.astype(dtype).tobytes())
            lengths += batch_lengths
            num_bytes += [len(text.encode("utf-8")) for text in texts]
            hashes += [text_hash(text) for text in texts]
            report(min(documents[-1].position, total), total, "tokenize")
        file.flush()
        os.fsync(file.fileno())
    if not lengths:
        raise ValueError(empty_corpus(source, skipped))
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    for name, values in zip(_PER_DOCUMENT, (offsets, num_bytes, hashes), strict=True):
        with (directory / name).open("wb") as file:
            np.save(file, np.asarray(values, _PER_DOCUMENT[name]), allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    manifest = {
        "fingerprint": fingerprint,
        "dtype": dtype.name,
        "num_tokens": int(offsets[-1]),
        "num_documents": len(lengths),
        "frame": asdict(frame),
        "num_skipped": len(skipped),
        "skipped": [f"{item.name}: {item.reason}" for item in skipped[:_NAMED_SKIPPED]],
        "files": {
            name: {"size": (directory / name).stat().st_size, "sha256": _digest(directory / name)}
            for name in (_TOKENS, *_PER_DOCUMENT)
        },
    }
    with (directory / _MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def empty_corpus(source: Source, skipped: Sequence[Skipped]) -> str:
    """The message for a corpus that has no document."""
    message = f"the corpus is empty: no document with text in {source}"
    if skipped:
        message += f"; {len(skipped)} skipped, the first: {skipped[0].name}: {skipped[0].reason}"
    return message


def _batches(source: Source, skipped: list[Skipped]) -> Iterator[list[Document]]:
    """Documents in groups large enough to keep the tokenizer's threads busy; notes what was skipped."""
    batch: list[Document] = []
    characters = 0
    for item in source.read():
        if isinstance(item, Skipped):
            skipped.append(item)
            continue
        batch.append(item)
        characters += len(item.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(texts: list[str], tokenizer: Tokenizer, frame: Frame) -> tuple[Int64[np.ndarray, " tokens"], list[int]]:
    """The framed tokens of some documents, one after the other, and how many each has."""
    before = [] if frame.bos is None else [frame.bos]
    after = [] if frame.eos is None else [frame.eos]
    framed = [[*before, *ids, *after] for ids in tokenizer.encode_batch(texts)]
    tokens = np.fromiter(itertools.chain.from_iterable(framed), np.int64)
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer gave ids from {tokens.min()} to {tokens.max()}, but its vocab_size is "
            f"{tokenizer.vocab_size}; a tokenizer whose vocabulary does not cover its ids cannot be used"
        )
    return tokens, [len(ids) for ids in framed]


def _building_prefix(path: Path) -> str:
    return f"{path.name}.building-{socket.gethostname()}-"


def _adopt(building: Path, path: Path) -> None:
    """Gives a finished store its name, unless a builder on another host was first."""
    try:
        building.rename(path)
    except OSError:
        if not path.exists():
            raise
    if sys.platform != "win32":  # where directories cannot be flushed
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextlib.contextmanager
def _lock(path: Path, report: Report) -> Iterator[bool]:
    """Keeps other builders of this machine out; ends with the process, however it ends. Yields whether it does."""
    if sys.platform == "win32":
        yield False
        return
    import fcntl

    with path.open("wb") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(0, None, "wait for another process that tokenizes this corpus")
                fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:  # a file system without locks
            locked = False
        yield locked


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _no_report(done: int, total: int | None, what: str) -> None:
    """Tells nobody."""
