import ast
import json
import sysconfig
from pathlib import Path

import pytest

from llmlab.data.standard_library import StandardLibrary


def test_the_corpus_is_the_running_pythons_own_code_in_alphabetical_order() -> None:
    documents = list(StandardLibrary().documents())
    by_name = {document.name: document.text for document in documents}
    assert [document.name for document in documents] == sorted(by_name)
    assert by_name["json/__init__.py"] == Path(json.__file__).read_text(encoding="utf-8")
    assert {"ast.py", "asyncio/tasks.py", "unittest/case.py"} <= set(by_name)
    assert sum(len(text) for text in by_name.values()) > 5_000_000
    assert documents[-1].position == StandardLibrary().size()


def test_other_peoples_packages_tests_and_tables_are_left_out() -> None:
    names = [path.relative_to(sysconfig.get_path("stdlib")).as_posix() for path in StandardLibrary().files()]
    unwanted = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    assert not [name for name in names if unwanted & set(name.split("/"))]
    assert not [name for name in names if "_sysconfigdata" in name or name == "html/entities.py"]


def test_no_large_document_is_mostly_one_literal() -> None:
    for document in StandardLibrary().documents():
        if len(document.text) > 50_000:
            statements = ast.parse(document.text).body
            tables = [node for node in statements if isinstance(node, ast.Assign | ast.AnnAssign)]
            longest = max(((node.end_lineno or 0) - node.lineno for node in tables), default=0)
            assert longest < document.text.count("\n") / 2, document.name


def test_modules_can_be_chosen_by_name() -> None:
    source = StandardLibrary(include=("json", "ast"))
    names = [document.name for document in source.documents()]
    assert names == [
        "ast.py",
        "json/__init__.py",
        "json/decoder.py",
        "json/encoder.py",
        "json/scanner.py",
        "json/tool.py",
    ]
    assert source.fingerprint() != StandardLibrary(include=("json",)).fingerprint()
    with pytest.raises(FileNotFoundError, match=r"no module 'jsno'; include takes top-level names"):
        StandardLibrary(include=("json", "jsno")).files()


def test_a_python_without_source_code_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no Python source code in .*another corpus"):
        StandardLibrary().files()
