"""Learning-rate schedules: a warm-up to the peak, then a decay.

    peak |      __________            W   steps below the peak (warm-up)
         |     /          \\           T   steps in the run
         |    /            \\
         |   /              \\        Update number k (0 to T - 1) uses rate(k).
         +--------------------
          0    W             T

Warm-up, for k < W, with w = (k + 1) / (W + 1) and a = warmup_from:

    linear        peak (a + (1 - a) w)
    cosine        peak (a + (1 - a) (1 - cos(pi w)) / 2)
    exponential   peak a^(1 - w)

so the first update is never wasted at a rate of zero, and update W is the first at the peak. The decay starts there:
with u = (k - W) / (T - W), which runs from 0 to just short of 1,

    Constant             1
    Linear               1 - (1 - final) u
    Cosine               final + (1 - final) (1 + cos(pi u)) / 2     Loshchilov and Hutter 2017 (1608.03983), eq. 5
    CosineRestarts       a cosine in each of several cycles          the same, section 3
    MultiStep            factor^(milestones passed)
    Exponential          rate^((k - W) / decay_steps)
    InverseSquareRoot    sqrt((W + 1) / (k + 1))                     Vaswani et al. 2017 (1706.03762), eq. 3
    WarmupStableDecay    1, then a decay over the last steps         Hu et al. 2024 (2404.06395), section 4

times the peak. Cosine needs the length of the run beforehand; InverseSquareRoot and WarmupStableDecay do not, so a run
can be prolonged from any checkpoint before the decay.

Wherever a number of steps is asked for, an int counts steps and a float is a fraction of the run.
"""

import abc
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import jax

LearningRate = Callable[[Any], "jax.Array"]
"""Step number (an int or an int32 array of any shape) to learning rates (float32, the same shape)."""


@dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
    """A warm-up, and a decay that the subclass defines."""

    warmup_steps: int | float = 0
    """Updates below the peak at the start: a number of steps, or a fraction of the run such as 0.02."""
    warmup_shape: Literal["linear", "cosine", "exponential"] = "linear"
    """How the rate rises to the peak."""
    warmup_from: float | None = None
    """Where the warm-up rises from, as a fraction of the peak; None for 0, or 0.01 if it is exponential."""

    def __post_init__(self) -> None:
        check_steps("warmup_steps", self.warmup_steps)
        if self.warmup_from is not None:
            check_fraction("warmup_from", self.warmup_from)
        if self.warmup_shape == "exponential" and self.warmup_from == 0:
            raise ValueError("warmup_from=0.0 cannot grow exponentially; use a positive fraction such as 0.01")

    def check(self, total_steps: int) -> None:
        """Raises ValueError where the schedule does not fit into a run of so many steps."""
        if total_steps < 1:
            raise ValueError(f"total_steps={total_steps} must be at least 1")
        warmup = resolve(self.warmup_steps, total_steps)
        if warmup >= total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} is {warmup} steps, but the run has {total_steps}: the peak would "
                f"never be reached; use at most {total_steps - 1}, or a longer run"
            )

    def build(self, peak: "float | jax.Array", total_steps: int) -> LearningRate:
        """The learning rate of every step, as a function that may be traced.

        Args:
            peak: the highest rate, which may be traced.
            total_steps: length of the run.

        Raises:
            ValueError: see `check`.
        """
        import jax.numpy as jnp

        self.check(total_steps)
        warmup = resolve(self.warmup_steps, total_steps)

        def learning_rate(step: Any) -> "jax.Array":
            # float32 is exact up to 16 million steps
            k = jnp.asarray(step).astype(jnp.float32)
            factor = self.decay(jnp.clip(k, warmup, total_steps), warmup, total_steps)
            if warmup:
                factor = jnp.where(k < warmup, self._rise(jnp.minimum((k + 1) / (warmup + 1), 1)), factor)
            return (peak * factor).astype(jnp.float32)

        return learning_rate

    @abc.abstractmethod
    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        """Factor on the peak at each step from `warmup` on.

        Args:
            step: step numbers as float32, at least `warmup`, any shape.
            warmup: steps of warm-up.
            total_steps: length of the run.
        """

    def _rise(self, w: "jax.Array") -> "jax.Array":
        """Factor on the peak during the warm-up, of which the fraction w is done."""
        import jax.numpy as jnp

        if self.warmup_shape == "exponential":
            return (0.01 if self.warmup_from is None else self.warmup_from) ** (1 - w)
        start = self.warmup_from or 0.0
        if self.warmup_shape == "cosine":
            w = (1 - jnp.cos(math.pi * w)) / 2
        return start + (1 - start) * w


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The peak throughout."""

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        import jax.numpy as jnp

        return jnp.ones_like(step)


@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line down."""

    final: float = 0.0
    """Where it ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("final", self.final)

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        return 1 - (1 - self.final) * (step - warmup) / (total_steps - warmup)


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine wave down: slow at both ends."""

    final: float = 0.0
    """Where it ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("final", self.final)

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        return _half_cosine((step - warmup) / (total_steps - warmup), self.final)


@dataclass(frozen=True, kw_only=True)
class CosineRestarts(Schedule):
    """Cosines one after the other, each starting at a peak again (SGDR); the end of the run cuts the last one."""

    cycle_steps: int | float = 0.25
    """Length of the first cycle: a number of steps, or a fraction of the steps after the warm-up."""
    growth: float = 1.0
    """Length of each cycle as a multiple of the one before (T_mult of the paper)."""
    peak_decay: float = 1.0
    """Peak of each cycle as a fraction of the one before."""
    final: float = 0.0
    """Where each cycle ends, as a fraction of its own peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps("cycle_steps", self.cycle_steps)
        check_fraction("final", self.final)
        check_fraction("peak_decay", self.peak_decay)
        if self.growth < 1:
            raise ValueError(f"growth={self.growth} makes cycles ever shorter; use 1 for equal cycles, or more")

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        rest = total_steps - resolve(self.warmup_steps, total_steps)
        if resolve(self.cycle_steps, rest) < 1:
            raise ValueError(f"cycle_steps={self.cycle_steps} of {rest} steps is less than one step; use at least 1")

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        import jax.numpy as jnp

        lengths = [resolve(self.cycle_steps, total_steps - warmup)]
        while warmup + sum(lengths) < total_steps:
            lengths.append(round(lengths[-1] * self.growth))
        starts = jnp.asarray(list(itertools.accumulate(lengths[:-1], initial=warmup)), jnp.float32)
        cycle = jnp.searchsorted(starts, step, side="right") - 1
        u = (step - starts[cycle]) / jnp.asarray(lengths, jnp.float32)[cycle]
        return self.peak_decay ** cycle.astype(jnp.float32) * _half_cosine(u, self.final)


@dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """A staircase: at each milestone the rate is multiplied by the same factor."""

    milestones: tuple[int | float, ...] = (0.6, 0.85)
    """Steps (or fractions of the run) from which on one factor more applies, ascending."""
    factor: float = 0.1
    """What each milestone multiplies the rate by."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("factor", self.factor)
        for i, milestone in enumerate(self.milestones):
            check_steps(f"milestones[{i}]", milestone)

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        steps = [resolve(milestone, total_steps) for milestone in self.milestones]
        warmup = resolve(self.warmup_steps, total_steps)
        if any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"milestones={self.milestones} are the steps {steps}; they must ascend")
        if steps and not (warmup <= steps[0] and steps[-1] < total_steps):
            raise ValueError(
                f"milestones={self.milestones} are the steps {steps}; they must lie between the end of the warm-up "
                f"({warmup}) and the last step ({total_steps - 1})"
            )

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        import jax.numpy as jnp

        steps = jnp.asarray([resolve(milestone, total_steps) for milestone in self.milestones], jnp.float32)
        return self.factor ** jnp.searchsorted(steps, step, side="right").astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class Exponential(Schedule):
    """The same fraction lost in every step."""

    rate: float = 0.1
    """What remains after each `decay_steps`, as a fraction."""
    decay_steps: int | float = 1.0
    """A number of steps, or a fraction of the run; 1.0 is the whole run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("rate", self.rate)
        check_steps("decay_steps", self.decay_steps)
        if self.rate == 0:
            raise ValueError("rate=0.0 leaves nothing after the first step; use a positive fraction")

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        if resolve(self.decay_steps, total_steps) < 1:
            raise ValueError(f"decay_steps={self.decay_steps} of {total_steps} steps is less than one; use at least 1")

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        return self.rate ** ((step - warmup) / resolve(self.decay_steps, total_steps))


@dataclass(frozen=True, kw_only=True)
class InverseSquareRoot(Schedule):
    """The Transformer's original: proportional to 1/sqrt(step). The warm-up sets how slowly it falls."""

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        import jax.numpy as jnp

        return jnp.sqrt((warmup + 1) / (step + 1))


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Warm-up, a long plateau at the peak, and a decay at the end (WSD)."""

    decay_steps: int | float = 0.2
    """Length of the decay: a number of steps, or a fraction of the run."""
    decay_shape: Literal["linear", "cosine", "exponential", "square_root"] = "linear"
    """Form of the decay; square_root is 1 - sqrt(u), of Hägele et al. 2024 (2405.18392), section 3."""
    final: float = 0.0
    """Where it ends, as a fraction of the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("final", self.final)
        check_steps("decay_steps", self.decay_steps)
        if self.decay_shape == "exponential" and self.final == 0:
            raise ValueError("final=0.0 cannot be reached exponentially; use a positive fraction such as 0.1")

    def check(self, total_steps: int) -> None:
        super().check(total_steps)
        warmup, decay = resolve(self.warmup_steps, total_steps), resolve(self.decay_steps, total_steps)
        if warmup + decay > total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} ({warmup} steps) and decay_steps={self.decay_steps} ({decay} steps) "
                f"do not fit into a run of {total_steps} steps; use at most {total_steps} in all"
            )

    def decay(self, step: "jax.Array", warmup: int, total_steps: int) -> "jax.Array":
        import jax.numpy as jnp

        length = resolve(self.decay_steps, total_steps)
        u = jnp.maximum(step - (total_steps - length), 0) / max(length, 1)
        match self.decay_shape:
            case "linear":
                return 1 - (1 - self.final) * u
            case "cosine":
                return _half_cosine(u, self.final)
            case "exponential":
                return self.final**u
            case "square_root":
                return 1 - (1 - self.final) * jnp.sqrt(u)


def resolve(steps: int | float, total_steps: int) -> int:
    """A number of steps: an int as it is, a float as a fraction of the total, to the nearest step."""
    return steps if isinstance(steps, int) else round(steps * total_steps)


def check_steps(name: str, steps: int | float) -> None:
    """Raises ValueError for what is neither a number of steps nor a fraction."""
    if isinstance(steps, int):
        if steps < 0:
            raise ValueError(f"{name}={steps} must not be negative")
    elif not 0 <= steps <= 1:
        hint = f"; write {round(steps)} for a number of steps" if steps > 1 and math.isfinite(steps) else ""
        raise ValueError(f"{name}={steps} is a float, so a fraction of the run, and must lie in [0, 1]{hint}")


def check_fraction(name: str, value: float) -> None:
    """Raises ValueError for what does not lie in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} is a fraction and must lie in [0, 1]")


def _half_cosine(u: "jax.Array", final: float) -> "jax.Array":
    import jax.numpy as jnp

    return final + (1 - final) * (1 + jnp.cos(math.pi * u)) / 2
