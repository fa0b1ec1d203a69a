"""What runs on the devices: the train step, the evaluation step and the initialisation of one experiment, laid out."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from jaxtyping import Int64

from llmlab.nn.module import Params, draw, merge, num_parameters
from llmlab.objectives import Batch, LossParts, Objective
from llmlab.objectives.companion import LEARNED, Companion, apart
from llmlab.objectives.cross_entropy import default_chunk
from llmlab.optim import Optimizer
from llmlab.sharding import Placement
from llmlab.sharding.pipeline import AXIS
from llmlab.training.config import Train
from llmlab.training.precision import cast
from llmlab.training.state import Layout, TrainState, abstract, make_initialise, new_state
from llmlab.training.step import (
    Scalars,
    batch_shardings,
    evaluate_step,
    jitted,
    jitted_evaluation,
    train_step,
)

if TYPE_CHECKING:
    from llmlab.models.config import ModelConfig

Weights = Callable[[Params], Params]
"""Shapes of parameters to parameters, for a run that starts from weights that exist. Parts that are absent, by the
first name of their paths, are drawn."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """See the module's docstring."""

    model: "ModelConfig"
    """The model config, its vocabulary settled."""
    graphdef: Any
    """Of the model."""
    placement: Placement
    """Devices and rules."""
    state: TrainState
    """Shapes, types and shardings of the state."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shapes, types and shardings of a batch."""
    scalars: Scalars
    """What the train step takes besides; of frozen arrays the shapes, types and shardings."""
    seed: int
    """Of the initial weights."""
    step: Any
    """(state, batch, scalars) -> (state, metrics), jitted or compiled."""
    evaluation: Any
    """(params, batch, frozen) -> sums, jitted or compiled."""
    traced_step: Callable[[TrainState, Batch, Scalars], tuple[TrainState, dict[str, Any]]]
    """`step`, to be traced."""
    traced_evaluate: Callable[[Params, Batch, Any], LossParts]
    """`evaluation`, to be traced."""
    parameters: Callable[[jax.Array], Params]
    """A key to parameters, to be traced."""
    draw: Callable[[jax.Array], TrainState]
    """A key to the state before the first step, jitted."""
    begin: Callable[[Params], TrainState]
    """Parameters to the state before the first step, jitted."""
    companion: Companion | None = None
    """What the objective brings along."""

    @classmethod
    def build(
        cls,
        model: "ModelConfig",
        objective: Objective,
        optimizer: Optimizer,
        placement: Placement,
        train: Train,
        batch: Mapping[str, np.ndarray],
    ) -> "Program":
        """The program, not yet compiled; of `batch`, a global batch, only names, shapes and types matter. Allocates
        nothing.

        Raises:
            ValueError: the objective brings along what this mesh cannot train with.
        """
        graphdef, shapes, axes = model.abstract()
        num_rows, platform = len(next(iter(batch.values()))), placement.mesh.devices.flat[0].platform
        objective = objective.chunked(
            lambda: chunk(
                num_rows // train.accumulation, model.vocab_size, platform, placement.rules, placement.mesh.shape
            )
        )
        companion = objective.companion(model)
        if companion is not None and placement.mesh.shape[AXIS] > 1:
            raise ValueError(
                f"{type(objective).__name__} runs a second model beside the first, and mesh.pipeline="
                f"{placement.mesh.shape[AXIS]} cuts one alone; use mesh.pipeline=1 and another axis, fsdp for instance"
            )
        if companion is not None and companion.learned_shapes:
            shapes, axes = shapes | {LEARNED: companion.learned_shapes}, axes | {LEARNED: companion.learned_axes}
        transformation = optimizer.build(axes, train.steps, growth=model.width_growth)
        kind: dict[str, Any] = {
            "precision": train.precision,
            "loss_scaling": train.loss_scaling,
            "ema": optimizer.ema is not None,
        }
        unplaced = jax.eval_shape(lambda params: new_state(params, transformation, **kind), shapes)
        layout = Layout.of(unplaced, axes, placement, offload_optimizer=train.offload_optimizer)

        def drawn(key: jax.Array) -> Params:
            brought = {LEARNED: companion.draw(key)} if companion is not None and companion.learned_shapes else {}
            return draw(model.build, key) | brought

        def optimizer_of(scalars: dict[str, Any]) -> optax.GradientTransformation:
            return optimizer.with_scalars(scalars).build(axes, train.steps, growth=model.width_growth)

        where = batch_shardings(batch, placement)
        settings: dict[str, Any] = {
            "accumulation": train.accumulation,
            "precision": train.precision,
            "placement": placement,
            "layout": layout,
            "where": where,
            "companion": companion,
        }
        frozen = _frozen(companion, train, placement)
        step = train_step(
            graphdef,
            objective,
            optimizer_of,
            ema_decay=optimizer.ema,
            gradients_by_layer=train.log_gradients == "layers",
            **settings,
        )
        evaluation = evaluate_step(graphdef, objective, **settings)
        return cls(
            model=model,
            graphdef=graphdef,
            placement=placement,
            state=abstract(unplaced, layout.state),
            batch={
                name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where[name])
                for name, array in batch.items()
            },
            scalars=Scalars.of(optimizer, train.seed, frozen),
            seed=train.seed,
            step=jitted(step, layout=layout, where=(where, _beside(layout.state.step, frozen))),
            evaluation=jitted_evaluation(evaluation, layout=layout, where=(where, _where(frozen))),
            traced_step=step,
            traced_evaluate=evaluation,
            parameters=drawn,
            draw=make_initialise(drawn, transformation, layout=layout.state, **kind),
            begin=jax.jit(lambda params: new_state(params, transformation, **kind), out_shardings=layout.state),
            companion=companion,
        )

    @property
    def train_step(self) -> "TrainStep":
        """(state, batch) -> (state, metrics)."""
        return TrainStep(self)

    @property
    def evaluate_step(self) -> "EvaluateStep":
        """(params, batch) -> sums."""
        return EvaluateStep(self.evaluation, lambda: self.frozen)

    @functools.cached_property
    def frozen(self) -> Any:
        """The arrays that the objective brings along, on the devices: read at the first use."""
        if self.companion is None:
            return {}
        return self.companion.frozen(self.scalars.frozen)

    def initialise(self, weights: Weights | None = None) -> TrainState:
        """The state before the first step, with fresh weights or given ones."""
        key = jax.random.key(self.seed)
        if weights is None:
            return self.draw(key)
        shapes: Any = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self.state.params)
        given = weights(apart(shapes)[0])
        where: Any = jax.tree.map(lambda x: x.sharding, self.state.params)
        if absent := [name for name in shapes if name not in given]:

            def missing(key: jax.Array) -> Params:
                params = self.parameters(key)
                return {name: params[name] for name in absent}

            given = given | jax.jit(missing, out_shardings={name: where[name] for name in absent})(key)
        return self.begin(jax.tree.map(place, given, where))

    def compiled(self) -> "Program":
        """The same with both steps compiled."""
        if isinstance(self.step, jax.stages.Compiled):
            return self
        step = self.step.lower(self.state, self.batch, self.scalars).compile()
        evaluation = self.evaluation.lower(self.state.params, self.batch, self.scalars.frozen).compile()
        return dataclasses.replace(self, step=step, evaluation=evaluation)

    def finished(self, params: Params) -> Any:
        """The model of a state's parameters."""
        return merge(self.graphdef, apart(params)[0])

    @functools.cached_property
    def places(self) -> Int64[np.ndarray, " rows"]:
        """Places in the batch of the rows that this process's devices need, ascending: all of them where there is one
        process; where devices of several processes share a row's matrices, each of the processes has that row."""
        needed = np.zeros(next(iter(self.batch.values())).shape[0], bool)
        for kind in self.batch.values():
            for index in kind.sharding.addressable_devices_indices_map(kind.shape).values():
                assert index is not None, "a batch is on devices"
                needed[index[0]] = True
        return np.flatnonzero(needed).astype(np.int64)

    def place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        """The global batch on the devices; `batch` has the rows at this process's `places`."""

        def one(kind: jax.ShapeDtypeStruct, rows: np.ndarray) -> jax.Array:
            def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
                assert index is not None, "a batch is on devices"
                first, last, _ = index[0].indices(kind.shape[0])
                here = slice(*np.searchsorted(self.places, (first, last)))
                return rows[here, *index[1:]]

            return jax.make_array_from_callback(kind.shape, kind.sharding, of_device, dtype=kind.dtype)

        return {name: one(kind, np.asarray(batch[name])) for name, kind in self.batch.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the arrays of a batch."""
        return {name: kind.shape for name, kind in self.batch.items()}

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return num_parameters(apart(self.state.params)[0])


@dataclass(frozen=True, eq=False)
class TrainStep:
    """A step with its scalars, and what the objective brings along: read at the first call."""

    program: Program

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        program = self.program
        return program.step(state, batch, dataclasses.replace(program.scalars, frozen=program.frozen))

    def lower(self, state: TrainState, batch: Mapping[str, Any]) -> Any:
        """For these arrays or shapes, if it is not compiled."""
        return self.program.step.lower(state, batch, self.program.scalars)


@dataclass(frozen=True, eq=False)
class EvaluateStep:
    """An evaluation with what the objective brings along."""

    evaluation: Any
    """(params, batch, frozen) -> sums, jitted or compiled."""
    frozen: Callable[[], Any]
    """Gives the arrays."""

    def __call__(self, params: Params, batch: Batch) -> LossParts:
        return self.evaluation(params, batch, self.frozen())


class Programs:
    """Programs that this process has compiled, for runs that differ in scalars only (learning rate, weight decay,
    seed): they are compiled once.

    Args:
        keep: how many; those used longest ago are forgotten.
    """

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        # A list, for configs are compared and need not be hashable; and it is short.
        self._compiled: list[tuple[tuple[Any, ...], Program]] = []

    def build(
        self,
        model: "ModelConfig",
        objective: Objective,
        optimizer: Optimizer,
        placement: Placement,
        train: Train,
        batch: Mapping[str, np.ndarray],
    ) -> Program:
        """As `Program.build`, compiled already where an equal one was kept."""
        key = _what_is_compiled(model, objective, optimizer, placement, train, batch)
        for number, (known, program) in enumerate(self._compiled):
            if known == key:
                self._compiled.append(self._compiled.pop(number))
                companion, frozen = objective.companion(model), program.scalars.frozen
                scalars = Scalars.of(optimizer, train.seed, frozen)
                return dataclasses.replace(program, scalars=scalars, seed=train.seed, companion=companion)
        return Program.build(model, objective, optimizer, placement, train, batch)

    def add(self, program: Program, objective: Objective, optimizer: Optimizer, train: Train) -> None:
        """Keeps a compiled program that was built of these."""
        key = _what_is_compiled(program.model, objective, optimizer, program.placement, train, program.batch)
        if all(known != key for known, _ in self._compiled):
            self._compiled = [*self._compiled[-self._keep + 1 :], (key, program)]


def _what_is_compiled(
    model: Any,
    objective: Objective,
    optimizer: Optimizer,
    placement: Placement,
    train: Train,
    batch: Mapping[str, Any],
) -> tuple[Any, ...]:
    """Everything that a program depends on but the scalars."""
    shapes = {name: (tuple(array.shape), np.dtype(array.dtype)) for name, array in batch.items()}
    rule = optimizer.with_scalars(dict.fromkeys(optimizer.scalars(), 1.0))
    settings = (
        train.steps,
        train.accumulation,
        train.precision,
        train.loss_scaling,
        train.log_gradients,
        train.offload_optimizer,
    )
    return model, objective, rule, placement, settings, shapes


def chunk(
    num_rows: int, vocab_size: int | None, platform: str, rules: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> int:
    """Positions of every row whose scores fit every device well.

    Args:
        num_rows: of a batch, or of a part that is accumulated, over all devices.
        vocab_size: of the model; None for one that scores no tokens.
        platform: of the devices.
        rules: logical axis name to mesh axes.
        sizes: devices of the mesh axes.
    """

    def ways(name: str) -> int:
        return math.prod(sizes[axis] for axis in rules.get(name, ()))

    entries = -(-(vocab_size or 1) // ways("vocab"))
    return default_chunk(max(1, num_rows), entries, platform, sharers=ways("batch") * ways("sequence"))


def _frozen(companion: Companion | None, train: Train, placement: Placement) -> Any:
    """Shapes, types and shardings of what never changes: in the precision of the arithmetic, as nothing is added to it
    that a shorter type would round away."""
    if companion is None:
        return {}
    shapes = jax.eval_shape(lambda tree: cast(tree, train.precision), companion.frozen_shapes)
    where = placement.of_params.shardings(companion.frozen_axes, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)


def _where(frozen: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, frozen)


def _beside(everywhere: Any, frozen: Any) -> Any:
    """Where the scalars of a step are."""
    return Scalars(key=everywhere, optimizer=everywhere, frozen=_where(frozen))


def place(array: jax.Array | np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, laid out over the devices of all."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
