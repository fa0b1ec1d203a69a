import gzip
import json
from pathlib import Path

import pytest
import zstandard

from llmlab.data.records import read_records, text_lines

RECORDS = [{"text": "naïve, 'quoted'", "label": "a b"}, {"text": "two", "label": "c"}]


def write(path: Path, text: str) -> Path:
    data = text.encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_all_kinds_of_files_give_the_same_records(kind: str, packed: str, tmp_path: Path) -> None:
    text = {
        "jsonl": "".join(json.dumps(record) + "\n" for record in RECORDS),
        "csv": "text,label\n\"naïve, 'quoted'\",a b\ntwo,c\n",
        "tsv": "text\tlabel\r\nnaïve, 'quoted'\ta b\r\ntwo\tc\r\n",
    }[kind]
    path = write(tmp_path / f"x.{kind}{packed}", text)
    assert [record for _, record in read_records([str(path)])] == RECORDS


def test_quotes_and_line_breaks_inside_of_csv_fields_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'text,label\n"one\nline ""and"" another",c\n')
    assert [record["text"] for _, record in read_records([str(path)])] == ['one\nline "and" another']
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"said he\tc\n')
    assert [record["text"] for _, record in read_records([str(path)])] == ['"said he']


def test_columns_can_be_named_where_a_table_has_no_first_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tsv", "1\tgood\n0\tbad\n")
    found = [record for _, record in read_records([str(path)], ("label", "text"))]
    assert found == [{"label": "1", "text": "good"}, {"label": "0", "text": "bad"}]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"a": 1}\n[1]\n', r"x.jsonl:2: not a JSON object but list"),
        ("x.jsonl", "{]\n", r"x.jsonl:1: not JSON"),
        ("x.csv", "a,b\n1,2,3\n", r"x.csv:2: 3 columns where there are 2 names: a, b"),
        ("x.txt", "a\n", r"x.txt is no .jsonl, .csv or .tsv file"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_names_the_line(
    name: str, text: str, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=message):
        list(read_records([str(path)]))


def test_lines_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(ValueError, match=r"x.txt:2: not UTF-8"):
        list(text_lines(tmp_path / "x.txt"))


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("text", ["a\n\nb\n", "a\n\nb", ""])
def test_lines_are_counted_alike_however_the_file_ends_and_is_packed(packed: str, text: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"x{packed}", text)
    assert [line for _, line in text_lines(path)] == (["a", "", "b"] if text else [])
