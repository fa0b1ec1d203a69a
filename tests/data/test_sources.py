import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.sources import Document, Skipped, Source, TextFiles

NOT_UTF8 = "naïve".encode("latin-1")


def texts(source: Source) -> list[str]:
    return [document.text for document in source.documents()]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(directory: Path, **files: str | bytes) -> None:
    for name, content in files.items():
        path = directory / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_files_are_documents_in_the_order_given_and_patterns_in_alphabetical_order(here: Path) -> None:
    write(here, z_txt="zett", b_txt="be", a_txt="a", deep__er__c_txt="ce", d_md="no text file")
    assert texts(TextFiles(("z.txt", "**/*.txt"))) == ["zett", "a", "be", "ce"]  # z.txt once
    assert texts(TextFiles(str(here / "?.txt"))) == ["a", "be", "zett"]
    assert TextFiles("z.txt") == TextFiles(("z.txt",))


def test_a_separator_cuts_files_into_documents_and_blank_ones_are_no_documents(here: Path) -> None:
    write(here, a_txt="one\n\ntwo\n\n \n\n\n\n", b_txt="", c_txt=" \n\t")
    assert texts(TextFiles("*.txt", separator="\n\n")) == ["one", "two"]
    assert texts(TextFiles("*.txt")) == ["one\n\ntwo\n\n \n\n\n\n"]


def test_text_is_taken_as_it_is_but_for_a_byte_order_mark(here: Path) -> None:
    write(here, a_txt=codecs.BOM_UTF8 + "ä\r\nb\r\n".encode())
    assert texts(TextFiles("a.txt")) == ["ä\r\nb\r\n"]


def test_progress_reaches_the_size_of_all_files(here: Path) -> None:
    write(here, a_txt="one", b_txt="zwölf")
    source = TextFiles("*.txt")
    positions = [item.position for item in source.read() if isinstance(item, Document)]
    assert positions == [3, 9]
    assert source.size() == 9


def test_a_file_that_is_not_utf8_fails_with_its_name_or_is_skipped_with_a_note(here: Path) -> None:
    write(here, a_txt="fine", b_txt=NOT_UTF8, c_txt="fine too")
    with pytest.raises(ValueError, match=r'b.txt: not UTF-8 \(byte 2 is 0xef\); .*on_error="skip"'):
        list(TextFiles("*.txt").read())
    items = list(TextFiles("*.txt", on_error="skip").read())
    assert [item.text for item in items if isinstance(item, Document)] == ["fine", "fine too"]
    assert [item for item in items if isinstance(item, Skipped)] == [Skipped("b.txt", "not UTF-8 (byte 2 is 0xef)")]


def test_what_is_not_there_is_an_error_that_names_it(here: Path) -> None:
    (here / "books").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file matches 'no/\*.txt' \(seen from "):
        list(TextFiles(("no/*.txt",)).read())
    with pytest.raises(FileNotFoundError, match=r"no file matches 'gone.txt'"):
        TextFiles("gone.txt").fingerprint()
    with pytest.raises(ValueError, match=r"'books' is a directory; .*'books/\*\*/\*'"):
        list(TextFiles("books").read())
    with pytest.raises(ValueError, match=r"paths=\(\) names no file"):
        TextFiles(())
    with pytest.raises(ValueError, match="separates nothing"):
        TextFiles("a", separator="")


contents = st.lists(st.binary(max_size=4), min_size=1, max_size=4)


@given(first=contents, second=contents)
def test_fingerprints_are_equal_exactly_for_equal_contents_in_equal_order(
    first: list[bytes], second: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    fingerprints = []
    for files in (first, second):
        directory = tmp_path_factory.mktemp("any name")  # where files lie does not count
        for i, content in enumerate(files):
            (directory / f"{i}.txt").write_bytes(content)
        fingerprints.append(TextFiles(str(directory / "*.txt"), on_error="skip").fingerprint())
    assert (fingerprints[0] == fingerprints[1]) == (first == second)


def test_the_choices_that_decide_what_documents_are_count_in_the_fingerprint(here: Path) -> None:
    write(here, a_txt="text")
    sources = TextFiles("a.txt"), TextFiles("a.txt", separator="\n"), TextFiles("a.txt", on_error="skip")
    assert len({source.fingerprint() for source in sources}) == 3
