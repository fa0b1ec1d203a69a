"""What an objective may bring along besides the model: arrays that never change, and parameters of its own.

    frozen      given to the compiled step as an argument, laid out over the devices by the same rules as the model; no
                gradient is taken, and no optimizer state is kept (a teacher's parameters)
    learned     trained with the model and saved beside it, under a name of their own; whoever loads the model later
                leaves them (a projection from a student's width to its teacher's)

Training knows no more of them than this. Inside the step the objective is bound to both, and to the number of the step,
which a recipe of several stages asks for.
"""

import abc
from collections.abc import Mapping
from typing import Any

import jax

LEARNED = "objective"
"""Name of the objective's own parameters beside the model's."""


class Companion(abc.ABC):
    """See the module's docstring. Trees are nested dicts with string keys."""

    @property
    @abc.abstractmethod
    def frozen_shapes(self) -> Any:
        """Shapes and types of the arrays that never change; {} for none."""

    @property
    @abc.abstractmethod
    def frozen_axes(self) -> Any:
        """Logical axis names of each."""

    @abc.abstractmethod
    def frozen(self, kinds: Any) -> Any:
        """The arrays themselves, read now.

        Args:
            kinds: shapes, types and shardings that they are to have, in the structure of `frozen_shapes`.
        """

    @property
    @abc.abstractmethod
    def learned_shapes(self) -> Any:
        """Shapes and types of the parameters that it brings; {} for none."""

    @property
    @abc.abstractmethod
    def learned_axes(self) -> Any:
        """Logical axis names of each."""

    @abc.abstractmethod
    def draw(self, key: jax.Array) -> Any:
        """Fresh parameters, to be traced."""

    @abc.abstractmethod
    def bind(self, learned: Any, frozen: Any, step: jax.Array | None) -> Any:
        """The objective (an `Objective`) with its arrays.

        Args:
            learned: its own parameters, in the precision of the arithmetic.
            frozen: the arrays that never change.
            step: steps done, while training; None in evaluation.
        """

    @property
    @abc.abstractmethod
    def fingerprints(self) -> Mapping[str, str]:
        """What the arrays are, by name, for the run's provenance."""


def apart(params: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """A model's parameters, and those that the objective brought; {} for none."""
    return {name: tree for name, tree in params.items() if name != LEARNED}, params.get(LEARNED, {})
