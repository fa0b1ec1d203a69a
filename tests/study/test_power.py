"""Power against scipy's noncentral t, brute-force integrals, and simulated studies judged by the real decision."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from llmlab.study import statistics
from llmlab.study.paired import Claim, claim_p_values
from llmlab.study.power import equivalence_power, t_power


def exactly(mean: float, sd: float, n: int) -> np.ndarray:
    """n differences with just this mean and standard deviation."""
    d = np.random.default_rng(n).standard_normal(n)
    return mean + sd * (d - d.mean()) / d.std(ddof=1)


@pytest.mark.parametrize("n", [2, 3, 5, 20, 400])
@pytest.mark.parametrize("effect", [-0.5, 0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_power_is_the_noncentral_t_distribution(n: int, effect: float, alpha: float) -> None:
    shift = np.sqrt(n) * effect
    one = scipy.stats.nct.sf(scipy.stats.t.isf(alpha, n - 1), n - 1, shift)
    critical = scipy.stats.t.isf(alpha / 2, n - 1)
    two = scipy.stats.nct.sf(critical, n - 1, shift)
    if scipy.stats.norm.cdf(-shift) > 1e-12:  # a bound on the other tail, for which scipy answers nan far out
        two += scipy.stats.nct.cdf(-critical, n - 1, shift)
    assert t_power(effect, n, alpha) == pytest.approx(one, abs=1e-8)
    assert t_power(effect, n, alpha, sided=2) == pytest.approx(two, abs=1e-8)


@pytest.mark.parametrize(("effect", "margin", "n"), [(0.0, 1.0, 5), (0.5, 1.0, 9), (0.0, 0.2, 3), (0.0, 0.5, 200)])
def test_equivalence_power_is_the_double_integral(effect: float, margin: float, n: int) -> None:
    critical = scipy.stats.t.isf(0.05, n - 1)

    def given_spread(s: float) -> float:
        half = margin - critical * s / np.sqrt(n)
        inside = scipy.stats.norm(effect, 1 / np.sqrt(n))
        return float(
            max(inside.cdf(half) - inside.cdf(-half), 0) * scipy.stats.chi.pdf(s, n - 1, scale=1 / np.sqrt(n - 1))
        )

    expected = scipy.integrate.quad(given_spread, 0, margin * np.sqrt(n) / critical, epsabs=1e-10, limit=200)[0]
    assert equivalence_power(effect, margin, n, 0.05) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("alternative", ["two-sided", "less"])
@pytest.mark.parametrize(("n", "alpha", "power"), [(3, 0.05, 0.8), (5, 0.05, 0.8), (12, 0.01, 0.9), (5, 0.05, 0.3)])
def test_power_at_the_minimum_detectable_effect_is_the_power_asked_for(alternative, n, alpha, power) -> None:
    d = exactly(0.3, 2.0, n)
    effect = statistics.minimum_detectable_effect(d, alpha, power, alternative)
    sided = 2 if alternative == "two-sided" else 1
    critical, shift = scipy.stats.t.isf(alpha / sided, n - 1), np.sqrt(n) * effect / 2.0
    reached = scipy.stats.nct.sf(critical, n - 1, shift)
    reached += scipy.stats.nct.cdf(-critical, n - 1, shift) if sided == 2 else 0
    assert reached == pytest.approx(power, abs=1e-7)


def test_simulated_studies_find_the_minimum_detectable_effect_as_often_as_promised() -> None:
    effect = statistics.minimum_detectable_effect(exactly(0.0, 1.0, 6), 0.05, 0.8)
    studies = np.random.default_rng(0).normal(effect, 1.0, (20_000, 6))
    found = np.asarray(scipy.stats.ttest_1samp(studies, 0, axis=1)[1]) < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.012)  # four standard errors


@pytest.mark.parametrize(
    ("claim", "margin", "mean"),
    [
        ("no worse", 0.5, -0.1),
        ("no worse", 0.1, 0.7),
        ("better", 0.0, -0.8),
        ("better", 0.2, 0.3),
        ("worse", 0.1, 1.2),
        ("worse", 0.5, 0.0),
        ("equal", 1.0, 0.1),
        ("equal", 0.2, -1.0),
    ],
)
def test_so_many_seeds_settle_and_one_fewer_do_not(claim: Claim, margin: float, mean: float) -> None:
    n = statistics.seeds_to_settle(exactly(mean, 1.0, 6), claim, margin, alpha=0.05, power=0.8)
    assert n is not None
    rng = np.random.default_rng(1)
    settled = [
        sum((p <= 0.05).mean() for p in claim_p_values(rng.normal(mean, 1.0, (20_000, seeds)), claim, margin))
        for seeds in (n, n - 1)
    ]
    assert settled[0] > 0.8 - 0.009  # three standard errors of 20,000
    assert settled[1] < 0.8 + 0.009


def test_chances_of_both_verdicts_are_those_of_simulated_studies() -> None:
    rng = np.random.default_rng(2)
    for claim in ("no worse", "equal", "better", "worse"):
        for mean in (-0.9, 0.2, 0.8):
            simulated = [(p <= 0.1).mean() for p in claim_p_values(rng.normal(mean, 1, (20_000, 7)), claim, 0.6)]
            # "equal" is refuted where either of two tests at alpha / 2 rejects: the same
            computed = statistics.claim_power(mean, 1.0, 7, claim, 0.6, 0.1)
            np.testing.assert_allclose(simulated, computed, atol=0.014)  # four standard errors


def test_what_no_number_of_seeds_settles_is_none() -> None:
    assert statistics.seeds_to_settle(exactly(0.5, 1.0, 8), "no worse", 0.5) is None
    assert statistics.seeds_to_settle(exactly(0.0, 1.0, 8), "equal", 0.0) is None
    assert statistics.seeds_to_settle(np.full(4, 0.2), "worse", 0.1) == 4


def test_seeds_to_settle_turns_the_sign_where_higher_is_better() -> None:
    d = exactly(0.6, 1.0, 5)
    assert statistics.seeds_to_settle(d, "better", 0.0, direction="higher") == statistics.seeds_to_settle(
        -d, "better", 0.0
    )
    with pytest.raises(ValueError, match=r"power=0\.03 must be above alpha=0\.05"):
        statistics.minimum_detectable_effect(d, 0.05, 0.03)
