"""Docstrings of the standard library, each with its package as its class: sentences to classify without a network.

    "Wait for the Futures or Tasks given by fs to complete."      asyncio
    "Return the decoded string of the resource."                  importlib

The text is the first paragraph of the docstring of a module, class or function, in English of one or two sentences;
ten packages have 2,000 of them. What tells the classes apart is what the sentences are about, and a good part of it is
in single words ("handler", "mailbox"), so that models which know words beforehand have an advantage.
"""

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmlab.data.config import length_problems
from llmlab.data.examples import Examples, Tables
from llmlab.data.labelled import LabelledText, text_tables
from llmlab.data.sources import Document, Report
from llmlab.data.standard_library import StandardLibrary
from llmlab.tokenizers.base import Tokenizer
from llmlab.tokenizers.special import SpecialTokens


@dataclass(frozen=True, kw_only=True)
class Docstrings(Examples):
    """Docstrings, to be told by package."""

    packages: tuple[str, ...] = (
        "asyncio",
        "email",
        "http",
        "importlib",
        "logging",
        "mailbox",
        "multiprocessing",
        "tarfile",
        "unittest",
        "xml",
    )
    """Top-level modules and packages of the standard library: the classes, in the order of their numbers."""
    min_words: int = 4
    """Shorter docstrings are left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.packages) < 2 or len({*self.packages}) < len(self.packages):
            raise ValueError(f"packages={self.packages} are no classes: give at least two different ones")

    @property
    def task(self) -> str:
        return "classes of texts"

    def problems(self, special: SpecialTokens | None, sequence_length: int | None) -> list[str]:
        return length_problems(sequence_length)

    def read(self) -> tuple[list[LabelledText], list[LabelledText]]:
        """The examples; a text that several packages have belongs to the first of the files, in alphabetical order."""
        found: dict[str, str] = {}
        for document in self._source.read():
            if isinstance(document, Document):
                package = document.name.partition("/")[0].removesuffix(".py")
                for text in first_paragraphs(document.text):
                    if len(text.split()) >= self.min_words:
                        found.setdefault(text, package)
        return self.split([LabelledText((text,), package) for text, package in found.items()])

    def texts(self, example: LabelledText) -> tuple[str, ...]:
        return example.texts

    def content(self) -> list[Any]:
        return [self._source.fingerprint(), *self.packages, self.min_words]

    def tables(
        self,
        sides: tuple[list[LabelledText], list[LabelledText]],
        tokenizer: Tokenizer,
        sequence_length: int | None,
        report: Report,
    ) -> Tables:
        assert sequence_length is not None
        return text_tables(sides, self.packages, tokenizer, sequence_length, report, where=type(self).__name__)

    @property
    def _source(self) -> StandardLibrary:
        return StandardLibrary(include=self.packages)


def first_paragraphs(code: str) -> Iterator[str]:
    """The first paragraph of every docstring of a Python file, on one line; nothing where the code does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield " ".join(re.split(r"\n\s*\n", text)[0].split())
