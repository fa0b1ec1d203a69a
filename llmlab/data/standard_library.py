"""The standard library of the running Python as a corpus: real text that every machine has, without a network."""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmlab.data.sources import Document, Skipped, Source, decode, fingerprint_files, is_blank

# What is not good text to learn Python from, or not the standard library's:
_EXCLUDED_DIRECTORIES = frozenset(
    {
        "site-packages",  # other people's packages
        "dist-packages",
        "test",  # 17 of the 30 MB; long tables of cases, and missing on many systems
        "tests",
        "idle_test",
        "encodings",  # tables of code pages, and one template filled in a hundred times
        "pydoc_data",  # the language reference as one table of strings
        "msilib",  # a database schema
        "lib2to3",  # dozens of almost equal files; gone in Python 3.13
        "__phello__",
    }
)
_EXCLUDED_FILES = frozenset(
    {
        "_compat_pickle.py",  # tables
        "_opcode_metadata.py",
        "curses/has_key.py",
        "html/entities.py",
        "locale.py",
        "opcode.py",
        "re/_casefix.py",
        "stringprep.py",
        "sitecustomize.py",  # the machine's, not Python's
        "usercustomize.py",
    }
)
_EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")  # how this interpreter was compiled


INDENTATION = ("\n", "\n\n", *("\n" + " " * spaces for spaces in (4, 8, 12, 16, 20)))
"""A line break with the indentation after it as one piece, for a tokenizer's `symbols`: Python has a lot of both."""


@dataclass(frozen=True)
class StandardLibrary(Source):
    """The Python files of the running interpreter's standard library, without tests and tables: about 9 MB of code."""

    include: tuple[str, ...] = ()
    """Top-level modules and packages to take, such as ("json", "asyncio"); () for all."""

    def files(self) -> list[Path]:
        """The files, in the alphabetical order of their places in the library.

        Raises:
            FileNotFoundError: this Python was installed without its source code, or has no module of an included name.
        """
        root = self._root()
        names = sorted(_good_text(root))
        if not names:
            raise FileNotFoundError(
                f"there is no Python source code in {root}: this Python was installed without it; "
                "use another corpus, such as TextFiles('books/*.txt')"
            )
        modules = {name.partition("/")[0].removesuffix(".py") for name in names}
        if unknown := [module for module in self.include if module not in modules]:
            raise FileNotFoundError(
                f"the standard library's corpus has no module {', '.join(map(repr, unknown))}; "
                "include takes top-level names such as 'json' or 'asyncio', and () takes all"
            )
        wanted = frozenset(self.include or modules)
        return [root / name for name in names if name.partition("/")[0].removesuffix(".py") in wanted]

    def read(self) -> Iterator[Document | Skipped]:
        root, position = self._root(), 0
        for path in self.files():
            data, name = path.read_bytes(), path.relative_to(root).as_posix()
            position += len(data)
            text, problem = decode(data)
            if problem:
                yield Skipped(name, problem)
            elif not is_blank(text):
                yield Document(text, name, position)

    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    def fingerprint(self) -> str:
        return fingerprint_files(self.files(), ("text", None, "skip"))

    @staticmethod
    def _root() -> Path:
        return Path(sysconfig.get_path("stdlib"))


def _good_text(root: Path) -> Iterator[str]:
    """Places of the Python files in the library, but for those excluded."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _EXCLUDED_DIRECTORIES]  # not walked
        for file in files:
            name = (Path(directory) / file).relative_to(root).as_posix()
            if file.endswith(".py") and name not in _EXCLUDED_FILES and not name.startswith(_EXCLUDED_PREFIXES):
                yield name
