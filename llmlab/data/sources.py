"""Where text comes from: the base class of sources, and files on disk as documents.

A source is a config: it names a corpus and reads it when asked, document by document, in an order that depends on
nothing but the corpus. It never holds more than one file in memory.
"""

import abc
import codecs
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmlab.buckets import address, files

Report = Callable[[int, int | None, str], None]
"""Called as report(done, total, what) while something long goes on; total is None where nobody knows it."""

OnError = Literal["fail", "skip"]
"""What to do with a piece of a corpus that cannot be read: stop, or leave it out and count it."""


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    text: str
    """The text itself; never blank."""
    name: str
    """Where it comes from, for people."""
    position: int = 0
    """How far its source has been read once it has been read, in the units of `Source.size`."""


@dataclass(frozen=True)
class Skipped:
    """A piece of a corpus that was left out because it cannot be read."""

    name: str
    """Where it is."""
    reason: str
    """What is wrong with it."""


@dataclass(frozen=True)
class Source(abc.ABC):
    """A corpus of documents."""

    @abc.abstractmethod
    def read(self) -> Iterator[Document | Skipped]:
        """Every document with text in it, in a fixed order, and a note for every piece left out.

        Raises:
            FileNotFoundError: there is nothing where the corpus should be.
            ValueError: a piece cannot be read, and the source is not told to skip such pieces.
        """

    @abc.abstractmethod
    def size(self) -> int:
        """How much there is to read, in the units of `Document.position`: a measure of progress, nothing more."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the corpus' content and of every choice that decides what its documents are.

        Names, places and dates of files do not count: a corpus that moves or is copied stays the same.
        """

    def documents(self) -> Iterator[Document]:
        """The documents alone."""
        return (item for item in self.read() if isinstance(item, Document))


@dataclass(frozen=True)
class TextFiles(Source):
    """Plain text files in UTF-8, each of them a document, or several where a separator cuts them."""

    paths: tuple[str, ...] | str
    """Files, or patterns such as "books/**/*.txt" (** is any depth of directories); in a bucket, with its address."""
    separator: str | None = None
    """Text between documents of one file ("\\n\\n" for one document a paragraph); None for one document a file."""
    on_error: OnError = "fail"
    """A file that is not UTF-8: "fail", or "skip" it and count it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", check_paths(self.paths))
        if self.separator == "":
            raise ValueError('separator="" separates nothing; use None for one document per file')

    def read(self) -> Iterator[Document | Skipped]:
        position = 0
        for path in find_files(self.paths):
            data = path.read_bytes()
            position += len(data)
            text, problem = decode(data)
            if problem:
                yield skip_or_fail(Skipped(str(path), problem), self.on_error)
            elif self.separator is None:
                if not is_blank(text):
                    yield Document(text, str(path), position)
            else:
                for i, part in enumerate(text.split(self.separator)):
                    if not is_blank(part):
                        yield Document(part, f"{path}#{i}", position)

    def size(self) -> int:
        return sum(path.stat().st_size for path in find_files(self.paths))

    def fingerprint(self) -> str:
        return fingerprint_files(find_files(self.paths), ("text", self.separator, self.on_error))


def decode(data: bytes) -> tuple[str, str]:
    """The text of UTF-8 bytes (without a byte order mark) and "", or "" and what is wrong with them."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8"), ""
    except UnicodeDecodeError as error:
        return "", f"not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})"


def skip_or_fail(skipped: Skipped, on_error: OnError) -> Skipped:
    """The note, where skipping is allowed.

    Raises:
        ValueError: it is not.
    """
    if on_error == "fail":
        raise ValueError(f'{skipped.name}: {skipped.reason}; repair or remove it, or skip such with on_error="skip"')
    return skipped


def is_blank(text: str) -> bool:
    """Whether there is nothing but white space."""
    return not text or text.isspace()


def check_paths(paths: tuple[str, ...] | str) -> tuple[str, ...]:
    """A single path as a tuple of one.

    Raises:
        ValueError: there is none, or one is empty.
    """
    paths = (paths,) if isinstance(paths, str) else paths
    if not paths or not all(paths):
        raise ValueError(f"paths={paths!r} names no file; give files or patterns such as 'books/**/*.txt'")
    return paths


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths and patterns name: in the order given, a pattern's sorted, none of them twice.

    Raises:
        FileNotFoundError: a path or a pattern names no file.
        ValueError: a path is a directory.
    """
    found: dict[Path, None] = {}
    for name in paths:
        if address(name) is not None:
            copies = files(name)
            if not copies:
                raise FileNotFoundError(f"no file matches {name!r}")
            found.update(dict.fromkeys(copies))
            continue
        path = Path(name).expanduser()
        if path.is_dir():
            raise ValueError(f"{name!r} is a directory; name the files in it with a pattern such as '{path / '**/*'}'")
        matches = [path] if path.is_file() else _glob(path)
        if not matches:
            raise FileNotFoundError(f"no file matches {name!r} (seen from {Path.cwd()})")
        found.update(dict.fromkeys(matches))
    return list(found)


def _glob(pattern: Path) -> list[Path]:
    root = Path(pattern.anchor)  # empty for a relative pattern, and Path("") is the working directory
    relative = str(pattern.relative_to(root))
    return sorted(path for path in root.glob(relative) if path.is_file()) if relative != "." else []


def fingerprint_files(files: Sequence[Path], choices: tuple[str | int | None, ...]) -> str:
    """SHA-256 (hex) of the files' bytes, in order, and of the choices of who reads them."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        digests = list(pool.map(_digest, files))
    return hashlib.sha256(json.dumps([choices, digests]).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
