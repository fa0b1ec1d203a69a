"""T5's span corruption: inputs and targets together are the text, and their lengths are T5's."""

import functools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data import SpanCorruption, sentinels
from llmlab.data.draws import Draws
from llmlab.data.span_corruption import noise_mask
from llmlab.tokenizers import Bytes, SpecialTokens

TOKENIZER = Bytes(special=SpecialTokens(extra=sentinels(40))).build()
EOS, PAD = TOKENIZER.token_to_id("</s>"), TOKENIZER.token_to_id("<pad>")
SENTINELS = [TOKENIZER.token_to_id(name) for name in sentinels(40)]


def row_of(ids: list[int], length: int) -> dict[str, Any]:
    padding = length - len(ids)
    return {
        "input_ids": np.array(ids + [PAD] * padding, np.int32),
        "segment_ids": np.array([1] * len(ids) + [0] * padding, np.int32),
    }


build = functools.cache(lambda config, length: config.build(TOKENIZER, length))


def corrupt(config: SpanCorruption, ids: list[int], length: int, *key: int) -> dict[str, Any]:
    return build(config, length)(row_of(ids, config.text_length(length)), Draws(*key), dict)


def t5_lengths(inputs: int, rate: float, mean: float) -> tuple[int, int]:
    """(text, targets) as the paper's code looks for them: one token more, for as long as the inputs still fit."""

    def lengths(text: int) -> tuple[int, int]:
        noise = round(text * rate)
        spans = round(noise / mean)
        return text - noise + spans + 1, noise + spans + 1

    text = inputs
    while lengths(text + 1)[0] <= inputs:
        text += 1
    return text, lengths(text)[1]


@pytest.mark.parametrize("length", [64, 100, 256, 512, 1024])
@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.3, 2.0), (0.5, 4.0)])
def test_lengths_are_those_of_t5(length: int, rate: float, mean: float) -> None:
    config = SpanCorruption(rate=rate, mean_length=mean)
    text, targets = t5_lengths(length, rate, mean)
    assert config.text_length(length) == text
    assert config.lengths(text) == (config.lengths(text)[0], targets)
    assert config.lengths(text)[0] <= length


def test_t5s_own_sizes() -> None:
    config = SpanCorruption()
    assert (config.text_length(512), config.lengths(568)) == (568, (512, 114))


def by_hand(ids: list[int], noise: list[bool]) -> tuple[list[int], list[int]]:
    """One token at a time: noise goes to the targets behind its run's sentinel, which also stands in the inputs."""
    inputs: list[int] = []
    targets: list[int] = []
    run = -1
    for i, token in enumerate(ids):
        if noise[i]:
            if i == 0 or not noise[i - 1]:
                run += 1
                inputs.append(SENTINELS[run])
                targets.append(SENTINELS[run])
            targets.append(token)
        else:
            inputs.append(token)
    # what is kept before the first run has no sentinel among the targets: every other kept run ends one
    return [*inputs, EOS], [*targets, EOS]


@given(num_tokens=st.integers(2, 41), mean=st.sampled_from([1.0, 1.5, 3.0]), key=st.integers(0, 2**32))
def test_inputs_and_targets_are_those_of_the_noise_mask_token_by_token(num_tokens: int, mean: float, key: int) -> None:
    config = SpanCorruption(mean_length=mean)
    num_tokens = min(num_tokens, config.text_length(40))
    ids = list(range(num_tokens))
    noise = noise_mask(num_tokens, *config.noise(num_tokens), Draws(key))
    inputs, targets = by_hand(ids, noise.tolist())
    assert (len(inputs), len(targets)) == config.lengths(num_tokens)
    found = corrupt(config, ids, 40, key)
    num_targets = config.lengths(config.text_length(40))[1]
    assert found["input_ids"].tolist() == inputs + [PAD] * (40 - len(inputs))
    assert found["attention_mask"].tolist() == [1] * len(inputs) + [0] * (40 - len(inputs))
    assert found["labels"].tolist() == targets + [-100] * (num_targets - len(targets))
    read = [PAD, *targets[:-1]]
    assert found["decoder_input_ids"].tolist() == read + [PAD] * (num_targets - len(read))
    assert found["decoder_attention_mask"].tolist() == [1] * len(read) + [0] * (num_targets - len(read))


@given(num_tokens=st.integers(2, 42), key=st.integers(0, 2**32))
def test_inputs_and_targets_together_are_the_text(num_tokens: int, key: int) -> None:
    config = SpanCorruption(mean_length=2.0)
    ids = [7 * i % 256 for i in range(min(num_tokens, config.text_length(40)))]
    found = corrupt(config, ids, 40, key)
    spans: dict[int, list[int]] = {}
    current = -1
    for token in found["labels"][found["labels"] != -100].tolist()[:-1]:
        if token in SENTINELS:
            current = token
            spans[current] = []
        else:
            spans[current].append(token)
    assert all(spans.values())
    text: list[int] = []
    for token in found["input_ids"][found["attention_mask"] == 1].tolist()[:-1]:
        text += spans.get(token, [token])
    assert text == ids


@given(length=st.integers(2, 60), data=st.data(), key=st.integers(0, 2**32))
def test_a_noise_mask_has_exactly_so_many_tokens_in_so_many_runs(length: int, data: st.DataObject, key: int) -> None:
    noise = data.draw(st.integers(1, length - 1))
    runs = data.draw(st.integers(1, min(noise, length - noise)))
    mask = noise_mask(length, noise, runs, Draws(key))
    assert (len(mask), mask.sum()) == (length, noise)
    assert np.count_nonzero(mask[1:] & ~mask[:-1]) + mask[0] == runs
    assert not mask[0]
    assert mask[-1]


def test_all_divisions_into_runs_are_equally_likely() -> None:
    # 5 kept and 3 noise tokens in 2 runs each: 4 x 2 arrangements
    masks, n = {}, 4000
    for i in range(n):
        key = noise_mask(8, 3, 2, Draws(i)).tobytes()
        masks[key] = masks.get(key, 0) + 1
    assert len(masks) == 8
    # five standard deviations of a binomial count
    assert max(abs(count - n / 8) for count in masks.values()) < 5 * np.sqrt(n / 8 * 7 / 8)


@pytest.mark.parametrize("ids", [[], [5]])
def test_a_text_too_short_to_lose_anything_has_no_target(ids: list[int]) -> None:
    found = corrupt(SpanCorruption(), ids, 40, 0)
    assert (found["labels"] == -100).all()
    assert found["input_ids"].tolist() == ids + [PAD] * (40 - len(ids))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        SpanCorruption(rate=1.0)
    with pytest.raises(ValueError, match=r"mean_length=0\.5"):
        SpanCorruption(mean_length=0.5)
