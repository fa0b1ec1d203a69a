"""JSON Lines: one JSON object a line, the text in one of its fields, plain or compressed."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from llmlab.data.sources import (
    Document,
    OnError,
    Skipped,
    Source,
    check_paths,
    decode,
    find_files,
    fingerprint_files,
    is_blank,
    skip_or_fail,
)

_GZIP, _ZSTANDARD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such files begin (RFC 1952, RFC 8878), whatever their names
_CHUNK = 1 << 20


@dataclass(frozen=True)
class JSONLines(Source):
    """JSON Lines files, plain or compressed with gzip or zstd: every line is an object that holds one document."""

    paths: tuple[str, ...] | str
    """Files, or patterns such as "corpus/*.jsonl.zst"."""
    field: str = "text"
    """Name of the field that holds the text."""
    on_error: OnError = "fail"
    """A line that is not UTF-8, not a JSON object, or without text in the field: "fail", or "skip" it and count it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", check_paths(self.paths))

    def read(self) -> Iterator[Document | Skipped]:
        before = 0
        for path in find_files(self.paths):
            with path.open("rb") as file:
                for number, line in enumerate(lines_of(file, path), 1):
                    line = line.strip()
                    if not line:
                        continue
                    name = f"{path}:{number}"
                    text, problem = self._text(line)
                    if problem:
                        yield skip_or_fail(Skipped(name, problem), self.on_error)
                    elif not is_blank(text):
                        yield Document(text, name, before + file.tell())
                before += file.tell()

    def size(self) -> int:
        return sum(path.stat().st_size for path in find_files(self.paths))

    def fingerprint(self) -> str:
        return fingerprint_files(find_files(self.paths), ("json lines", self.field, self.on_error))

    def _text(self, line: bytes) -> tuple[str, str]:
        """The text of a line and "", or "" and what is wrong with the line."""
        decoded, problem = decode(line)
        if problem:
            return "", problem
        try:
            record = json.loads(decoded)
        except (json.JSONDecodeError, RecursionError) as error:
            return "", f"not JSON ({error})"
        if not isinstance(record, dict):
            return "", f"not a JSON object but {type(record).__name__}"
        if self.field not in record:
            return "", f"no field {self.field!r}; it has {', '.join(map(repr, record)) or 'none'}"
        if not isinstance(text := record[self.field], str):
            return "", f"field {self.field!r} holds no text but {type(text).__name__}"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "", f"field {self.field!r} holds half of a surrogate pair, which is no text"
        return text, ""


def lines_of(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed where it is compressed.

    Raises:
        ValueError: compressed data that is damaged or ends too early.
    """
    start = file.read(4)
    file.seek(0)
    try:
        if start.startswith(_GZIP):
            with gzip.open(file) as unpacked:
                yield from unpacked
        elif start == _ZSTANDARD:
            yield from _split_lines(_unpack_zstandard(file))
        else:
            yield from file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged or cut short ({error}); fetch or compress it again") from error


def _unpack_zstandard(file: BinaryIO) -> Iterator[bytes]:
    """The content of a file of zstd frames. The library's own reader takes a truncated file for a complete one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` writes
    unpacker = decompressor.decompressobj()
    fresh = True
    while data := file.read(_CHUNK):
        while data:
            if unpacker.eof:
                unpacker = decompressor.decompressobj()
            try:
                yield unpacker.decompress(data)
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from error
            data, fresh = unpacker.unused_data, False
    if not fresh and not unpacker.eof:
        raise EOFError("the last frame has no end")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        for part in others:
            yield b"".join(rest)
            rest = [part]
    if last := b"".join(rest):
        yield last
