"""Verdicts: their error rates by simulation, and what they say in the cases that can be worked out by hand."""

import numpy as np
import pytest
import scipy.stats

from llmlab.study.paired import Claim, claim_p_values, holds_exactly, holm
from llmlab.study.verdict import decide, decide_all, study_verdict

CLAIMS: tuple[Claim, ...] = ("no worse", "equal", "better", "worse")
STUDIES = 20_000
# 5% + four standard errors of 20,000 studies
MOST = 0.05 + 4 * np.sqrt(0.05 * 0.95 / STUDIES)


@pytest.mark.scale
@pytest.mark.parametrize("n", [3, 4, 5, 10])
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_false_verdict_is_reached_in_at_most_one_study_of_twenty(claim: Claim, n: int) -> None:
    rng = np.random.default_rng(n)
    boundaries = {
        "no worse": lambda m: (m,),
        "equal": lambda m: (m, -m),
        "better": lambda m: (-m,),
        "worse": lambda m: (m,),
    }
    worst = 0.0
    for margin in (0.0, 0.4, 2.0):
        for truth in sorted({0.0, margin, -margin, margin + 0.3, -margin - 0.3, margin / 2}):
            p_for, p_against = claim_p_values(rng.normal(truth, 1.0, (STUDIES, n)), claim, margin)
            at_boundary = truth in boundaries[claim](margin)
            if at_boundary or not holds_exactly(claim, truth, margin):
                worst = max(worst, (p_for <= 0.05).mean())
            if at_boundary or holds_exactly(claim, truth, margin):
                worst = max(worst, (p_against <= 0.05).mean())
    assert worst <= MOST
    assert worst >= 0.04  # and the test does not merely never decide


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [3, 6])
def test_three_variants_together_reach_a_false_verdict_in_at_most_one_study_of_twenty(n: int, shared: bool) -> None:
    rng = np.random.default_rng(n)
    # Two claims are false, just so, and one is true, just so: both kinds of error are possible
    baseline = rng.standard_normal((1 if shared else 3, STUDIES, n))
    p_for, p_against = claim_p_values(rng.standard_normal((3, STUDIES, n)) - baseline + 0.5, "no worse", 0.5)
    for_claim, against = holm(p_for) <= 0.05, holm(p_against) <= 0.05
    assert for_claim.any(axis=0).mean() <= MOST
    assert against.any(axis=0).mean() <= MOST
    mixed = for_claim[:2].any(axis=0) | against[2]
    assert mixed.mean() <= MOST
    assert for_claim.any(axis=0).mean() >= 0.03


@pytest.mark.parametrize("direction", ["lower", "higher"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_decide_is_the_vectorised_test_of_the_simulations(claim: Claim, direction) -> None:
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(60):
        w = rng.normal(rng.choice([-2.0, 0.0, 2.0]), 1.0, int(rng.integers(2, 8)))
        decision = decide(w if direction == "lower" else -w, claim, 0.8, direction)
        p_for, p_against = claim_p_values(w, claim, 0.8)
        assert (decision.p_for, decision.p_against) == (float(p_for), float(p_against))
        expected = "supported" if p_for <= 0.05 else "refuted" if p_against <= 0.05 else "inconclusive"
        assert decision.verdict == expected
        assert (decision.seeds_to_settle is None) == (expected != "inconclusive")
        assert decision.seeds == w.size
        verdicts.add(expected)
    assert verdicts == {"supported", "refuted", "inconclusive"}


def test_the_p_values_of_each_claim_are_scipys() -> None:
    w = np.random.default_rng(4).normal(0.1, 1.0, 9)

    def p(shift: float, side: str) -> float:
        return np.asarray(scipy.stats.ttest_1samp(w, shift, alternative=side)[1]).item()

    expected = {
        "no worse": (p(0.5, "less"), p(0.5, "greater")),
        "worse": (p(0.5, "greater"), p(0.5, "less")),
        "better": (p(-0.5, "less"), p(-0.5, "greater")),
        "equal": (max(p(0.5, "less"), p(-0.5, "greater")), min(1, 2 * min(p(0.5, "greater"), p(-0.5, "less")))),
    }
    for claim in CLAIMS:
        np.testing.assert_allclose(claim_p_values(w, claim, 0.5), expected[claim], rtol=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.01])
@pytest.mark.parametrize("n", [2, 5])
def test_identical_arms_are_decided_exactly(margin: float, n: int) -> None:
    verdicts = {claim: decide(np.zeros(n), claim, margin).verdict for claim in CLAIMS}
    assert verdicts == {"no worse": "supported", "equal": "supported", "better": "refuted", "worse": "refuted"}
    decision = decide(np.zeros(n), "equal", margin)
    assert (decision.p_for, decision.p_against, decision.seeds_to_settle) == (0.0, 1.0, None)
    assert "the arms agree exactly in every seed" in decision.reason


def test_differences_that_are_all_equal_are_decided_exactly() -> None:
    d = np.full(3, 0.1)  # whose computed mean is not 0.1
    assert decide(d, "no worse", 0.1).verdict == "supported"
    assert decide(d, "worse", 0.1).verdict == "refuted"
    assert decide(d, "worse", 0.09).verdict == "supported"
    assert decide(d, "better", 0.0, "higher").verdict == "supported"


def test_one_seed_is_inconclusive_and_says_so() -> None:
    decision = decide(np.array([-5.0]), "better", 0.0)
    assert (decision.verdict, decision.p_for, decision.p_against) == ("inconclusive", 1.0, 1.0)
    assert "one seed shows no spread" in decision.reason
    assert decide(np.zeros(1), "equal", 0.1).verdict == "inconclusive"


def test_an_inconclusive_study_names_the_seeds_that_would_settle_it() -> None:
    d = np.array([-0.02, 0.015, -0.01, 0.012, -0.02])
    decision = decide(d, "no worse", 0.01)
    assert decision.verdict == "inconclusive"
    assert decision.seeds_to_settle is not None
    assert decision.seeds_to_settle > 5
    assert f"about {decision.seeds_to_settle} seeds would settle it" in decision.reason
    hopeless = decide(d - d.mean(), "equal", 0.0)
    assert hopeless.seeds_to_settle is None
    assert "only identical arms are equal within 0" in hopeless.reason
    boundary = decide(d - d.mean() + 0.01, "no worse", 0.01)
    assert boundary.seeds_to_settle is None
    assert "not even 10,000 seeds would settle it" in boundary.reason


def test_holm_over_the_variants_decides() -> None:
    rng = np.random.default_rng(1)
    noise = rng.standard_normal(6)
    noise = (noise - noise.mean()) / noise.std(ddof=1)
    # One-sided p of mean -1 and sd 1 at n = 6 is 0.029: below 0.05, above 0.05 / 2
    rows = {"a": noise - 1.0, "b": noise - 1.0, "c": noise - 20.0}
    alone = decide(rows["a"], "better", 0.0)
    together = decide_all(rows, "better", 0.0)
    assert alone.verdict == "supported"
    assert {name: decision.verdict for name, decision in together.items()} == {
        "a": "inconclusive",
        "b": "inconclusive",
        "c": "supported",
    }
    assert together["a"].p_for == alone.p_for
    assert together["a"].p_for_holm == pytest.approx(2 * alone.p_for)
    assert "after Holm over 3 variants" in together["a"].reason
    assert study_verdict(together) == ("inconclusive", "not settled for a, b (of 3 variants)")


def test_variants_may_have_claims_margins_and_seeds_of_their_own() -> None:
    rng = np.random.default_rng(1)
    decisions = decide_all(
        {"a": rng.normal(0.0, 0.01, 5), "b": rng.normal(3.0, 0.1, 4)},
        {"a": "equal", "b": "worse"},
        {"a": 0.1, "b": 2.0},
    )
    assert [decision.verdict for decision in decisions.values()] == ["supported", "supported"]
    assert study_verdict(decisions)[0] == "supported"
    assert [decision.seeds for decision in decisions.values()] == [5, 4]
    with pytest.raises(ValueError, match=r"\['a'\] are not the variants \['a', 'b'\]"):
        decide_all({"a": np.zeros(3), "b": np.zeros(3)}, {"a": "equal"}, 0.1)


def test_the_study_is_refuted_if_any_claim_is() -> None:
    rng = np.random.default_rng(1)
    rows = {"good": rng.normal(-3, 0.1, 5), "bad": rng.normal(3, 0.1, 5), "unclear": rng.normal(0, 1, 5)}
    assert study_verdict(decide_all(rows, "no worse", 0.0)) == ("refuted", "refuted for bad (of 3 variants)")
    assert study_verdict(decide_all({"good": rows["good"]}, "better", 0.0)) == (
        "supported",
        "supported for the 1 variant",
    )
    assert decide_all({}, "equal", 0.1) == {}
    with pytest.raises(ValueError, match="without comparisons has no verdict"):
        study_verdict({})


def test_bad_arguments_name_the_variant_and_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"variant 'b': 1 of 2 paired differences are not finite; a diverged seed"):
        decide_all({"a": np.zeros(2), "b": np.array([0.0, np.inf])}, "equal", 0.1)
    with pytest.raises(ValueError, match=r"alpha=0\.7 must lie between 0 and 0\.5"):
        decide(np.zeros(3), "equal", 0.1, alpha=0.7)
    with pytest.raises(ValueError, match=r"margin=-1\.0 must be .* use claim='better'"):
        decide(np.zeros(1), "equal", -1.0)
