"""Paired statistics against scipy, and against brute force in exact arithmetic."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from llmlab.study import statistics
from llmlab.study.paired import Alternative, holds_exactly

ALTERNATIVES: tuple[Alternative, ...] = ("two-sided", "less", "greater")


def sample(n: int, seed: int = 0, mean: float = 0.4) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, n)


@pytest.mark.parametrize("n", [2, 3, 5, 12])
@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_paired_t_is_scipys_on_the_two_arms(n: int, alternative: Alternative, shift: float) -> None:
    baseline, variant = sample(n, 1), sample(n, 2) + 0.5
    expected = scipy.stats.ttest_rel(variant, baseline + shift, alternative=alternative).pvalue
    assert statistics.paired_t(variant - baseline, shift, alternative) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_t_interval_is_scipys(n: int, level: float) -> None:
    d = sample(n)
    expected = scipy.stats.ttest_1samp(d, 0).confidence_interval(level)
    np.testing.assert_allclose(statistics.t_interval(d, level), expected, rtol=1e-9)


def test_the_far_tails_of_t_keep_their_digits() -> None:
    d = 50 + sample(12)
    for alternative in ALTERNATIVES:
        expected = scipy.stats.ttest_1samp(d, 0, alternative=alternative)[1]
        assert statistics.paired_t(d, 0.0, alternative) == pytest.approx(expected, rel=1e-7)
        assert (0 < statistics.paired_t(d, 0.0, alternative) < 1e-10) == (alternative != "less")


@pytest.mark.parametrize("n", [2, 3, 5, 8, 25])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_bca_is_scipys_with_the_same_resamples(n: int, level: float) -> None:
    # Multiples of 1/64: sums are exact, so that scipy too counts permutations of the data as ties
    d = np.round(64 * np.random.default_rng(n).exponential(1.0, n)) / 64
    expected = scipy.stats.bootstrap(
        (d,), np.mean, n_resamples=2000, confidence_level=level, method="BCa", rng=np.random.default_rng(7)
    ).confidence_interval
    np.testing.assert_allclose(statistics.bca_interval(d, level, 2000, seed=7), expected, rtol=1e-9)


def test_bca_follows_the_skewness() -> None:
    d = np.random.default_rng(3).exponential(1.0, 12)
    low, high = statistics.bca_interval(d)
    assert high - d.mean() > 1.2 * (d.mean() - low)
    np.testing.assert_allclose(statistics.bca_interval(-d)[0], -high, atol=0.03)  # Monte Carlo error of 10,000


def test_bca_covers_as_often_as_its_documentation_says() -> None:
    covered = [
        low <= 0 <= high
        for low, high in (
            statistics.bca_interval(d, resamples=1000, seed=i)
            for i, d in enumerate(np.random.default_rng(0).standard_normal((1500, 5)))
        )
    ]
    assert np.mean(covered) == pytest.approx(0.83, abs=0.04)  # four standard errors of 1,500


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("shift", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_sign_flip_is_the_enumeration_in_exact_arithmetic(n: int, shift: float, alternative: Alternative) -> None:
    # Few distinct values: many patterns tie with the observed one, some of them zero
    d = np.random.default_rng(n).integers(-2, 4, n) / 10
    exact = [Fraction(value).limit_denominator(1000) - Fraction(shift) for value in d]
    observed = sum(exact)
    sums = [sum(s * x for s, x in zip(signs, exact, strict=True)) for signs in itertools.product((1, -1), repeat=n)]
    hits = {
        "less": [s <= observed for s in sums],
        "greater": [s >= observed for s in sums],
        "two-sided": [abs(s) >= abs(observed) for s in sums],
    }[alternative]
    assert statistics.sign_flip(d, shift, alternative) == sum(hits) / len(hits)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_sign_flip_is_scipys_permutation_test(alternative: Alternative) -> None:
    d = sample(9)
    expected = scipy.stats.permutation_test(
        (d,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=10_000, vectorized=True
    ).pvalue
    assert statistics.sign_flip(d, 0.0, alternative) == pytest.approx(expected, rel=1e-12)


def test_sign_flips_beyond_twenty_are_drawn_and_agree_with_the_normal_limit() -> None:
    d = sample(60, mean=0.25)
    p = statistics.sign_flip(d, 0.0, "greater")
    z = d.sum() / np.sqrt((d**2).sum())  # the flipped sum has variance sum d^2
    assert p == pytest.approx(scipy.stats.norm.sf(z), abs=0.003)  # 4 standard errors of 100,000 draws
    assert statistics.sign_flip(d + 100) == 1 / 100_001  # never 0
    assert statistics.sign_flip_method(60) == "Monte Carlo, 100,000 sign patterns"
    assert statistics.sign_flip_method(5) == "exact, 32 sign patterns"


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.5])
def test_equivalence_is_two_one_sided_tests(margin: float) -> None:
    d = sample(7)
    expected = max(
        np.asarray(scipy.stats.ttest_1samp(d, margin, alternative="less")[1]).item(),
        np.asarray(scipy.stats.ttest_1samp(d, -margin, alternative="greater")[1]).item(),
    )
    assert statistics.equivalence(d, margin) == pytest.approx(expected, rel=1e-9)


def test_equivalence_agrees_with_the_90_percent_interval() -> None:
    for seed in range(200):
        d = sample(5, seed, mean=0.0)
        low, high = statistics.t_interval(d, 0.9)
        assert (statistics.equivalence(d, 1.0) < 0.05) == (low > -1 and high < 1)


def test_holm_rejects_what_its_definition_rejects() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        p = rng.uniform(0, 0.2, rng.integers(1, 7))
        p[rng.integers(p.size)] = rng.choice(p)  # ties
        adjusted = statistics.holm(p)
        for alpha in (0.01, 0.05, 0.1):
            rejected, order = np.zeros(p.size, bool), np.argsort(p)
            for step, index in enumerate(order):  # stop at the first that is not rejected
                if p[index] > alpha / (p.size - step):
                    break
                rejected[index] = True
            np.testing.assert_array_equal(adjusted <= alpha, rejected)
    np.testing.assert_allclose(statistics.holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    assert statistics.holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert statistics.holm(np.zeros(0)).shape == (0,)


def test_holm_of_a_table_is_holm_of_its_columns() -> None:
    table = np.random.default_rng(0).uniform(0, 1, (4, 6, 2))
    adjusted = statistics.holm(table)
    for i, j in np.ndindex(6, 2):
        np.testing.assert_array_equal(adjusted[:, i, j], statistics.holm(table[:, i, j]))


def test_equal_differences_give_points_and_certainties() -> None:
    d = np.full(4, 0.1)
    assert statistics.mean_difference(d) == 0.1
    assert statistics.bca_interval(d) == (0.1, 0.1)
    assert statistics.t_interval(d) == (0.1, 0.1)
    assert statistics.paired_t(d) == 0.0
    assert statistics.paired_t(d, 0.1) == 1.0
    assert [statistics.paired_t(d, 0.2, side) for side in ("less", "greater")] == [0.0, 1.0]
    assert statistics.equivalence(d, 0.2) == 0.0
    assert statistics.sign_flip(np.zeros(4)) == 1.0
    assert statistics.minimum_detectable_effect(d) == 0.0


@pytest.mark.parametrize(
    "compute",
    [statistics.t_interval, statistics.bca_interval, statistics.paired_t, statistics.minimum_detectable_effect],
)
def test_one_seed_is_an_error_that_asks_for_more(compute) -> None:
    with pytest.raises(ValueError, match=r"1 paired difference: .* at least 2; run more seeds"):
        compute(np.array([0.3]))
    with pytest.raises(ValueError, match=r"1 of 3 paired differences are not finite; a diverged seed counts"):
        compute(np.array([0.3, np.nan, 0.1]))


def test_arguments_out_of_range_are_named() -> None:
    d = sample(4)
    with pytest.raises(ValueError, match=r"level=1\.5 must lie between 0 and 1"):
        statistics.bca_interval(d, level=1.5)
    with pytest.raises(ValueError, match=r"margin=-0\.1 must be a finite number of at least 0"):
        statistics.equivalence(d, -0.1)
    with pytest.raises(ValueError, match=r"0 paired differences"):
        statistics.mean_difference(np.zeros(0))


def test_a_claim_known_exactly_is_its_inequality() -> None:
    truths = {
        (claim, w): holds_exactly(claim, w, 1.0)
        for claim in ("no worse", "equal", "better", "worse")
        for w in (-2.0, -1.0, 0.0, 1.0, 2.0)
    }
    assert [truths["no worse", w] for w in (-2.0, 0.0, 1.0, 2.0)] == [True, True, True, False]
    assert [truths["equal", w] for w in (-2.0, -1.0, 0.0, 1.0, 2.0)] == [False, True, True, True, False]
    assert [truths["better", w] for w in (-2.0, -1.0, 0.0, 2.0)] == [True, False, False, False]
    assert [truths["worse", w] for w in (-2.0, 0.0, 1.0, 2.0)] == [False, False, False, True]
