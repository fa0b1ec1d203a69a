"""Sampling against a literal recomputation with sorted lists, and what a row does against its batch."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.sampling import (
    GREEDY,
    Counts,
    Needs,
    Sampling,
    SamplingRows,
    check_vocabulary,
    choose,
    processed_logits,
)

VOCAB = 17
chosen: Any = jax.jit(choose, static_argnames="needs")
processed: Any = jax.jit(processed_logits, static_argnames="needs")


def literal(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from, by the definitions, in float64."""
    scaled = logits.astype(np.float64) / sampling.temperature
    ranked = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))[: sampling.top_k]
    weights = {i: np.exp(scaled[i] - max(scaled)) for i in ranked}
    if sampling.top_p is not None:
        mass, kept, total = 0.0, [], sum(weights.values())
        for i in ranked:
            if mass >= sampling.top_p:
                break
            kept.append(i)
            mass += weights[i] / total
        weights = {i: weights[i] for i in kept}
    if sampling.min_p is not None:
        weights = {i: weight for i, weight in weights.items() if weight >= sampling.min_p * max(weights.values())}
    probabilities = np.zeros(len(scaled))
    for i, weight in weights.items():
        probabilities[i] = weight / sum(weights.values())
    return probabilities


GRID = [
    Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.5, 1.0, 2.0), (None, 1, 4, 100), (None, 0.05, 0.7, 1.0), (None, 0.1, 1.0)
    )
]


@pytest.mark.parametrize("ties", [False, True])
def test_filtered_distribution_is_the_definition(ties):
    logits = np.asarray(jax.random.normal(jax.random.key(3), (len(GRID), VOCAB)) * 2)
    logits = np.round(logits) if ties else logits  # 17 scores of about 7 values
    ours = processed(logits, SamplingRows.of(GRID), Needs.of(GRID), np.zeros(len(GRID), np.int32))
    theirs = np.stack([literal(row, sampling) for row, sampling in zip(logits, GRID, strict=True)])
    np.testing.assert_array_equal(np.asarray(ours) > -np.inf, theirs > 0)
    np.testing.assert_allclose(jax.nn.softmax(ours), theirs, rtol=1e-5, atol=1e-7)  # float32 softmax against float64


def test_equal_scores_rank_by_id():
    samplings = [GREEDY, Sampling(top_k=4), Sampling(top_p=0.5), Sampling(min_p=1.0), Sampling(top_p=0.5, top_k=4)]
    logits = np.zeros((len(samplings), 8), np.float32)
    kept = processed(logits, SamplingRows.of(samplings), Needs.of(samplings), np.zeros(len(samplings), np.int32))
    assert [np.flatnonzero(row > -np.inf).tolist() for row in np.asarray(kept)] == [
        [0],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1],
    ]


def test_samples_follow_the_distribution():
    logits, draws = jnp.log(jnp.array([0.5, 0.25, 0.2, 0.05])), 20_000
    samplings = [Sampling(seed=seed) for seed in range(draws)]
    rows = SamplingRows.of(samplings)
    tokens = chosen(jnp.broadcast_to(logits, (draws, 4)), rows, Needs(draw=True), jnp.full(draws, 7)).token_B
    frequency = np.bincount(np.asarray(tokens), minlength=4) / draws
    # binomial standard deviation at most sqrt(.25 / 20,000) = 0.0035; five of those
    np.testing.assert_allclose(frequency, [0.5, 0.25, 0.2, 0.05], atol=0.018)


def test_a_token_is_drawn_with_the_key_of_seed_sample_and_position():
    logits = jax.random.normal(jax.random.key(0), (4, VOCAB))
    seeds, samples, positions = [0, 5, 2**40 + 3, 5], [0, 2, 1, 2], [3, 8, 8, 9]
    rows = SamplingRows.of([Sampling(seed=seed) for seed in seeds], samples=samples)
    ours = chosen(logits, rows, Needs(draw=True), np.array(positions, np.int32)).token_B
    for row, (seed, number, position) in enumerate(zip(seeds, samples, positions, strict=True)):
        if seed < 2**32:  # without 64-bit numbers, jax itself makes keys of the low half only
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), position)
            assert int(ours[row]) == int(jax.random.categorical(key, logits[row]))
    wide = SamplingRows.of([Sampling(seed=3 + 2**32 * high) for high in range(64)])
    tokens = chosen(np.tile(logits[:1], (64, 1)), wide, Needs(draw=True), np.zeros(64, np.int32)).token_B
    assert len(set(tokens.tolist())) > 4  # the high half counts


def test_penalties_are_their_definitions():
    prompt, text = [1, 2, 2, 3], [3, 5, 5, 5, 6]
    samplings = [
        Sampling(temperature=0.7, repetition_penalty=1.3),
        Sampling(presence_penalty=0.6),
        Sampling(frequency_penalty=-0.4),
        Sampling(repetition_penalty=0.8, presence_penalty=-0.3, frequency_penalty=0.2, temperature=2.0),
        Sampling(),
    ]
    logits = np.asarray(jax.random.normal(jax.random.key(1), (len(samplings), VOCAB)))
    counts = Counts.of([prompt] * len(samplings), VOCAB, [text] * len(samplings))
    positions = np.zeros(len(samplings), np.int32)
    ours = processed(logits, SamplingRows.of(samplings), Needs.of(samplings), positions, counts)
    for row, sampling in enumerate(samplings):
        z = logits[row].astype(np.float64)
        for token in range(VOCAB):
            if token in prompt + text:
                z[token] = (
                    z[token] / sampling.repetition_penalty if z[token] > 0 else z[token] * sampling.repetition_penalty
                )
            z[token] -= sampling.presence_penalty * (token in text) + sampling.frequency_penalty * text.count(token)
        z /= sampling.temperature
        np.testing.assert_allclose(ours[row], z - z.max(), rtol=1e-5, atol=1e-5)  # float32 against float64


def test_counts_follow_the_text():
    counts = Counts.of([[1], [2, 2, 40]], 8)  # 40 is no token that can be drawn
    for tokens, real in (([3, 3], [True, True]), ([3, 5], [True, False])):
        counts = counts.add(jnp.array(tokens), jnp.array(real))
    expected = Counts.of([[1], [2]], 8, [[3, 3], [3]])
    jax.tree.map(np.testing.assert_array_equal, counts, expected)


def test_bias_bans_bitmask_and_forced_tokens():
    samplings = [
        Sampling(logit_bias=((4, 2.5), (2, -1.0))),
        Sampling(banned_ids=(0, 16)),
        Sampling(temperature=0, logit_bias=((9, 100.0),)),
        Sampling(forced_ids=(7, 3), forced_last_id=11),
    ]
    logits = np.asarray(jax.random.normal(jax.random.key(2), (4, VOCAB)))
    rows = SamplingRows.of(samplings, starts=[5] * 4, lasts=[9] * 4)
    needs = Needs.of(samplings, allowed=True)
    everything = np.full((4, 1), -1, np.int32)
    only = everything.copy()
    only[0] = 0b10110  # tokens 1, 2 and 4

    def distribution(position: int, allowed: np.ndarray) -> np.ndarray:
        return np.asarray(jax.nn.softmax(processed(logits, rows, needs, np.full(4, position, np.int32), None, allowed)))

    first = distribution(5, everything)
    biased = logits[0] + 2.5 * (np.arange(VOCAB) == 4) - 1.0 * (np.arange(VOCAB) == 2)
    np.testing.assert_allclose(first[0], jax.nn.softmax(biased), rtol=1e-5)
    assert first[1][[0, 16]].tolist() == [0, 0]
    np.testing.assert_allclose(first[1][1:16], jax.nn.softmax(logits[1][1:16]), rtol=1e-5)
    assert first[2].argmax() == 9
    assert first[2].max() == 1
    assert np.flatnonzero(distribution(5, only)[0]).tolist() == [1, 2, 4]
    forced = {position: distribution(position, everything)[3] for position in range(5, 10)}
    assert [int(forced[position].argmax()) for position in (5, 6, 9)] == [7, 3, 11]
    assert [float(forced[position].max()) for position in (5, 6, 9)] == [1, 1, 1]
    np.testing.assert_allclose(forced[7], jax.nn.softmax(logits[3]), rtol=1e-5)
    for position in (5, 7, 9):  # what is chosen is drawn from that distribution
        tokens = chosen(logits, rows, needs, np.full(4, position, np.int32), None, only).token_B
        assert all(distribution(position, only)[row, token] > 0 for row, token in enumerate(tokens.tolist()))


MIX = [
    GREEDY,
    Sampling(seed=3),
    Sampling(temperature=0.7, top_k=5, seed=4),
    Sampling(top_p=0.8, repetition_penalty=1.5, seed=5),
    Sampling(min_p=0.2, presence_penalty=0.5, logit_bias=((3, 1.0),), seed=6),
    Sampling(temperature=0, frequency_penalty=0.5, banned_ids=(1, 2, 3)),
    Sampling(forced_ids=(2,), logprobs=3, seed=7),
]


def test_a_rows_choice_does_not_depend_on_its_batch():
    logits = np.asarray(jax.random.normal(jax.random.key(0), (len(MIX), 50)))
    positions = np.arange(len(MIX), dtype=np.int32) + 10
    texts = [[1, 3, 3, row] for row in range(len(MIX))]
    counts = Counts.of([[2]] * len(MIX), 50, texts)
    together = chosen(logits, SamplingRows.of(MIX), Needs.of(MIX), positions, counts)
    for row, sampling in enumerate(MIX):
        own = Counts.of([[2]], 50, [texts[row]])
        one = slice(row, row + 1)
        alone = chosen(logits[one], SamplingRows.of([sampling]), Needs.of([sampling]), positions[one], own)
        assert int(alone.token_B[0]) == int(together.token_B[row])
        if alone.logprobs is not None:
            np.testing.assert_array_equal(alone.logprobs.chosen_B[0], together.logprobs.chosen_B[row])
            np.testing.assert_array_equal(alone.logprobs.top_BN[0], together.logprobs.top_BN[row])


def test_two_mixes_of_requests_compile_once():
    traced = []

    def counted(*arguments: Any, needs: Needs) -> Any:
        traced.append(needs)
        return choose(arguments[0], arguments[1], needs, *arguments[2:])

    function = jax.jit(counted, static_argnames="needs")
    other = [
        Sampling(temperature=1.5, top_p=0.3, seed=2**63, banned_ids=(4, 5)),
        Sampling(temperature=0, forced_ids=(1, 2, 3), forced_last_id=9),
        Sampling(min_p=0.01, top_k=30, logprobs=4),
        Sampling(presence_penalty=2.0),
        *[GREEDY] * 3,
    ]
    for mix in (MIX, other):
        counts = Counts.of([[1]] * len(mix), 50)
        logits, positions = np.zeros((len(mix), 50), np.float32), np.arange(len(mix))
        function(logits, SamplingRows.of(mix), positions, counts, needs=Needs.of(mix))
    assert traced == [Needs.of(MIX)]


def test_greedy_rows_need_nothing():
    assert Needs.of([GREEDY, Sampling(temperature=0, top_k=5, top_p=0.5, min_p=0.1)]) == Needs()


def test_log_probabilities_are_the_models_own():
    logits = np.round(np.asarray(jax.random.normal(jax.random.key(5), (2, VOCAB)) * 3))  # with ties
    samplings = [Sampling(temperature=0.3, top_k=2, logprobs=4), Sampling(logprobs=0, banned_ids=(3,))]
    choice = chosen(logits, SamplingRows.of(samplings), Needs.of(samplings), np.zeros(2, np.int32))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    for row in range(2):
        best = sorted(range(VOCAB), key=lambda i: (-logits[row, i], i))[:4]
        assert choice.logprobs.top_id_BN[row].tolist() == best
        np.testing.assert_allclose(choice.logprobs.top_BN[row], expected[row, best], rtol=1e-5)
        np.testing.assert_allclose(choice.logprobs.chosen_B[row], expected[row, choice.token_B[row]], rtol=1e-5)


def test_cold_and_hot_temperatures_stay_numbers():
    logits = np.array([[0.0, 80.0, -1e30, 3.0]] * 2, np.float32)
    samplings = [Sampling(temperature=1e-6), Sampling(temperature=1e30)]
    probabilities = jax.nn.softmax(
        processed(logits, SamplingRows.of(samplings), Needs.of(samplings), np.zeros(2, np.int32))
    )
    np.testing.assert_allclose(probabilities[0], [0, 1, 0, 0])
    np.testing.assert_allclose(probabilities[1], literal(logits[1], samplings[1]), rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"temperature": -1.0}, "0 is greedy"),
        ({"temperature": 1e-9}, "use 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "1 is greedy"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "1 is off"),
        ({"presence_penalty": math.inf}, "presence_penalty=inf"),
        ({"logit_bias": ((1, 1.0), (1, 2.0))}, "token 1 twice"),
        ({"logit_bias": ((1, math.inf),)}, "adds inf"),
        ({"banned_ids": (-3,)}, "token -3"),
        ({"seed": -1}, "seed=-1"),
        ({"logprobs": -1}, "logprobs=-1"),
    ],
)
def test_meaningless_settings_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(logit_bias=((17, 1.0),)), "logit_bias names token 17"),
        (Sampling(forced_last_id=20), "from 0 to 16"),
        (Sampling(banned_ids=tuple(range(17))), "leave one"),
        (Sampling(logprobs=18), "more than the 17 tokens"),
    ],
)
def test_tokens_beyond_the_vocabulary_are_refused(sampling, words):
    with pytest.raises(ValueError, match=words):
        check_vocabulary(sampling, VOCAB)


@pytest.mark.parametrize("num_scores", [1, 17, 64, 200])
def test_greedy_takes_the_first_of_the_largest_scores(num_scores: int) -> None:
    rng = np.random.default_rng(num_scores)
    scores_BV = rng.integers(-3, 3, (40, num_scores)).astype(np.float32)  # many are equal
    scores_BV[0], scores_BV[1] = -np.inf, 0.0
    greedy = [Sampling(temperature=0)] * 40
    rows = SamplingRows.of(greedy, starts=[1] * 40, lasts=[9] * 40)
    token_B = choose(jnp.asarray(scores_BV), rows, Needs.of(greedy), jnp.ones(40, jnp.int32)).token_B
    np.testing.assert_array_equal(token_B, scores_BV.argmax(axis=1))
