"""Scaling laws: recovered from runs of a known law, with intervals that cover; the frontier against brute force."""

import math

import numpy as np
import pytest

from llmlab.study import isoflop
from llmlab.study.isoflop import Frontier, Power, Profile
from llmlab.study.laws import Cost, Fitter, Law

CHINCHILLA = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""Hoffmann et al. 2022, equation 10."""
SIZES = np.geomspace(4e7, 1e10, 7)
RATIOS = np.array([2.0, 8.0, 30.0, 120.0, 400.0])


def runs(law: Law, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A grid of sizes and token counts; losses off by a factor of about 1 +- noise."""
    n = np.repeat(SIZES, len(RATIOS))
    d = n * np.tile(RATIOS, len(SIZES))
    random = np.random.default_rng(seed)
    return n, d, np.asarray(law.loss(n, d)) * np.exp(noise * random.normal(size=n.shape))


def brute_force(law: Law, flops: float, cost: Cost) -> tuple[float, float]:
    """Least loss over a fine grid of sizes, and the size."""
    n = np.geomspace(1e4, 1e14, 2_000_001)
    losses = np.asarray(law.loss(n, flops / (cost.kappa * n**cost.gamma)))
    best = int(np.argmin(losses))
    return float(n[best]), float(losses[best])


@pytest.mark.parametrize("cost", [Cost(), Cost(kappa=60.0, gamma=0.9), Cost(kappa=1.3, gamma=1.15)])
@pytest.mark.parametrize("flops", [1e18, 1e21, 5.76e23])
def test_the_closed_form_frontier_is_the_least_loss_of_all_sizes(cost: Cost, flops: float) -> None:
    law = Law(E=1.7, A=300.0, B=900.0, alpha=0.31, beta=0.36)
    n, d, loss = law.optimum(flops, cost)
    by_force, least = brute_force(law, flops, cost)
    step = math.log(1e14 / 1e4) / 2_000_000
    assert abs(math.log(n / by_force)) <= step
    assert loss == pytest.approx(least, rel=1e-12)
    assert cost.kappa * n**cost.gamma * d == pytest.approx(flops, rel=1e-12)


def test_published_parameters_give_the_published_exponents_and_the_slopes_of_the_frontier() -> None:
    a, b = CHINCHILLA.exponents(Cost())
    assert (a, b) == (pytest.approx(0.28 / 0.62), pytest.approx(0.34 / 0.62))  # 0.452, 0.548; the paper: 0.46, 0.54
    for cost in (Cost(), Cost(kappa=20.0, gamma=0.8)):
        (n1, d1, _), (n2, d2, _) = (CHINCHILLA.optimum(c, cost) for c in (1e20, 1e23))
        slopes = math.log(n2 / n1) / math.log(1e3), math.log(d2 / d1) / math.log(1e3)
        assert CHINCHILLA.exponents(cost) == pytest.approx(slopes, rel=1e-12)


def test_a_law_without_noise_is_recovered() -> None:
    for law in (CHINCHILLA, Law(E=0.8, A=60.0, B=3000.0, alpha=0.25, beta=0.45)):
        fit = Fitter(*runs(law, 0.0, 0)).fit()
        assert fit.objective < 1e-12
        for name in ("E", "A", "B", "alpha", "beta"):
            assert getattr(fit.law, name) == pytest.approx(getattr(law, name), rel=1e-3), name


def test_the_gradient_is_that_of_the_objective() -> None:
    from scipy.optimize import check_grad

    fitter = Fitter(*runs(CHINCHILLA, 0.05, 1), delta=0.02)
    counts = np.random.default_rng(0).integers(0, 3, len(fitter.log_l)).astype(np.float64)
    for seed in range(5):
        theta = np.random.default_rng(seed).normal([-1, -1, -1, 0.5, 0.5], 0.2)
        slope = fitter._objective(theta, counts)[1]
        off = check_grad(lambda x: fitter._objective(x, counts)[0], lambda x: fitter._objective(x, counts)[1], theta)
        assert off < 1e-4 * np.linalg.norm(slope)


@pytest.mark.parametrize(("noise", "delta"), [(0.004, 0.01), (0.02, 0.001)])
def test_the_minimum_is_that_of_l_bfgs_from_every_start(noise: float, delta: float) -> None:
    from scipy.optimize import minimize

    fitter = Fitter(*runs(CHINCHILLA, noise, 3), delta=delta)
    fit = fitter.fit()
    counts = np.ones(len(fitter.log_l))
    bounds = [(-12.0, 2.0)] * 3 + [(0.01, 3.0)] * 2
    for start in [fit.theta, *fitter._grid(counts)[:2]]:
        found = minimize(
            fitter._objective, start, args=(counts,), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"ftol": 1e-14, "gtol": 1e-10, "maxiter": 5000},
        )  # fmt: skip
        assert fit.objective <= found.fun * (1 + 1e-9)


def test_runs_that_went_wrong_do_not_move_the_fit() -> None:
    n, d, losses = runs(CHINCHILLA, 1e-4, 0)
    losses[[3, 17]] *= (1.4, 1.2)
    law = Fitter(n, d, losses).fit().law
    assert law.alpha == pytest.approx(0.34, abs=0.01)
    assert law.beta == pytest.approx(0.28, abs=0.01)


@pytest.mark.scale
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """40 studies of 35 runs: of nominal 90%, a binomial of 0.9 is below 29 of 40 with probability 0.0005."""
    studies, level, cost = 40, 0.9, Cost()
    covered = {"alpha": 0, "beta": 0, "E": 0, "a": 0, "prediction": 0}
    truth = {"a": CHINCHILLA.exponents(cost)[0]} | {name: getattr(CHINCHILLA, name) for name in ("alpha", "beta", "E")}
    for seed in range(studies):
        fitter = Fitter(*runs(CHINCHILLA, 0.004, seed), delta=0.01)
        boot = fitter.bootstrap(fitter.fit(), 60, seed=seed)
        found = {name: boot.of(name, level) for name in ("alpha", "beta", "E")} | {"a": boot.exponents(cost, level)[0]}
        for name, (low, high) in found.items():
            covered[name] += low <= truth[name] <= high
        new = float(CHINCHILLA.loss(1e11, 1e12)) * math.exp(0.004 * np.random.default_rng(10_000 + seed).normal())
        low, high = boot.prediction(1e11, 1e12, level)
        covered["prediction"] += low <= new <= high
    assert all(count >= 29 for count in covered.values()), covered


def test_the_cost_law_is_that_of_the_family() -> None:
    n = np.geomspace(1e4, 1e7, 5)
    cost = Cost.fit(n, 33.0 * n**0.87)
    assert (cost.kappa, cost.gamma) == (pytest.approx(33.0), pytest.approx(0.87))
    assert cost.error < 1e-9
    bent = Cost.fit(n, 6 * n + 5e4)
    worst = max(abs(bent.kappa * size**bent.gamma / (6 * size + 5e4) - 1) for size in n)
    assert bent.error == pytest.approx(worst, rel=1e-9)
    one = Cost.fit(np.array([1e6, 1e6]), np.array([7e6, 7e6]))
    assert (one.kappa, one.gamma) == (pytest.approx(7.0), 1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda n, d, loss: (n[:5], d[:5], loss[:5]), "at least 3 different sizes, and there are 1"),
        (lambda n, d, loss: (n[::5], d[:7], loss[::5] * np.nan), "positive numbers, and there are .nan"),
        (lambda n, d, loss: (n[[0, 5, 10, 15]], d[[0, 6, 12, 18]], loss[[0, 5, 10, 15]]), "4 runs cannot determine"),
    ],
)
def test_runs_that_determine_no_law_are_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fitter(*change(*runs(CHINCHILLA, 0.0, 0)))


def profiles(noise: float, seed: int) -> list[Profile]:
    random = np.random.default_rng(seed)
    made = []
    for flops in (1e19, 1e20, 1e21, 1e22):
        best = CHINCHILLA.optimum(flops, Cost())[0]
        n = best * np.geomspace(0.3, 3.3, 6)
        losses = np.asarray(CHINCHILLA.loss(n, flops / (6 * n))) + noise * random.normal(size=6)
        made.append(Profile.fit(flops, n, losses))
    return made


def test_isoflop_minima_follow_the_laws_frontier() -> None:
    frontier = Frontier.fit(profiles(0.0, 0), Cost())
    a, b = CHINCHILLA.exponents(Cost())
    # A parabola is not the valley's exact shape, which is steeper on the side of few tokens.
    assert frontier.parameters.exponent == pytest.approx(a, abs=0.01)
    assert frontier.tokens.exponent == pytest.approx(b, abs=0.01)
    assert frontier.parameters.at(1e21) == pytest.approx(CHINCHILLA.optimum(1e21, Cost())[0], rel=0.1)
    assert 6 * frontier.parameters.at(3e20) * frontier.tokens.at(3e20) == pytest.approx(3e20, rel=1e-9)


def test_the_parabola_is_numpys_whatever_the_size_of_n() -> None:
    n = np.array([1e9, 2e9, 5e9, 9e9])
    profile = Profile.fit(1e20, n, np.array([2.3, 2.1, 2.0, 2.2]))
    assert np.asarray(profile.at(n)) == pytest.approx(np.polyval(np.polyfit(np.log(n), profile.losses, 2), np.log(n)))
    fine = np.geomspace(1e9, 9e9, 100_001)
    assert profile.optimum == pytest.approx(fine[np.argmin(np.asarray(profile.at(fine)))], rel=1e-4)


@pytest.mark.scale
def test_isoflop_intervals_cover_and_need_residuals() -> None:
    studies, covered = 40, 0
    a = Frontier.fit(profiles(0.0, 0), Cost()).parameters.exponent
    for seed in range(studies):
        drawn = isoflop.bootstrap(profiles(0.01, seed), Cost(), 100, seed=seed)
        low, high = np.percentile([frontier.parameters.exponent for frontier in drawn], [5, 95])
        covered += low <= a <= high
    assert covered >= 29  # 0.1% of binomials of 40 at 0.9 are below
    exact = [Profile.fit(c, np.array([1e6, 2e6, 4e6]), np.array([2.0, 1.8, 1.9])) for c in (1e15, 1e16)]
    assert isoflop.bootstrap(exact, Cost(), 10) == []


def test_minima_outside_the_sizes_are_told_and_left_out() -> None:
    n = np.array([1e6, 2e6, 4e6])
    falling = Profile.fit(1e15, n, np.array([2.0, 1.7, 1.6]))
    assert falling.optimum is not None
    assert falling.optimum > 4e6
    assert not falling.inside
    assert Profile.fit(1e15, n, np.array([1.6, 1.9, 2.0])).optimum is None  # a hill
    with pytest.raises(ValueError, match="needs two budgets with a minimum among their sizes, and has 0"):
        Frontier.fit([falling, falling], Cost())
    with pytest.raises(ValueError, match=r"needs 3 sizes, and the budget of 1e\+15 FLOPs has 2"):
        Profile.fit(1e15, n[:2], n[:2])
    assert Power.fit([1.0, 10.0], [2.0, 200.0]).exponent == pytest.approx(2.0)
