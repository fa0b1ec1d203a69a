"""Docstrings of the standard library as labelled texts."""

import inspect
import json

import numpy as np
import pytest

from llmlab.data import Docstrings
from llmlab.data.docstrings import first_paragraphs
from llmlab.tokenizers import Bytes
from llmlab.tokenizers.special import SpecialTokens

CODE = '''"""Of the module: one line
and another.

Not this paragraph."""

class A:
    "Of a class."
    async def b(self):
        """   Of a coroutine.   """

def c(): return "no docstring"
'''


def test_the_first_paragraph_of_every_docstring_is_found():
    assert list(first_paragraphs(CODE)) == ["Of the module: one line and another.", "Of a class.", "Of a coroutine."]
    assert list(first_paragraphs("def broken(:")) == []


def test_a_text_has_the_class_of_the_package_it_stands_in():
    data = Docstrings(packages=("json", "logging"))
    train, validation = data.read()
    decoder = inspect.getdoc(json.JSONDecoder) or ""
    sides = {e.texts[0]: e.label for e in (*train, *validation)}
    assert sides[" ".join(decoder.split("\n\n")[0].split())] == "json"
    assert {*sides.values()} == {"json", "logging"}
    assert not {e.texts for e in train} & {e.texts for e in validation}


def test_labels_are_the_packages_numbers():
    data = Docstrings(packages=("json", "logging"))
    tokenizer = Bytes(special=SpecialTokens(cls="[CLS]", sep="[SEP]")).build()
    dataset = data.build(tokenizer, sequence_length=64, batch_size=8, seed=0)
    known = {e.texts[0]: e.label for side in data.read() for e in side}
    batch = dataset.train.batch(0)
    assert dataset.num_labels == 2
    for row, label in zip(batch["input_ids"], batch["labels"], strict=True):
        text = tokenizer.decode(row)
        names = {name for whole, name in known.items() if whole.encode()[:62] == text.encode()[:62]}
        assert data.packages[int(label)] in names
    assert np.all(batch["input_ids"][:, 0] == tokenizer.cls_id)


@pytest.mark.parametrize("packages", [("json",), ("json", "json")])
def test_packages_that_are_no_classes_are_refused(packages):
    with pytest.raises(ValueError, match="at least two different"):
        Docstrings(packages=packages)


def test_an_unknown_package_is_named():
    with pytest.raises(FileNotFoundError, match="'jason'"):
        Docstrings(packages=("jason", "json")).read()
