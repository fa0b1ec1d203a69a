"""GLM's blanks: nothing of the text is lost, and nothing of a blank is seen before it is predicted."""

import functools
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import Blanks
from llmlab.data.draws import Draws
from llmlab.tokenizers import Bytes, SpecialTokens

TOKENIZER = Bytes(special=SpecialTokens(mask="[MASK]")).build()
BOS, EOS, PAD, MASK = (TOKENIZER.token_to_id(name) for name in ("<s>", "</s>", "<pad>", "[MASK]"))
LENGTH = 48
build = functools.cache(lambda config: config.build(TOKENIZER, LENGTH))


def corrupt(config: Blanks, num_tokens: int, *key: int) -> dict[str, Any]:
    padding = config.text_length(LENGTH) - num_tokens
    row = {
        "input_ids": np.array([*range(num_tokens), *[PAD] * padding], np.int32),
        "segment_ids": np.array([1] * num_tokens + [0] * padding, np.int32),
    }
    return build(config)(row, Draws(*key), dict)


def blanks_of(found: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """(place of the mask, tokens) of every blank, in the order in which they are written."""
    blanks: list[tuple[int, list[int]]] = []
    for i in range(int(found["prefix_length"]), LENGTH):
        if found["labels"][i] == -100:
            continue
        if found["input_ids"][i] == BOS:
            blanks.append((int(found["position_ids"][i]), []))
        else:
            blanks[-1][1].append(int(found["input_ids"][i]))
    return blanks


@given(num_tokens=st.integers(0, 41), key=st.integers(0, 2**32), rate=st.sampled_from([0.15, 0.5]))
def test_prefix_and_blanks_together_are_the_text(num_tokens: int, key: int, rate: float) -> None:
    config = Blanks(rate=rate)
    num_tokens = min(num_tokens, config.text_length(LENGTH))
    found = corrupt(config, num_tokens, key)
    prefix = found["input_ids"][: found["prefix_length"]].tolist()
    filled = dict(blanks_of(found))
    assert sorted(filled) == [i for i, token in enumerate(prefix) if token == MASK]
    text = [token for i, seen in enumerate(prefix) for token in (filled[i] if seen == MASK else [seen])]
    assert text == list(range(num_tokens))
    blanked = sum(map(len, filled.values()))
    wanted = min(max(1, round(rate * num_tokens)), num_tokens - 1) if num_tokens > 1 else 0
    assert blanked == wanted or len(filled) == config.limits(num_tokens)[1]
    assert blanked <= wanted


@given(num_tokens=st.integers(2, 41), key=st.integers(0, 2**32))
def test_rows_are_made_as_the_docstring_says_token_by_token(num_tokens: int, key: int) -> None:
    config = Blanks()
    num_tokens = min(num_tokens, config.text_length(LENGTH))
    found = corrupt(config, num_tokens, key)
    prefix = int(found["prefix_length"])
    expected: list[tuple[int, int, int, int]] = [
        (int(found["input_ids"][i]), -100, i, 0)
        for i in range(prefix)  # input, label, position, place in the blank
    ]
    for place, tokens in blanks_of(found):
        inputs, labels = [BOS, *tokens], [*tokens, EOS]
        expected += [(inputs[j], labels[j], place, j + 1) for j in range(len(inputs))]
    expected += [(PAD, -100, 0, 0)] * (LENGTH - len(expected))
    names = ("input_ids", "labels", "position_ids", "block_position_ids")
    assert [tuple(int(found[name][i]) for name in names) for i in range(LENGTH)] == expected


@given(num_tokens=st.integers(2, 41), key=st.integers(0, 2**32))
def test_no_target_is_in_sight_of_its_prediction(num_tokens: int, key: int) -> None:
    """Every text token is different: with the mask of a prefix language model, none sees the token it predicts."""
    config = Blanks()
    found = corrupt(config, min(num_tokens, config.text_length(LENGTH)), key)
    prefix = int(found["prefix_length"])
    for i, label in enumerate(found["labels"].tolist()):
        if label not in (-100, EOS):
            assert label not in found["input_ids"][: max(i + 1, prefix)].tolist()


def test_blanks_are_written_in_every_order() -> None:
    config, n = Blanks(rate=0.15), 3000
    orders: Counter[tuple[int, ...]] = Counter()
    for i in range(n):
        places = [place for place, _ in blanks_of(corrupt(config, 38, i))]
        if len(places) == 2:
            orders[tuple(np.argsort(places).tolist())] += 1
    total = sum(orders.values())
    assert total > n / 8
    assert abs(orders[(0, 1)] - total / 2) < 5 * math.sqrt(total / 4)


def test_models_with_one_kind_of_position_get_none() -> None:
    found, both = corrupt(Blanks(two_dimensional=False), 30, 1), corrupt(Blanks(), 30, 1)
    assert set(both) - set(found) == {"position_ids", "block_position_ids"}
    for name, array in found.items():
        np.testing.assert_array_equal(array, both[name])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rate=0\.0"):
        Blanks(rate=0.0)
    with pytest.raises(ValueError, match=r"mean_length=0\.5"):
        Blanks(mean_length=0.5)
