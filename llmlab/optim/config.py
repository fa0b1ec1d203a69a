"""What every optimizer has in common: learning rate, weight decay, clipping, parameter groups, weight averaging."""

import abc
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmlab.optim.schedules import Constant, LearningRate, Schedule

if TYPE_CHECKING:
    import optax

    from llmlab.optim.parameters import Parameter
    from llmlab.optim.rules import Rule
    from llmlab.optim.width import Fans, Growth


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are treated differently, chosen by their dotted paths.

    `Group(match="embedding", frozen=True)` freezes everything under embedding,
    `Group(match="*.mixer.*.kernel", lr_multiplier=0.5)` halves the rate of all attention matrices. The layers of a
    stack are one parameter, so a group holds all of them or none.
    """

    match: str
    """Dotted path of a parameter or of what holds it; * stands for any characters (dots too), ? for one."""
    lr_multiplier: float = 1.0
    """Factor on the learning rate (and with it on the weight decay)."""
    weight_decay: float | None = None
    """Weight decay, whatever decay_exclude says; None for the optimizer's."""
    frozen: bool = False
    """Whether the parameters keep their values; they then have no optimizer state and no part in the gradient norm."""

    def __post_init__(self) -> None:
        if not (self.lr_multiplier >= 0 and math.isfinite(self.lr_multiplier)):
            raise ValueError(f"lr_multiplier={self.lr_multiplier} of group {self.match!r} must be at least 0")
        if self.weight_decay is not None:
            check_positive(f"weight_decay of group {self.match!r}", self.weight_decay, zero=True)


@dataclass(frozen=True, kw_only=True)
class Optimizer(abc.ABC):
    """An update rule with everything around it.

        g      gradient, scaled down to a global norm of clip_norm where it is longer
        u      direction that the rule makes of g
        x      x - rate(k) (u + weight_decay x)

    Weight decay is decoupled from the rule (Loshchilov and Hutter 2019, 1711.05101) and, as everywhere in the field,
    multiplied by the learning rate.
    """

    peak_lr: float
    """Highest learning rate."""
    schedule: Schedule = Constant()
    """Learning rate over the run, relative to peak_lr."""
    weight_decay: float = 0.0
    """Decoupled weight decay: each step shrinks a parameter by learning rate x weight_decay."""
    decay_exclude: tuple[Literal["norm", "bias", "embedding"], ...] = ("norm", "bias")
    """Parameters without weight decay: gains of norms (and of residual branches), biases, embedding tables."""
    clip_norm: float | None = 1.0
    """Longest gradient, in the norm over all parameters together; None for no clipping."""
    groups: tuple[Group, ...] = ()
    """Parameters with a learning rate or weight decay of their own, or frozen; the first group that matches counts."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, such as 0.999; None for none."""

    def __post_init__(self) -> None:
        check_positive("peak_lr", self.peak_lr)
        check_positive("weight_decay", self.weight_decay, zero=True)
        if self.clip_norm is not None:
            check_positive("clip_norm", self.clip_norm)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie between 0 and 1, such as 0.999; None keeps no average")

    def check(self, total_steps: int) -> None:
        """Raises ValueError where the schedule does not fit into a run of so many steps. Needs no jax."""
        self.schedule.check(total_steps)

    def learning_rate(self, total_steps: int) -> LearningRate:
        """The learning rate of update k (0 first), before the multipliers of groups.

        Args:
            total_steps: length of the run.

        Returns:
            function from step (int or int32 array) to rate (float32), which may be traced.
        """
        return self.schedule.build(self.peak_lr, total_steps)

    def scalars(self) -> dict[str, float]:
        """The values that only multiply something, by field: a compiled step takes them as arguments, so that runs
        that differ in nothing else share one program. A weight decay of zero is no multiplication and is not there."""
        values = {"peak_lr": self.peak_lr, "weight_decay": self.weight_decay}
        return {name: value for name, value in values.items() if value}

    def with_scalars(self, values: Mapping[str, Any]) -> "Optimizer":
        """The same with other values of some fields, not checked: those of `scalars()` may be traced."""
        other = copy.copy(self)
        for name, value in values.items():
            object.__setattr__(other, name, value)  # frozen, and replace() would compare what is traced
        return other

    def build(
        self, params_axes: dict[str, Any], total_steps: int, *, growth: "Growth | None" = None
    ) -> "optax.GradientTransformation":
        """The optimizer for parameters with these axes.

        Args:
            params_axes: nested dict of the structure of the parameters; its leaves are tuples of logical axis names,
                "layers" first where layers are stacked.
            total_steps: length of the run in updates.
            growth: under muP, how many times as long as in the base model each logical axis is
                (`ModelConfig.width_growth`); None or empty for the standard parametrisation.

        Returns:
            optax.GradientTransformation: `init(params)`, `update(grads, state, params) -> (updates, state)`; the new
            parameters are params + updates (optax.apply_updates). The state is a nested dict of arrays: "step",
            "learning_rate" and "gradient_norm" (before clipping) of the latest update, and those of the rule.

        Raises:
            ValueError: the schedule does not fit into the run, a group matches no parameter, or the rule's learning
                rates under muP are not known.
        """
        from llmlab.optim.transformation import assemble

        return assemble(self, params_axes, total_steps, growth or {})

    @abc.abstractmethod
    def rule(self, parameters: dict[str, Any], decay: Any) -> "Rule":
        """Directions from clipped gradients, weight decay included.

        Args:
            parameters: nested dict of `llmlab.optim.parameters.Parameter`, those that are trained.
            decay: step `(updates, params) -> updates` that adds weight_decay x params, to be put after the rule's
                own scaling (see `llmlab.optim.rules.then`).
        """

    def lr_multiplier(self, parameter: "Parameter") -> float:
        """Factor on the learning rate of a parameter, besides its group's."""
        return 1.0

    def width_multiplier(self, parameter: "Parameter", fans: "Fans") -> float:
        """Factor on the learning rate of a parameter whose inputs and outputs are so many times as many as in muP's
        base model, while rate x weight_decay stays the same.

        Raises:
            ValueError: it is not known for this rule.
        """
        raise ValueError(
            f"muP's learning rates are not known for {type(self).__name__}; give it a width_multiplier, use another "
            "optimizer, or model.mup=None"
        )

    def at_width(self, ratio: float) -> "Optimizer":
        """The rule for gradients that are smaller by this ratio, as those of a wider model are under muP."""
        return self


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raises ValueError for what is not a positive (or zero) finite number."""
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise ValueError(f"{name}={value} must be {'zero or ' if zero else ''}a positive number")


def check_decay_rate(name: str, value: float) -> None:
    """Raises ValueError for what cannot be the decay rate of a moving average."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is the decay rate of a moving average and must lie in [0, 1), such as 0.9")
