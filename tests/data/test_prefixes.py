"""Prefix language modelling: what a prefix shows is not asked for."""

import math
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import RandomPrefix
from llmlab.data.draws import Draws
from llmlab.tokenizers import Bytes

TOKENIZER = Bytes().build()
LENGTH = 12
CORRUPT = RandomPrefix().build(TOKENIZER, LENGTH)


def row_of(length: int, *, goes_on: bool) -> dict[str, Any]:
    """A row of the tokens 0, 1, 2, ...; its document may go on in the next row."""
    ids = list(range(length))
    labels = [*ids[1:], length if goes_on else -100][:length] if length else []
    padding = LENGTH - length
    return {
        "input_ids": np.array(ids + [258] * padding, np.int32),
        "labels": np.array(labels + [-100] * padding, np.int32),
        "segment_ids": np.array([1] * length + [0] * padding, np.int32),
    }


@given(length=st.integers(2, LENGTH), goes_on=st.booleans(), key=st.integers(0, 2**32))
def test_a_prediction_never_sees_its_target_and_all_others_are_made(length: int, goes_on: bool, key: int) -> None:
    row = row_of(length, goes_on=goes_on and length == LENGTH)
    found = CORRUPT(row, Draws(key), dict)
    prefix = int(found["prefix_length"])
    assert 1 <= prefix < length
    np.testing.assert_array_equal(found["input_ids"], row["input_ids"])
    for i in range(LENGTH):
        seen = max(prefix, i + 1)  # tokens from the start that position i sees
        in_sight = row["labels"][i] in range(seen)
        assert found["labels"][i] == (-100 if in_sight else row["labels"][i])
    assert (found["labels"] != -100).any()


def test_all_lengths_that_leave_something_are_equally_likely() -> None:
    n = 4000
    lengths = np.bincount([int(CORRUPT(row_of(7, goes_on=False), Draws(i), dict)["prefix_length"]) for i in range(n)])
    assert lengths.tolist()[0] == 0
    assert len(lengths) == 7
    assert max(abs(lengths[1:] - n / 6)) < 5 * math.sqrt(n / 6 * 5 / 6)


def test_rows_with_nothing_to_predict_predict_nothing() -> None:
    for length in (0, 1):
        found = CORRUPT(row_of(length, goes_on=False), Draws(0), dict)
        assert (found["labels"] == -100).all()
        assert found["prefix_length"] == 1
