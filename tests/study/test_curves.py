"""Steps to target, speed-up, bands and learning-rate sensitivity against what can be computed by hand or by scipy."""

import numpy as np
import pytest
import scipy.stats

from llmlab.study.curves import band, learning_rate_sensitivity, speed_up, steps_to_target

STEPS = np.arange(0, 1100, 100)


def falling(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A straight line from 5 at step 0, which reaches 5 - x at step x * scale."""
    return STEPS, 5.0 - STEPS / scale


def test_steps_to_target_interpolate_between_evaluations() -> None:
    curves = [falling(100.0), falling(250.0), (np.array([0, 10, 50]), np.array([4.0, 3.0, 2.0]))]
    found = steps_to_target(curves, 2.25)
    assert found.steps == (pytest.approx(275.0), pytest.approx(687.5), pytest.approx(40.0))
    assert (found.reached, found.target) == (3, 2.25)
    assert found.mean == pytest.approx((275 + 687.5 + 40) / 3)
    assert found.last == (1000.0, 1000.0, 50.0)


def test_the_first_crossing_counts_and_one_before_the_first_evaluation_is_the_first_step() -> None:
    steps = np.array([10, 20, 30, 40])
    assert steps_to_target([(steps, np.array([3.0, 1.0, 3.0, 1.0]))], 2.0).steps == (15.0,)
    assert steps_to_target([(steps, np.array([2.0, 1.0, 3.0, 1.0]))], 2.0).steps == (10.0,)
    assert steps_to_target([(steps, np.array([0.1, 0.3, 0.2, 0.5]))], 0.4, "higher").steps == (
        pytest.approx(30 + 10 * 0.2 / 0.3),
    )


def test_a_curve_that_never_gets_there_or_diverges_is_none_and_the_mean_with_it() -> None:
    diverged = (STEPS, np.where(STEPS < 300, 5.0 - STEPS / 100, np.nan))
    found = steps_to_target([falling(100.0), falling(1000.0), diverged], 2.5)
    assert found.steps == (pytest.approx(250.0), None, None)
    assert (found.reached, found.mean) == (1, None)


def test_speed_up_is_the_geometric_mean_of_the_pairs_with_their_bootstrap_interval() -> None:
    rng = np.random.default_rng(0)
    slow = rng.uniform(150, 250, 6)
    ratios = np.exp(rng.normal(np.log(1.5), 0.1, 6))
    found = speed_up([falling(s) for s in slow], [falling(s / r) for s, r in zip(slow, ratios, strict=True)], 3.0)
    assert found.bound == "exact"
    assert found.ratio == pytest.approx(scipy.stats.gmean(ratios), rel=1e-9)
    expected = scipy.stats.bootstrap(
        (np.log(ratios),), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert found.interval is not None
    np.testing.assert_allclose(found.interval, np.exp(expected), rtol=2e-3)  # scipy splits ties by rounding
    assert found.baseline.steps == pytest.approx(tuple(2 * slow))


def test_twice_as_fast_and_half_as_fast_cancel() -> None:
    found = speed_up([falling(100.0), falling(100.0)], [falling(50.0), falling(200.0)], 3.0)
    assert found.ratio == pytest.approx(1.0)
    one = speed_up([falling(100.0)], [falling(50.0)], 3.0)
    assert (one.ratio, one.interval) == (pytest.approx(2.0), None)


def test_curves_that_fall_short_turn_the_speed_up_into_a_bound() -> None:
    fast, never = falling(100.0), falling(1000.0)  # 200 steps, and more than 1,000
    at_least = speed_up([never, fast], [fast, fast], 3.0)
    assert (at_least.bound, at_least.interval) == ("at least", None)
    assert at_least.ratio == pytest.approx(np.sqrt(5.0))
    at_most = speed_up([fast, fast], [never, fast], 3.0)
    assert (at_most.bound, at_most.ratio) == ("at most", pytest.approx(1 / np.sqrt(5.0)))
    for baseline, variant in (([never, fast], [fast, never]), ([never], [never])):
        unknown = speed_up(baseline, variant, 3.0)
        assert (unknown.bound, unknown.ratio, unknown.interval) == ("unknown", None, None)


def test_the_t_band_is_scipys_interval_at_every_step() -> None:
    values = np.random.default_rng(1).normal(0, 1, (4, STEPS.size))
    drawn = band([(STEPS, row) for row in values], 0.9)
    expected = scipy.stats.ttest_1samp(values, 0, axis=0).confidence_interval(0.9)
    np.testing.assert_array_equal(drawn.steps, STEPS)
    np.testing.assert_allclose(drawn.mean, values.mean(axis=0))
    np.testing.assert_allclose(drawn.low, expected.low)
    np.testing.assert_allclose(drawn.high, expected.high)
    assert (drawn.count == 4).all()


def test_the_quantile_band_is_numpys() -> None:
    values = np.random.default_rng(1).normal(0, 1, (9, STEPS.size))
    drawn = band([(STEPS, row) for row in values], 0.8, "quantile")
    np.testing.assert_allclose([drawn.low, drawn.mean, drawn.high], np.quantile(values, [0.1, 0.5, 0.9], axis=0))


def test_curves_of_unequal_lengths_leave_the_band_where_they_end() -> None:
    long = (np.array([0, 10, 20, 30]), np.array([4.0, 3.0, 2.0, 1.0]))
    short = (np.array([0, 20]), np.array([6.0, 4.0]))  # 5 at step 10, by interpolation
    diverged = (np.array([0, 10, 20]), np.array([5.0, np.inf, 1.0]))
    nothing = (np.array([0, 10]), np.array([np.nan, 1.0]))
    drawn = band([long, short, diverged, nothing])
    np.testing.assert_array_equal(drawn.steps, [0, 10, 20, 30])
    np.testing.assert_array_equal(drawn.count, [3, 2, 2, 1])
    np.testing.assert_allclose(drawn.mean, [5.0, 4.0, 3.0, 1.0])
    half = scipy.stats.t.ppf(0.975, 1) * np.sqrt(2.0) / np.sqrt(2)
    np.testing.assert_allclose(drawn.high, [5 + scipy.stats.t.ppf(0.975, 2) / np.sqrt(3), 4 + half, 3 + half, np.nan])
    np.testing.assert_array_equal(np.isnan(drawn.low), [False, False, False, True])
    assert band([(np.array([0]), np.array([1.0])), (np.array([5]), np.array([2.0]))]).steps.tolist() == [0, 5]


def test_sensitivity_is_the_mean_loss_over_the_best_with_losses_clipped() -> None:
    rates = np.array([1e-3, 1e-2, 1e-1, 1.0])
    losses = np.array([3.0, 2.5, 2.9, np.nan])
    found = learning_rate_sensitivity(rates, losses, initial_loss=6.0)
    assert found.value == pytest.approx((0.5 + 0.0 + 0.4 + 3.5) / 4)
    assert (found.best_rate, found.best_loss, found.at_edge) == (1e-2, 2.5, False)
    exploded = learning_rate_sensitivity(rates, np.array([3.0, 2.5, 2.9, 1e9]), initial_loss=6.0)
    assert exploded == found


def test_sensitivity_averages_seeds_after_clipping() -> None:
    rates = np.array([1e-3, 1e-2, 1e-1])
    losses = np.array([[3.0, 3.2], [2.5, 2.7], [2.0, np.inf]])
    found = learning_rate_sensitivity(rates, losses, initial_loss=6.0)
    assert found.best_loss == pytest.approx(2.6)  # not the lucky 2.0 of the rate that diverged once
    assert found.value == pytest.approx((3.1 + 2.6 + 4.0) / 3 - 2.6)
    assert learning_rate_sensitivity(rates, np.array([1.0, 2.0, 3.0])).at_edge


def test_malformed_curves_and_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 baseline and 1 variant curves"):
        speed_up([falling(100.0)] * 2, [falling(100.0)], 3.0)
    with pytest.raises(ValueError, match="reached at step 0 already"):
        speed_up([falling(100.0)], [falling(50.0)], 7.0)
    with pytest.raises(ValueError, match="must increase"):
        steps_to_target([(np.array([0, 10, 10]), np.zeros(3))], 1.0)
    with pytest.raises(ValueError, match=r"\(2,\) steps and \(3,\) values"):
        band([(np.array([0, 10]), np.zeros(3))])
    with pytest.raises(ValueError, match="none of 1 curves has a finite value"):
        band([(np.array([0]), np.array([np.nan]))])
    with pytest.raises(ValueError, match="no curve to look for"):
        steps_to_target([], 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        steps_to_target([falling(1.0)], float("nan"))
    with pytest.raises(ValueError, match="1 of 2 losses are not finite; give initial_loss"):
        learning_rate_sensitivity(np.array([0.1, 0.2]), np.array([1.0, np.nan]))
    with pytest.raises(ValueError, match="increasing order"):
        learning_rate_sensitivity(np.array([0.2, 0.1]), np.array([1.0, 2.0]))
