"""Records: files whose lines are examples with named fields.

    *.jsonl, *.json    a JSON object a line
    *.csv, *.tsv       a table, its first line the names of the columns; or names given by the reader

Plain or compressed with gzip or zstd (a name may end in .gz or .zst).
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmlab.data.json_lines import lines_of
from llmlab.data.sources import decode, find_files

Record = dict[str, Any]


def read_records(paths: Sequence[str], columns: tuple[str, ...] = ()) -> Iterator[tuple[str, Record]]:
    """(where it stands, fields) of every record, in order.

    Args:
        paths: files, or patterns.
        columns: names of a table's columns, where its first line does not say.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line cannot be read; the message names it.
    """
    for path in find_files(paths):
        suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst")]
        kind = suffixes[-1] if suffixes else ""
        if kind in (".jsonl", ".json"):
            yield from _json_lines(path)
        elif kind in (".csv", ".tsv"):
            yield from _table(path, "," if kind == ".csv" else "\t", columns)
        else:
            raise ValueError(f"{path} is no .jsonl, .csv or .tsv file, plain, .gz or .zst; name it for what it is")


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of every line of a file, without its end.

    Raises:
        ValueError: a line is not UTF-8, or compressed data is damaged.
    """
    with path.open("rb") as file:
        for number, line in enumerate(lines_of(file, path), 1):
            text, problem = decode(line)
            if problem:
                raise ValueError(f"{path}:{number}: {problem}")
            yield number, text.rstrip("\r\n")


def field_of(record: Record, name: str, where: str, kind: type = str) -> Any:
    """A field's value.

    Raises:
        ValueError: the record has no such field, or one of another type; the message lists those there are.
    """
    if name not in record:
        raise ValueError(f"{where}: no field {name!r}; it has {', '.join(map(repr, record)) or 'none'}")
    if not isinstance(record[name], kind):
        raise ValueError(f"{where}: field {name!r} holds {type(record[name]).__name__}, not {kind.__name__}")
    return record[name]


def label_of(record: Record, name: str, where: str) -> str:
    """A field that names a class: text, or a number, which is then written out."""
    value = field_of(record, name, where, object)
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, (bool, int)):
        return str(value)
    raise ValueError(f"{where}: field {name!r} holds {type(value).__name__}, which names no class")


def _json_lines(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in text_lines(path):
        if line.strip():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: not a JSON object but {type(record).__name__}")
            yield f"{path}:{number}", record


def _table(path: Path, separator: str, columns: tuple[str, ...]) -> Iterator[tuple[str, Record]]:
    # A quoted field may hold line breaks, so the reader gets the text, not lines. Tab-separated files seldom quote.
    text = "".join(f"{line}\n" for _, line in text_lines(path))
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=separator == ",")
    try:
        names = columns or tuple(next(rows, ()))
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row:
                continue
            if len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} columns where there are {len(names)} names: {', '.join(names)}")
            yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}:{rows.line_num}: {error}") from None
