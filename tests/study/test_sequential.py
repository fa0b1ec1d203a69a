"""Anytime-valid tests: the martingale against numerical integration, and error rates of simulated studies."""

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from llmlab.study.paired import Claim, holm, t_interval
from llmlab.study.sequential import (
    confidence_bounds,
    confidence_sequence,
    decide_all_sequentially,
    decide_sequentially,
    log_e_values,
    running_p_values,
    seeds_to_settle_sequentially,
)

STUDIES, SEEDS = 10_000, 20
# 5% + four standard errors of 10,000 studies
MOST = 0.05 + 4 * np.sqrt(0.05 * 0.95 / STUDIES)


@pytest.mark.parametrize("sided", [1, 2])
@pytest.mark.parametrize("mean", [-1.0, 0.3, 2.0])
def test_the_e_value_is_the_ratio_of_marginal_likelihoods_of_the_t_statistic(mean: float, sided) -> None:
    x = np.random.default_rng(5).normal(mean, 3.0, 8)
    for n in range(2, 9):
        t = x[:n].mean() / (x[:n].std(ddof=1) / np.sqrt(n))

        def integrand(theta: float, t: float = t, n: int = n) -> float:
            return float(scipy.stats.nct.pdf(t, n - 1, np.sqrt(n) * theta) * scipy.stats.norm.pdf(theta, 0, 2.0))

        low = 0.0 if sided == 1 else -12.0
        marginal = scipy.integrate.quad(integrand, low, 12.0, limit=200)[0] * (2 if sided == 1 else 1)
        expected = np.log(marginal / scipy.stats.t.pdf(t, n - 1))
        assert log_e_values(x, sided)[n - 1] == pytest.approx(expected, abs=1e-5)  # six sigma of theta, cut off


def test_the_two_sided_e_value_starts_at_one_and_depends_on_neither_unit_nor_sign() -> None:
    x = np.random.default_rng(0).normal(0.5, 1.0, (4, 9))
    two = log_e_values(x, 2)
    np.testing.assert_allclose(two[:, 0], 0.0, atol=1e-14)
    np.testing.assert_allclose(log_e_values(-1e-6 * x, 2), two, atol=1e-9)
    one = log_e_values(1e6 * x)
    np.testing.assert_allclose(log_e_values(x), one, atol=1e-9)
    # Bets on either sign, half each, are the two-sided bet
    np.testing.assert_allclose(np.logaddexp(one, log_e_values(-x)) - np.log(2), two, atol=1e-9)
    assert (log_e_values(np.zeros(4)) == 0).all()


def test_the_expected_e_value_of_a_fair_game_is_one() -> None:
    x = np.random.default_rng(0).standard_normal((400_000, 3))
    # At n = 3 the one-sided E is at most 2 (1 + 3 / c^2) = 26, so its mean is estimated well
    assert np.exp(log_e_values(x)[:, 2]).mean() == pytest.approx(1.0, abs=0.02)
    assert np.exp(log_e_values(x - 0.5)[:, 2]).mean() < 0.8


@pytest.mark.scale
@pytest.mark.parametrize("variants", [1, 3])
@pytest.mark.parametrize(
    ("claim", "margin"),
    [("no worse", 0.0), ("better", 0.0), ("worse", 0.0), ("no worse", 0.5), ("equal", 0.5), ("worse", 0.5)],
)
def test_at_most_one_study_in_twenty_of_identical_arms_ever_reaches_a_false_verdict(
    claim: Claim, margin: float, variants: int
) -> None:
    rng = np.random.default_rng(variants)
    baseline, arms = rng.standard_normal((1, STUDIES, SEEDS)), rng.standard_normal((variants, STUDIES, SEEDS))
    p_for, p_against = (holm(p)[..., -1] <= 0.05 for p in running_p_values(arms - baseline, claim, margin, 3))
    # True of A/A arms is "no worse" and "equal"; at margin 0 both verdicts count as false, on the boundary
    false = {"no worse": p_against, "equal": p_against, "better": p_for, "worse": p_for}[claim]
    if margin == 0:
        false = p_for | p_against
    assert false.any(axis=0).mean() <= MOST
    if margin == 0:
        assert false.any(axis=0).mean() >= 0.02  # it does reach verdicts


@pytest.mark.parametrize("claim", ["no worse", "equal", "better", "worse"])
def test_at_the_margin_too(claim: Claim) -> None:
    d = np.random.default_rng(3).standard_normal((STUDIES, SEEDS))
    for margin in (0.3, 1.5):
        for truth in (margin, -margin):
            if (claim == "better" and truth > 0) or (claim in ("no worse", "worse") and truth < 0):
                continue  # not this claim's boundary
            p_for, p_against = (p[..., -1] <= 0.05 for p in running_p_values(d + truth, claim, margin, 2))
            assert p_for.mean() <= MOST
            assert p_against.mean() <= MOST


def test_peeking_at_the_t_test_is_what_this_protects_from() -> None:
    d = np.random.default_rng(4).standard_normal((STUDIES, SEEDS))
    ever = np.zeros(STUDIES, bool)
    for n in range(3, SEEDS + 1):
        ever |= np.asarray(scipy.stats.ttest_1samp(d[:, :n], 0, axis=1)[1]) <= 0.05
    assert ever.mean() == pytest.approx(0.23, abs=0.02)


@pytest.mark.parametrize(("effect", "median", "most"), [(1.0, 10, 17), (2.0, 5, 7), (3.0, 4, 5), (5.0, 4, 4)])
def test_clear_differences_are_settled_within_few_seeds(effect: float, median: int, most: int) -> None:
    d = np.random.default_rng(6).normal(-effect, 1.0, (STUDIES, SEEDS))
    settled = running_p_values(d, "better", 0.0)[0] <= 0.05
    when = np.where(settled.any(axis=1), settled.argmax(axis=1) + 1, SEEDS + 1)
    assert np.median(when) <= median
    assert np.quantile(when, 0.8) <= most


@pytest.mark.parametrize(
    ("name", "towards", "away"), [("t5", 0.021, 0.019), ("t3", 0.018, 0.015), ("exponential", 0.166, 0.003)]
)
def test_the_documented_rates_for_differences_that_are_not_gaussian(name: str, towards: float, away: float) -> None:
    rng = np.random.default_rng(8)
    shape = (STUDIES, SEEDS)
    d = {
        "t5": lambda: rng.standard_t(5, shape),
        "t3": lambda: rng.standard_t(3, shape),
        "exponential": lambda: rng.exponential(1.0, shape) - 1.0,
    }[name]()
    rates = [(p[:, -1] <= 0.05).mean() for p in running_p_values(d, "better", 0.0)]
    np.testing.assert_allclose(rates, [towards, away], atol=0.015)  # four standard errors at 0.166


def test_the_confidence_sequence_inverts_the_two_sided_e_value() -> None:
    d = np.random.default_rng(9).normal(1.0, 2.0, 12)
    low, high = confidence_bounds(d, 0.95)
    for n in range(4, 13):
        for end in (low[n - 1], high[n - 1]):
            assert log_e_values(d[:n] - end, 2)[-1] == pytest.approx(np.log(20), abs=1e-8)
        assert log_e_values(d[:n] - d[:n].mean(), 2)[-1] < 0
    assert np.isinf(low[:3]).all()
    assert np.isinf(high[:3]).all()
    assert confidence_sequence(d, 0.95) == (float(low[-1]), float(high[-1]))
    assert confidence_sequence(d[:1]) == (-np.inf, np.inf)


def test_the_confidence_sequence_holds_at_all_times_together() -> None:
    d = np.random.default_rng(10).normal(7.0, 1.0, (STUDIES, 200))
    low, high = confidence_bounds(d, 0.95)
    missed = ((low > 7) | (high < 7)).any(axis=1).mean()
    assert 0.01 <= missed <= MOST


def test_the_confidence_sequence_costs_the_width_that_is_documented() -> None:
    d = np.random.default_rng(11).standard_normal(20)
    for n, ratio in ((5, 1.93), (20, 1.74)):
        widths = [high - low for low, high in (confidence_sequence(d[:n]), t_interval(d[:n]))]
        assert widths[0] / widths[1] == pytest.approx(ratio, abs=0.01)


def test_a_large_common_offset_does_not_cost_digits() -> None:
    d = np.random.default_rng(12).standard_normal(10)
    np.testing.assert_allclose(np.array(confidence_sequence(d + 1e6)) - 1e6, confidence_sequence(d), atol=1e-8)
    assert confidence_sequence(np.full(6, 0.1)) == pytest.approx((0.1, 0.1), abs=1e-15)


@pytest.mark.parametrize("direction", ["lower", "higher"])
def test_a_settled_verdict_stays_and_reports_the_seed_that_settled_it(direction) -> None:
    rng = np.random.default_rng(0)
    w = np.concatenate([rng.normal(-3.0, 0.5, 8), rng.normal(10.0, 0.5, 12)])
    d = w if direction == "lower" else -w
    decisions = [decide_sequentially(d[:n], "better", 0.0, direction) for n in range(1, 21)]
    at = next(n for n, decision in enumerate(decisions, 1) if decision.verdict != "inconclusive")
    assert 3 <= at <= 6
    for decision in decisions[at - 1 :]:
        assert decision == decisions[at - 1]
    assert decisions[-1].verdict == "supported"
    assert decisions[-1].seeds == at
    assert f"after {at} seeds" in decisions[-1].reason
    assert decisions[0].seeds_to_settle is None
    assert "one seed shows no spread" in decisions[0].reason


@pytest.mark.scale
def test_decisions_are_those_of_the_simulated_p_values() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        rows = {str(i): rng.normal(rng.choice([-1.5, 0.0, 1.5]), 1.0, 12) for i in range(3)}
        decisions = decide_all_sequentially(rows, "no worse", 0.2)
        p_for, p_against = running_p_values(np.stack(list(rows.values())), "no worse", 0.2)
        for i, decision in enumerate(decisions.values()):
            supported, refuted = (holm(p)[i, -1] <= 0.05 for p in (p_for, p_against))
            expected = "supported" if supported else "refuted" if refuted else "inconclusive"
            assert decision.verdict == expected
            assert not (supported and refuted)


def test_identical_arms_are_decided_at_the_first_look() -> None:
    for n in (3, 7):
        verdicts = {
            claim: decide_sequentially(np.zeros(n), claim, 0.0) for claim in ("no worse", "equal", "better", "worse")
        }
        assert [d.verdict for d in verdicts.values()] == ["supported", "supported", "refuted", "refuted"]
        assert {d.seeds for d in verdicts.values()} == {3}
        assert "agree exactly in all 3 seeds" in verdicts["equal"].reason
    assert decide_sequentially(np.zeros(2), "equal", 0.1).verdict == "inconclusive"


def test_equal_differences_that_are_not_zero_still_need_seeds() -> None:
    assert decide_sequentially(np.full(3, 0.5), "worse", 0.4, alpha=0.01).verdict == "inconclusive"
    assert decide_sequentially(np.full(6, 0.5), "worse", 0.4, alpha=0.01).verdict == "supported"


def test_the_seeds_to_settle_settle_as_often_as_asked() -> None:
    rng = np.random.default_rng(5)
    d = rng.standard_normal(4)
    d = -0.9 + (d - d.mean()) / d.std(ddof=1)
    n = seeds_to_settle_sequentially(d, "better", 0.0, power=0.8)
    assert n is not None
    studies = np.concatenate([np.broadcast_to(d, (STUDIES, 4)), rng.normal(-0.9, 1.0, (STUDIES, n - 4))], axis=1)
    settled = [(np.minimum(*running_p_values(studies[:, :m], "better", 0.0)) <= 0.05)[:, -1].mean() for m in (n, n - 1)]
    assert settled[0] > 0.8 - 0.05  # four standard errors of the 1,000 continuations
    assert settled[1] < 0.8 + 0.05
    assert seeds_to_settle_sequentially(d, "better", 0.9) is None
    decision = decide_sequentially(d, "better", 0.0)
    assert decision.verdict == "inconclusive"
    assert decision.seeds_to_settle == n


def test_bad_arguments_say_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"comparisons have \[3, 4\] seeds; seeds are added to all arms together"):
        decide_all_sequentially({"a": np.zeros(3), "b": np.zeros(4)}, "equal", 0.1)
    with pytest.raises(ValueError, match="min_seeds=1 must be at least 2"):
        decide_sequentially(np.zeros(3), "equal", 0.1, min_seeds=1)
    with pytest.raises(ValueError, match="1 of 2 paired differences are not finite"):
        confidence_sequence(np.array([0.0, np.nan]))
    assert decide_all_sequentially({}, "equal", 0.1) == {}
