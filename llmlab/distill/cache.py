"""The offline teacher: its predictions on the rows of a run, written down once, read by every student.

    manifest.json              what the cache was made of, and how its shards are laid out
    rows-00000000.zst          rows 0, 1, ... of the training stream: of every place some entries of the distribution
    rows-00000512.zst          the next ones

A step with a live teacher costs the teacher's forward pass every time; a cache costs it once, and disk: 4 bytes an
entry for vocabularies up to 65,536 (2 for the token, 2 for its log-probability in float16, off by 0.004 at most down
to e^-16), before compression. Which entries, is explained in llmlab.objectives.soft_targets.

A shard is compressed with its checksum, written under another name, flushed and renamed: one that has its name is
whole, whatever happened to the process, the machine or the disk. What is missing is computed by the same call again.
Every row carries a checksum of its tokens, so that a row is never given another one's teacher, and the manifest names
the teacher (by its weights), the data, the tokenizer, the seed and the temperature.
"""

import contextlib
import errno
import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import zstandard

from llmlab.training.directory import write_json

FORMAT = 1
MANIFEST = "manifest.json"
Rows = dict[str, np.ndarray]
"""Of some rows: "check" (R,), "ids" (R, S, K), and for the most probable "log_probabilities" (R, S, K) and "log_rest"
(R, S)."""


class CacheError(ValueError):
    """A cache that cannot be used for what is asked."""


class DiskFull(OSError):
    """There is no room left for the next shard."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a cache was made of."""

    teacher: str
    """Digest of its config and weights."""
    data: str
    """Fingerprint of documents, split and mixture."""
    tokenizer: str
    """Its fingerprint."""
    sequence_length: int | None
    """Tokens of a row."""
    seed: int
    """Of the rows' order, and of what is drawn for each."""
    temperature: float
    """By which the distributions are softened."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How its arrays are stored."""

    kind: Literal["top-k", "sampled"]
    """The most probable tokens, or tokens that were drawn."""
    entries: int
    """Tokens of every place."""
    places: int
    """Places of every row."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of log-probabilities."""
    id_dtype: Literal["uint16", "uint32"] = "uint16"
    """Of tokens."""
    rows_per_shard: int = 512
    """Rows of a file."""

    def fields(self, rows: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of every array of so many rows, in their order."""
        place, entry = (rows, self.places), (rows, self.places, self.entries)
        found = {"check": (np.dtype(np.uint32), (rows,)), "ids": (np.dtype(self.id_dtype), entry)}
        if self.kind == "top-k":
            found |= {"log_probabilities": (np.dtype(self.dtype), entry), "log_rest": (np.dtype(np.float32), place)}
        return found


class Cache:
    """A cache on disk, opened.

    Args:
        directory: of the cache.

    Raises:
        FileNotFoundError: there is none.
        CacheError: its manifest cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        path = directory / MANIFEST
        if not path.exists():
            raise FileNotFoundError(
                f"{directory} is no cache of a teacher: it has no {MANIFEST}; llmlab distill cache makes one"
            )
        try:
            manifest = json.loads(path.read_bytes())
            if manifest["format"] != FORMAT:
                raise CacheError(f"{path} has format {manifest['format']}, this is {FORMAT}; make the cache again")
            self.key, self.layout, self.rows = (
                Key(**manifest["key"]),
                Layout(**manifest["layout"]),
                int(manifest["rows"]),
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CacheError(
                f"{path} does not describe a cache ({type(error).__name__}: {error}); make it again"
            ) from None
        self._shard = functools.lru_cache(maxsize=4)(self._read)

    @classmethod
    def begin(cls, directory: Path, key: Key, layout: Layout, rows: int) -> "Cache":
        """A new cache, or one that was begun with the same key and layout, which may grow.

        Raises:
            CacheError: the directory holds another one, or something else.
        """
        if (directory / MANIFEST).exists():
            cache = cls(directory)
            cache.check(key)
            if cache.layout != layout:
                raise CacheError(f"{directory} was begun as {cache.layout}, not {layout}; choose another --out")
            rows = max(rows, cache.rows)
        elif directory.exists() and any(directory.iterdir()):
            raise CacheError(f"{directory} is not empty and no cache; it is left as it is: choose another --out")
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / MANIFEST, {"format": FORMAT, "key": asdict(key), "layout": asdict(layout), "rows": rows})
        for leftover in directory.glob(".rows-*"):
            leftover.unlink()
        return cls(directory)

    def check(self, key: Key) -> None:
        """Raises a CacheError unless the cache was made of this."""
        wrong = [
            f"{name}: made for {mine}, asked for {wanted}"
            for (name, mine), wanted in zip(asdict(self.key).items(), asdict(key).values(), strict=True)
            if mine != wanted
        ]
        if wrong:
            listed = "\n  ".join(wrong)
            raise CacheError(
                f"{self.directory} holds a teacher's predictions on something else:\n  {listed}\nmake one for this run "
                "with llmlab distill cache FILE.py --out DIR, or leave objective.cache out to ask the teacher itself"
            )

    def complete(self) -> int:
        """Rows from the first one on that are there without a gap."""
        first = 0
        while first < self.rows and self._path(first).exists():
            first += self.layout.rows_per_shard
        return min(first, self.rows)

    def missing(self) -> Iterator[tuple[int, int]]:
        """First row, and the one after the last, of every shard that is not there."""
        for first in range(0, self.rows, self.layout.rows_per_shard):
            if not self._path(first).exists():
                yield first, first + self.layout.rows_per_shard

    def write(self, first: int, rows: Rows) -> None:
        """Stores a shard, completely or not at all.

        Raises:
            DiskFull: there is no room; what was written of it is gone.
        """
        fields = self.layout.fields(self.layout.rows_per_shard)
        content = b"".join(np.ascontiguousarray(rows[name], dtype).tobytes() for name, (dtype, _) in fields.items())
        compressed = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(content)
        path, temporary = self._path(first), self.directory / f".rows-{first:08d}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                file.write(compressed)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise DiskFull(
                error.errno,
                f"no room for {len(compressed):,} bytes in {self.directory}: {self.complete()} of {self.rows} rows are "
                "there and whole; free some space and give the same command again, which goes on from there",
            ) from error

    def read(self, numbers: np.ndarray, checks: np.ndarray) -> Rows:
        """What is known of rows.

        Args:
            numbers: of the rows in the training stream.
            checks: of `row_checks`, for the tokens that these rows have now.

        Raises:
            CacheError: a row is not there, its file is damaged, or it has other tokens.
        """
        size = self.layout.rows_per_shard
        found = {name: np.empty(shape, dtype) for name, (dtype, shape) in self.layout.fields(len(numbers)).items()}
        for first in np.unique(numbers // size * size):
            places = np.flatnonzero(numbers // size * size == first)
            shard = self._shard(int(first))
            for name, array in found.items():
                array[places] = shard[name][numbers[places] - first]
        if np.any(wrong := found["check"] != checks):
            row = int(numbers[np.flatnonzero(wrong)[0]])
            raise CacheError(
                f"{self.directory}: row {row} was written for other tokens than the run reads there; the data or the "
                "library that orders it changed: make the cache again"
            )
        return found

    def _read(self, first: int) -> Rows:
        path = self._path(first)
        try:
            content = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        except FileNotFoundError:
            raise CacheError(
                f"{self.directory} has {self.complete()} of {self.rows} rows, and the run needs row {first}; give "
                "llmlab distill cache again, which goes on from there"
            ) from None
        except zstandard.ZstdError as error:
            raise CacheError(f"{path} is damaged ({error}); remove it and give llmlab distill cache again") from None
        rows, offset = {}, 0
        for name, (dtype, shape) in self.layout.fields(self.layout.rows_per_shard).items():
            count = int(np.prod(shape))
            if offset + count * dtype.itemsize > len(content):
                raise CacheError(
                    f"{path} is shorter than its manifest says; remove it and give llmlab distill cache again"
                )
            rows[name] = np.frombuffer(content, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
        return rows

    def _path(self, first: int) -> Path:
        return self.directory / f"rows-{first:08d}.zst"


def row_checks(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """CRC-32 of every row's tokens and labels, uint32 (R,)."""
    names = [name for name in ("input_ids", "decoder_input_ids", "labels", "masked_positions") if name in batch]
    arrays = [np.ascontiguousarray(batch[name], np.int32) for name in names]
    checks = [0] * len(arrays[0])
    for array in arrays:
        checks = [zlib.crc32(row.tobytes(), check) for row, check in zip(array, checks, strict=True)]
    return np.asarray(checks, np.uint32)


def fill(cache: Cache, rows_at: Callable[[np.ndarray], Any], progress: Callable[[int, int], None]) -> None:
    """Computes and stores every shard that is missing.

    Args:
        cache: to be filled.
        rows_at: gives what the teacher says of the rows of these numbers.
        progress: told the rows that are there, of how many.

    Raises:
        DiskFull: what was stored before stays.
    """
    progress(cache.complete(), cache.rows)
    for first, last in list(cache.missing()):
        cache.write(first, rows_at(np.arange(first, last)))
        progress(min(last, cache.rows), cache.rows)
