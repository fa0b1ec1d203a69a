"""The coordinate check: does every layer's output change by the same amount at every width?

A parametrisation is right for all widths when, after a few steps at one learning rate, the entries of each layer's
output (its coordinates) have a size that does not depend on the width (Yang et al. 2022, 2203.03466, appendix D.1). It
takes seconds, needs no trained model, and finds a forgotten multiplier: under muP the lines of log size against log
width are flat, in the standard parametrisation those of a trained network rise.

At the start the sizes are those of the initialisation; what training adds is the *change* since then, whose slope is
the sharper test: 0 under muP, up to 1 otherwise. (muP's logits start as 1 / sqrt(width), so the slope of their size is
negative at first; that of their change is not.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmlab.experiment import Experiment
from llmlab.nn.module import Params, merge, split
from llmlab.nn.stack import Stack, cut_by

Batch = Mapping[str, np.ndarray | jax.Array]


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Mean absolute value of the entries of what every layer puts out, by layer and step (0 is before training)."""

    width: int
    size: dict[str, list[float]]
    """Of the output itself."""
    change: dict[str, list[float]]
    """Of its difference from that of step 0."""


def coordinates(experiment: Experiment, batch: Batch, *, steps: int = 4, seed: int = 0) -> Coordinates:
    """Trains on one batch, in float32, and looks at every layer.

    Args:
        experiment: a decoder (`Transformer`) with its vocabulary settled, and the optimizer whose rates are checked; of
            `train` nothing counts, and the learning rate is peak_lr from the first step.
        batch: what the model is called with, with labels.
        steps: updates.
        seed: of the initial weights.

    Raises:
        ValueError: the model has no layers that could be looked at.
    """
    width = getattr(experiment.model, "embed_dim", None)
    if width is None or not hasattr(experiment.model, "mup"):
        raise ValueError(f"the coordinate check looks into a Transformer, and this is a {type(experiment.model)}")
    graphdef, _, axes = experiment.model.abstract()
    params = jax.jit(lambda key: split(experiment.model.build(nnx.Rngs(params=key)))[1])(jax.random.key(seed))
    optimizer = experiment.optimizer
    # Any length serves a schedule that is never asked.
    transformation = optimizer.build(axes, experiment.train.steps, growth=experiment.model.width_growth)
    state = transformation.init(params)
    peak = optimizer.peak_lr

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        output, seen = _outputs(merge(graphdef, params), batch)
        return output.loss, seen

    @jax.jit
    def step(params: Params, state: Any, batch: Batch) -> Any:
        (_, seen), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = transformation.update(gradient, state, params)
        factor = jnp.where(state["learning_rate"] > 0, peak / state["learning_rate"], 0.0)
        params = jax.tree.map(lambda x, u: x + factor * u, params, updates)
        return params, state, seen

    size: dict[str, list[float]] = {}
    change: dict[str, list[float]] = {}
    first: dict[str, np.ndarray] | None = None
    for _ in range(steps + 1):
        params, state, seen = step(params, state, dict(batch))
        outputs = {name: np.asarray(x, np.float32) for name, x in seen.items()}
        first = outputs if first is None else first
        for name, x in outputs.items():
            size.setdefault(name, []).append(float(np.mean(np.abs(x))))
            change.setdefault(name, []).append(float(np.mean(np.abs(x - first[name]))))
    return Coordinates(width=width, size=size, change=change)


def slopes(found: Sequence[Coordinates], *, of: str = "change", step: int = -1) -> dict[str, float]:
    """Slope of log mean |coordinate| against log width, by layer, by least squares.

    Args:
        found: of several widths (and seeds).
        of: "size" or "change".
        step: after how many steps; -1 for the last.

    Raises:
        ValueError: fewer than two widths.
    """
    widths = np.log([each.width for each in found])
    if len({each.width for each in found}) < 2:
        raise ValueError("a slope against the width needs at least two widths")
    names = getattr(found[0], of)
    return {
        name: float(np.polyfit(widths, np.log([getattr(each, of)[name][step] for each in found]), 1)[0])
        for name in names
    }


def _outputs(model: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
    """The model's output, and what its layers put out on the way."""
    seen: dict[str, jax.Array] = {}

    def cut(stack: Stack, x: jax.Array, context: Any, key: jax.Array | None) -> Any:
        seen["embedding"] = x
        repeats, reports = stack.repeats, []
        params = [nnx.split(block)[1] for block in stack.blocks]
        for index, layer in enumerate(repeats.layers(params)):
            x, _, report = repeats.layer(layer, x, context, key, index, None)
            seen[f"layer {index + 1}"] = x
            reports.append({name: value[None] for name, value in report.items()})
        return x, reports

    with cut_by(cut):
        output = model(**batch)
    return output, seen | {"final": output.last_hidden_state, "logits": output.logits}
