"""What runs on the devices: the train step, the evaluation step and the initialisation of one experiment, laid out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Int64

from llmlab.nn.module import Params, num_parameters, split
from llmlab.objectives import Batch, Objective
from llmlab.optim import Optimizer
from llmlab.sharding import Placement
from llmlab.training.config import Train
from llmlab.training.state import Layout, TrainState, abstract, initialise, new_state
from llmlab.training.step import batch_shardings, make_evaluate_step, make_train_step

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
    train_step: Any
    """(state, batch) -> (state, metrics)."""
    evaluate_step: Any
    """(params, batch) -> sums."""
    initialise: Callable[[Weights | None], TrainState]
    """The state before the first step, with fresh weights or given ones."""

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
        nothing."""
        graphdef, shapes, axes = model.abstract()
        transformation = optimizer.build(axes, train.steps, growth=model.width_growth)
        kind: dict[str, Any] = {"precision": train.precision, "ema": optimizer.ema is not None}
        unplaced = jax.eval_shape(lambda params: new_state(params, transformation, **kind), shapes)
        layout = Layout.of(unplaced, axes, placement, offload_optimizer=train.offload_optimizer)
        params_layout: Any = layout.state.params

        def drawn(key: jax.Array) -> Params:
            return split(model.build(nnx.Rngs(params=key)))[1]

        def init(weights: Weights | None) -> TrainState:
            if weights is None:
                return initialise(drawn, transformation, seed=train.seed, layout=layout.state, **kind)
            given = weights(shapes)
            absent = [name for name in shapes if name not in given]

            def missing(key: jax.Array) -> Params:
                params = drawn(key)
                return {name: params[name] for name in absent}

            if absent:
                where_absent = {name: params_layout[name] for name in absent}
                given = given | jax.jit(missing, out_shardings=where_absent)(jax.random.key(train.seed))
            params = jax.tree.map(_put, given, params_layout)
            return jax.jit(lambda p: new_state(p, transformation, **kind), out_shardings=layout.state)(params)

        where = batch_shardings(batch, placement)
        settings: dict[str, Any] = {
            "accumulation": train.accumulation,
            "precision": train.precision,
            "placement": placement,
            "layout": layout,
            "where": where,
        }
        return cls(
            model=model,
            graphdef=graphdef,
            placement=placement,
            state=abstract(unplaced, layout.state),
            batch={
                name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where[name])
                for name, array in batch.items()
            },
            train_step=make_train_step(
                graphdef, objective, transformation, ema_decay=optimizer.ema, seed=train.seed, **settings
            ),
            evaluate_step=make_evaluate_step(graphdef, objective, **settings),
            initialise=init,
        )

    def compiled(self) -> "Program":
        """The same with both steps compiled."""
        train_step = self.train_step.lower(self.state, self.batch).compile()
        evaluate_step = self.evaluate_step.lower(self.state.params, self.batch).compile()
        return dataclasses.replace(self, train_step=train_step, evaluate_step=evaluate_step)

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
        return num_parameters(self.state.params)


def _put(array: jax.Array | np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """An array that every process has, laid out over the devices of all."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    host = np.asarray(array)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
