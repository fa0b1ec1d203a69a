"""Every schedule against its formula in plain Python, at every step."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.optim import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSquareRoot,
    Linear,
    MultiStep,
    Schedule,
    WarmupStableDecay,
)

PEAK, STEPS = 3e-3, 200


def restarts(k: int) -> float:
    """Cycles of 20, 40, 80, ... steps from step 10 on, each peak half the one before, down to a tenth of it."""
    start, length, peak = 10, 20, 1.0
    while k >= start + length:
        start, length, peak = start + length, 2 * length, peak / 2
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - start) / length)))


def wsd(shape: Callable[[float], float]) -> Callable[[int], float]:
    return lambda k: 1.0 if k < 150 else shape((k - 150) / 50)


# Factor on the peak after a warm-up of 10 steps.
DECAYS: dict[str, tuple[Schedule, Callable[[int], float]]] = {
    "constant": (Constant(warmup_steps=10), lambda k: 1.0),
    "linear": (Linear(warmup_steps=10, final=0.1), lambda k: 1 - 0.9 * (k - 10) / 190),
    "cosine": (Cosine(warmup_steps=10), lambda k: 0.5 * (1 + math.cos(math.pi * (k - 10) / 190))),
    "cosine to a tenth": (
        Cosine(warmup_steps=0.05, final=0.1),
        lambda k: 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - 10) / 190)),
    ),
    "restarts": (CosineRestarts(warmup_steps=10, cycle_steps=20, growth=2.0, peak_decay=0.5, final=0.1), restarts),
    "equal restarts": (
        CosineRestarts(warmup_steps=10, cycle_steps=0.5),
        lambda k: 0.5 * (1 + math.cos(math.pi * ((k - 10) % 95) / 95)),
    ),
    "multi-step": (
        MultiStep(warmup_steps=10, milestones=(0.5, 150), factor=0.3),
        lambda k: 1.0 if k < 100 else 0.3 if k < 150 else 0.09,
    ),
    "multi-step without milestones": (MultiStep(warmup_steps=10, milestones=()), lambda k: 1.0),
    "exponential": (Exponential(warmup_steps=10, rate=0.5, decay_steps=40), lambda k: 0.5 ** ((k - 10) / 40)),
    "inverse square root": (InverseSquareRoot(warmup_steps=10), lambda k: math.sqrt(11) / math.sqrt(k + 1)),
    "wsd": (WarmupStableDecay(warmup_steps=10, decay_steps=0.25), wsd(lambda u: 1 - u)),
    "wsd cosine": (
        WarmupStableDecay(warmup_steps=10, decay_steps=50, decay_shape="cosine", final=0.2),
        wsd(lambda u: 0.2 + 0.4 * (1 + math.cos(math.pi * u))),
    ),
    "wsd exponential": (
        WarmupStableDecay(warmup_steps=10, decay_steps=50, decay_shape="exponential", final=0.01),
        wsd(lambda u: 0.01**u),
    ),
    "wsd square root": (
        WarmupStableDecay(warmup_steps=10, decay_steps=50, decay_shape="square_root"),
        wsd(lambda u: 1 - math.sqrt(u)),
    ),
    "wsd without decay": (WarmupStableDecay(warmup_steps=10, decay_steps=0), lambda k: 1.0),
}


@pytest.mark.parametrize("name", DECAYS)
def test_schedule_equals_its_formula_at_every_step(name: str) -> None:
    schedule, factor = DECAYS[name]
    expected = [PEAK * ((k + 1) / 11 if k < 10 else factor(k)) for k in range(STEPS)]
    rates = schedule.build(PEAK, STEPS)(jnp.arange(STEPS))
    assert rates.dtype == jnp.float32
    # float32: the cosine near its end is a difference of numbers near 1
    np.testing.assert_allclose(rates, expected, rtol=2e-6, atol=2e-7 * PEAK)


@pytest.mark.parametrize(
    ("schedule", "rise"),
    [
        (Constant(warmup_steps=25), lambda w: w),
        (Constant(warmup_steps=25, warmup_from=0.2), lambda w: 0.2 + 0.8 * w),
        (Constant(warmup_steps=25, warmup_shape="cosine"), lambda w: 0.5 * (1 - math.cos(math.pi * w))),
        (
            Constant(warmup_steps=25, warmup_shape="cosine", warmup_from=0.5),
            lambda w: 0.5 + 0.25 * (1 - math.cos(math.pi * w)),
        ),
        (Constant(warmup_steps=0.125, warmup_shape="exponential"), lambda w: 0.01 * 100**w),
        (Constant(warmup_steps=25, warmup_shape="exponential", warmup_from=0.25), lambda w: 0.25 * 4**w),
    ],
)
def test_warmup_equals_its_formula_at_every_step(schedule: Schedule, rise: Callable[[float], float]) -> None:
    expected = [PEAK * (rise((k + 1) / 26) if k < 25 else 1.0) for k in range(STEPS)]
    np.testing.assert_allclose(schedule.build(PEAK, STEPS)(jnp.arange(STEPS)), expected, rtol=2e-6)


def test_restart_cycles_repeat_from_the_warmup_on() -> None:
    rates = np.asarray(CosineRestarts(warmup_steps=0.1, cycle_steps=0.25).build(1.0, STEPS)(jnp.arange(STEPS)))
    np.testing.assert_array_equal(rates[20:65], rates[65:110])
    assert (rates == 1).sum() == 4


def test_a_schedule_traces_and_gives_scalars_for_scalars() -> None:
    rates = [schedule.build(PEAK, STEPS) for schedule, _ in DECAYS.values()]
    traced = jax.jit(lambda k: [rate(k) for rate in rates])(jnp.int32(77))
    for rate, value in zip(rates, traced, strict=True):
        assert value.shape == ()
        np.testing.assert_allclose(value, rate(77), rtol=1e-6)  # compiled float32 arithmetic may differ by an ulp


def test_the_rate_stays_at_its_end_beyond_the_run() -> None:
    rate = Cosine(final=0.1).build(1.0, STEPS)
    np.testing.assert_allclose(rate(jnp.asarray([STEPS, STEPS + 50, 2 * STEPS])), 0.1, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(warmup_steps=-1), "warmup_steps=-1 must not be negative"),
        (lambda: Cosine(warmup_steps=50.0), r"warmup_steps=50.0 is a float.*write 50 for a number of steps"),
        (lambda: Cosine(final=1.5), r"final=1.5 is a fraction and must lie in \[0, 1\]"),
        (lambda: Constant(warmup_shape="exponential", warmup_from=0.0), "warmup_from=0.0 cannot grow exponentially"),
        (lambda: Cosine(warmup_steps=200).check(200), "is 200 steps, but the run has 200.*use at most 199"),
        (lambda: Cosine().check(0), "total_steps=0 must be at least 1"),
        (lambda: MultiStep(milestones=(0.5, 0.4)).check(200), r"are the steps \[100, 80\]; they must ascend"),
        (lambda: MultiStep(milestones=(100, 300)).check(200), r"\[100, 300\].*the last step \(199\)"),
        (lambda: MultiStep(warmup_steps=50, milestones=(20,)).check(200), r"the end of the warm-up \(50\)"),
        (lambda: MultiStep(milestones=(-5,)), r"milestones\[0\]=-5 must not be negative"),
        (lambda: Exponential(rate=0.0), "rate=0.0 leaves nothing"),
        (lambda: Exponential(decay_steps=0).check(200), "decay_steps=0 of 200 steps is less than one"),
        (lambda: CosineRestarts(growth=0.5), "growth=0.5 makes cycles ever shorter"),
        (lambda: CosineRestarts(cycle_steps=0.001).check(200), "cycle_steps=0.001 of 200 steps is less than one step"),
        (
            lambda: WarmupStableDecay(warmup_steps=0.5, decay_steps=150).check(200),
            r"\(100 steps\) and decay_steps=150 \(150 steps\) do not fit into a run of 200 steps",
        ),
        (lambda: WarmupStableDecay(decay_shape="exponential"), "final=0.0 cannot be reached exponentially"),
    ],
)
def test_an_impossible_schedule_says_what_would_be_possible(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
