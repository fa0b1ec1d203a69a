"""Next sentence and sentence order: what stands in a row is what its label says."""

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import NextSentence, SentenceOrder, SpanMasking
from llmlab.data.draws import Draws
from llmlab.data.sentence_pairs import SentencePair
from llmlab.tokenizers import Bytes, SpecialTokens

TOKENIZER = Bytes(special=SpecialTokens(mask="[MASK]", cls="[CLS]", sep="[SEP]")).build()
CLS, SEP, PAD = (TOKENIZER.token_to_id(name) for name in ("[CLS]", "[SEP]", "<pad>"))
LENGTH = 40
OTHER = "X YY ZZZ. XX Y. ZZ XYZ. Y"
build = functools.cache(lambda config: config.build(TOKENIZER, LENGTH))
texts = st.text(alphabet="abc .", min_size=1, max_size=LENGTH - 3)


def row_of(text: str) -> dict[str, Any]:
    ids = TOKENIZER.encode(text)
    padding = LENGTH - 3 - len(ids)
    return {
        "input_ids": np.array(ids + [PAD] * padding, np.int32),
        "segment_ids": np.array([1] * len(ids) + [0] * padding, np.int32),
    }


def corrupt(config: SentencePair, text: str, *key: int, other: str = OTHER) -> dict[str, Any]:
    return build(config)(row_of(text), Draws(*key), lambda: row_of(other))


def unmasked(found: dict[str, Any]) -> list[int]:
    """The row before tokens were hidden, without padding."""
    ids = np.where(found["labels"] == -100, found["input_ids"], found["labels"])
    return ids[found["attention_mask"] == 1].tolist()


def segments(found: dict[str, Any]) -> tuple[str, str]:
    ids = unmasked(found)
    assert (ids[0], ids[-1]) == (CLS, SEP)
    middle = ids.index(SEP)
    types = found["token_type_ids"].tolist()
    assert types == [0] * (middle + 1) + [1] * (len(ids) - middle - 1) + [0] * (LENGTH - len(ids))
    return TOKENIZER.decode(ids[1:middle]), TOKENIZER.decode(ids[middle + 1 : -1])


@given(text=texts, key=st.integers(0, 2**32))
def test_a_next_sentence_follows_or_is_another_documents(text: str, key: int) -> None:
    found = corrupt(NextSentence(), text, key)
    a, b = segments(found)
    if found["next_sentence_label"] == 0:
        assert a + b == text
        assert a
        assert b
    else:
        assert found["next_sentence_label"] == 1
        assert text.startswith(a)
        assert b in OTHER
        assert b
        start = OTHER.index(b)
        assert start == 0 or any(OTHER[:i].endswith(".") and OTHER[i:].startswith(b) for i in range(1, len(OTHER)))


@given(text=texts, key=st.integers(0, 2**32))
def test_segments_are_in_order_or_swapped(text: str, key: int) -> None:
    found = corrupt(SentenceOrder(), text, key)
    a, b = segments(found) if found["next_sentence_label"] != -100 else (text, "")
    label = int(found["next_sentence_label"])
    assert (a + b if label != 1 else b + a) == text
    if label == -100:  # a single word cannot be asked about
        assert text.isalpha() or len(text) == 1
        assert unmasked(found) == [CLS, *TOKENIZER.encode(text), SEP]


@pytest.mark.parametrize("config", [NextSentence(), SentenceOrder()])
def test_segments_end_where_sentences_end(config: SentencePair) -> None:
    found = [segments(corrupt(config, "a b. cc d. e ff g. h", i)) for i in range(60)]
    starts = {"a b.", "a b. cc d.", "a b. cc d. e ff g."}
    whole = {a if (a + b) == "a b. cc d. e ff g. h" else b for a, b in found}
    assert starts <= whole
    assert whole - starts <= {b for _, b in found}


@pytest.mark.scale
@pytest.mark.parametrize("config", [NextSentence(), SentenceOrder(masking=SpanMasking(rate=0.3))])
def test_both_answers_are_equally_frequent(config: SentencePair) -> None:
    n = 2000
    labels = np.array([int(corrupt(config, "a b. c d.", i)["next_sentence_label"]) for i in range(n)])
    assert set(labels) == {0, 1}
    assert abs(labels.sum() - n / 2) < 5 * math.sqrt(n / 4)


@given(text=texts, key=st.integers(0, 2**32))
def test_tokens_are_masked_in_both_segments_and_special_ones_never(text: str, key: int) -> None:
    found = corrupt(NextSentence(), text, key)
    chosen = found["labels"] != -100
    ids = unmasked(found)
    text_tokens = sum(token < 256 for token in ids)
    assert chosen.sum() == max(1, round(0.15 * text_tokens))
    assert (found["labels"][chosen] < 256).all()
    places = found["masked_positions"]
    assert len(places) == round(0.15 * LENGTH)
    np.testing.assert_array_equal(places[places >= 0], np.flatnonzero(chosen))


def test_the_other_segment_is_as_long_as_the_one_it_replaces_where_there_is_text() -> None:
    text = "a b. c d e."
    sizes = {0: set(), 1: set()}
    for i in range(200):
        found = corrupt(NextSentence(), text, i)
        sizes[int(found["next_sentence_label"])].add(len(segments(found)[1]))
    assert sizes[0] == sizes[1]


def test_a_blank_row_asks_nothing() -> None:
    found = corrupt(NextSentence(), "", 0)
    assert found["next_sentence_label"] == -100
    assert (found["labels"] == -100).all()
    assert (found["masked_positions"] == -1).all()
