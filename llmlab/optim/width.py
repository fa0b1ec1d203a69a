"""How an optimizer's learning rate must follow the width of the model: the optimizer's half of muP.

What a layer computes should change by the same amount at every width (`llmlab.nn.mup` has the other half, initial
weights and factors). With r and c for how many times as many rows (inputs) and columns (outputs) a matrix has as in the
base model, and the change of the weights correlated with their input, the learning rate must be multiplied by

                            input: r = 1     hidden: r, c > 1     output: c = 1     because a step is
    Adam, AdamW, Lion       1                1 / r                1                 of entries that do not shrink
    SGD and momentum        c                c / r (= 1)          r                 as long as the gradient, 1 / width
    Muon, update_rms        1                1 / sqrt(max(r, c))  1                 of entries that do not shrink
    Muon, update_rms=None   1                1                    sqrt(r)           of singular values sqrt(c / r), or 1
    LAMB, Adafactor         1                1 / sqrt(r)          1                 of the size of the weights

Adam and SGD are Table 8 of Yang et al. 2022 (2203.03466); Lion steps are as long as Adam's. The others follow from the
same condition, a change of the output by a constant amount, written with the spectral norm: sqrt(c / r) for a step
(Yang, Simon and Bernstein 2023, 2310.17813); the step of LAMB and Adafactor is relative to the weights, which shrink
as 1 / sqrt(r). Biases and gains are inputs, fan-in 1. A weight that touches no growing axis is left alone. Adafactor
without scale_by_parameter is Adam's row.

Gradients shrink as 1 / width, so what is added to their root mean square, epsilon, must as well (Adam, LAMB). Weight
decay: rate x weight_decay stays what it is in the base model, as in the authors' own package; otherwise hidden matrices
of wide models would hardly decay.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmlab.optim.parameters import Parameter

Growth = Mapping[str, float]
"""How many times as long as in the base model each logical axis is; axes that are not named do not grow."""


@dataclass(frozen=True)
class Fans:
    """Growth of a parameter's inputs and outputs; 1 for what does not follow the width."""

    inputs: float
    outputs: float

    @classmethod
    def of(cls, parameter: Parameter, growth: Growth) -> "Fans":
        """Those of one of the stacked parameters.

        Raises:
            ValueError: the axes do not tell inputs from outputs.
        """
        dims = parameter.matrix_dims
        if dims is None:
            if parameter.kind not in ("norm", "bias", "embedding") and _product(parameter.own_axes, growth) != 1.0:
                raise ValueError(
                    f"muP cannot tell inputs from outputs of {parameter.path} {parameter.axes}; put embed first or "
                    "last among its axes"
                )
            return cls(1.0, _product(parameter.own_axes, growth))
        rows, columns = ([parameter.axes[i] for i in side] for side in dims)
        return cls(_product(rows, growth), _product(columns, growth))

    @property
    def hidden(self) -> bool:
        """Whether both sides follow the width."""
        return self.inputs != 1.0 and self.outputs != 1.0


def entrywise(fans: Fans) -> float:
    """Of a rule whose steps have entries of a constant size."""
    return 1 / fans.inputs if fans.hidden else 1.0


def gradient(fans: Fans) -> float:
    """Of a rule whose steps are gradients."""
    return fans.outputs / fans.inputs if fans.hidden else fans.inputs * fans.outputs


def relative(fans: Fans) -> float:
    """Of a rule whose steps are as large as the weights."""
    return 1 / math.sqrt(fans.inputs) if fans.hidden else 1.0


def orthogonal(fans: Fans, *, scaled_to_rms: bool) -> float:
    """Of Muon's matrices."""
    if scaled_to_rms:
        return 1 / math.sqrt(max(fans.inputs, fans.outputs)) if fans.hidden else 1.0
    return math.sqrt(fans.inputs) if fans.outputs == 1.0 else 1.0


def _product(axes: list[str] | tuple[str, ...], growth: Growth) -> float:
    return math.prod(growth.get(name, 1.0) for name in axes)
