"""The train step: a batch and the state in, the next state and a few numbers out. Compiled once, state donated.

    loss = (sum over counted tokens of the whole batch) / (number of counted tokens of the whole batch)

Both sums run over every device and every accumulation part, so the gradient does not depend on how the batch was cut:
a mean of the parts' means would give tokens of short parts more weight (a bug that several frameworks shipped).

    accumulation   the batch is computed in parts, one after the other: activations of one part in memory at a time;
                   with a pipeline, one behind the other (llmlab.training.pipelined)
    precision      parameters are cast once, at the top of the differentiated function; float16 also scales the loss
    dropout        the key depends on (seed, step, part) and on nothing else, so layouts and resumption cannot change it
    placement      shardings come from logical axis names; without one everything lives on the default device
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from llmlab.nn.module import Params, merge
from llmlab.objectives import Batch, LossParts, Objective
from llmlab.objectives.companion import Companion, apart
from llmlab.optim import Optimizer
from llmlab.optim import transformation as optim
from llmlab.sharding import Placement, activate
from llmlab.training.gradients import norms_by_layer
from llmlab.training.pipelined import Pipelined
from llmlab.training.precision import Precision, cast
from llmlab.training.state import Layout, TrainState

Metrics = dict[str, Float[Array, ""]]
BatchShardings = dict[str, NamedSharding]

# fold_in constant that separates dropout from initialisation, which uses the seed's key itself.
_DROPOUT_KEY = 0xD20
# fold_in constant that separates what a model writes for itself from the parts' dropout, which fold in their number.
_REWRITING_KEY = 0x3E71E


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Scalars:
    """What a compiled step takes besides the state and the batch: runs that differ in nothing else share a program."""

    key: Any
    """Data of the key of dropout, two uint32."""
    optimizer: dict[str, Any]
    """Of `Optimizer.scalars`, as float32."""
    frozen: Any = dataclasses.field(default_factory=dict)
    """Arrays that the objective brings along, or their shapes; see llmlab.objectives.companion."""

    @classmethod
    def of(cls, optimizer: Optimizer, seed: int, frozen: Any = None) -> "Scalars":
        """As NumPy arrays, which every process has alike."""
        optimizer_scalars = {name: np.float32(value) for name, value in optimizer.scalars().items()}
        return cls(key=_dropout_key(seed), optimizer=optimizer_scalars, frozen=frozen or {})


def _dropout_key(seed: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.fold_in(jax.random.key(seed), _DROPOUT_KEY)))


def make_train_step(
    graphdef: Any, objective: Objective, optimizer: optax.GradientTransformation, *, seed: int = 0, **settings: Any
) -> Any:
    """The jitted step of one optimizer and one seed of dropout, `(state, batch) -> (state, metrics)`; the state that
    goes in is given up. Other arguments as for `train_step`."""
    scalars = Scalars(key=_dropout_key(seed), optimizer={})
    step = train_step(graphdef, objective, lambda _: optimizer, **settings)
    return jitted(
        lambda state, batch: step(state, batch, scalars),
        layout=settings.get("layout"),
        where=(settings.get("where"),),
    )


def jitted(step: Callable[..., tuple[TrainState, Metrics]], *, layout: Layout | None, where: tuple[Any, ...]) -> Any:
    """A step compiled on its first call, the state that goes in given up; `where` places its other arguments."""
    if layout is None:
        return jax.jit(step, donate_argnums=0)
    everywhere = layout.state.step  # the metrics, so that every process can read them
    return jax.jit(
        step, donate_argnums=0, in_shardings=(layout.state, *where), out_shardings=(layout.state, everywhere)
    )


def train_step(
    graphdef: Any,
    objective: Objective,
    optimizer: Callable[[dict[str, Any]], optax.GradientTransformation],
    *,
    accumulation: int = 1,
    precision: Precision = "float32",
    ema_decay: float | None = None,
    gradients_by_layer: bool = False,
    placement: Placement | None = None,
    layout: Layout | None = None,
    where: BatchShardings | None = None,
    companion: Companion | None = None,
) -> Callable[[TrainState, Batch, Scalars], tuple[TrainState, Metrics]]:
    """The step as a function to be traced, `(state, batch, scalars) -> (state, metrics)`.

    Args:
        graphdef: of the model, from `llmlab.nn.module.split`.
        objective: gives sums over a batch.
        optimizer: the transformation, `Optimizer.build`'s, for values of the scalars.
        accumulation: parts of the batch, which it must divide.
        precision: of the arithmetic.
        ema_decay: of the average of the parameters, which the state must then have; None keeps none.
        gradients_by_layer: whether the metrics have the norms of `llmlab.training.gradients` too.
        placement: devices and rules, together with `layout` and `where`; None for the default device.
        layout: where the state is, from `Layout.of`.
        where: where the batch is, from `batch_shardings`.
        companion: what the objective brings along.

    Metrics: "train/loss" (nats per counted token; further sums of the objective likewise), "gradient_norm" (before
    clipping), "learning_rate"; in float16 "loss_scale" and "skipped", 1 where the gradients were not finite and
    parameters and optimizer state were left as they were.
    """

    pipeline = Pipelined.of(graphdef, objective, layout.axes if layout else {}, placement, precision)

    def gradients(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[Params, LossParts]:
        key = jax.random.fold_in(jax.random.wrap_key_data(scalars.key), state.step)
        model, bound = _bound(graphdef, objective, companion, cast(state.params, precision), scalars.frozen, state.step)
        batch = bound.prepare(bound.rewritten(model, batch, jax.random.fold_in(key, _REWRITING_KEY)))
        count = bound.count(batch)
        per_token = 1.0 / jnp.where(count > 0, count, 1.0)  # a batch without a counted token has zero gradient
        scale = 1.0 if state.loss_scale is None else state.loss_scale.scale

        def loss(params: Params, part: Batch, number: jax.Array | int) -> tuple[jax.Array, LossParts]:
            params = cast(params, precision)
            model, bound = _bound(graphdef, objective, companion, params, scalars.frozen, state.step)
            parts = bound.loss(model, part, key=jax.random.fold_in(key, number))
            return parts.total * (per_token * scale), parts

        def one_part(part: Batch, number: jax.Array | int) -> tuple[Params, LossParts]:
            gradient, parts = jax.grad(loss, has_aux=True)(state.params, part, number)
            return _placed(gradient, None if layout is None else layout.gradients), parts

        if layout is not None and pipeline is not None:
            keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(accumulation))
            gradient, parts = pipeline.gradient(state.params, _cut(batch, accumulation), keys, per_token * scale)
            gradient = _placed(gradient, layout.gradients)
        else:
            gradient, parts = _sum_over_parts(one_part, batch, accumulation)
        if state.loss_scale is not None:
            gradient = jax.tree.map(lambda g: g / scale, gradient)
        return _masked(gradient, bound.unfrozen(gradient)), parts

    def step(state: TrainState, batch: Batch, scalars: Scalars) -> tuple[TrainState, Metrics]:
        with activate(placement):
            gradient, parts = gradients(state, batch, scalars)
        # The update is computed where the optimizer's state is, which under ZeRO is not where parameters are.
        update = None if layout is None else layout.update
        optimizer_state: Any = state.optimizer_state
        if layout is not None and layout.optimizer is not None:
            optimizer_state = jax.device_put(optimizer_state, layout.optimizer)
            state = dataclasses.replace(state, optimizer_state=optimizer_state)
        by_layer = norms_by_layer(gradient) if gradients_by_layer else {}
        gradient, old = _placed(gradient, update), _placed(state.params, update)
        updates, optimizer_state = optimizer(scalars.optimizer).update(gradient, optimizer_state, old)
        if companion is not None:  # a parameter without gradient is still decayed, and carried on by its momentum
            updates = _masked(updates, companion.bind({}, {}, state.step).unfrozen(updates))
        params: Any = _placed(optax.apply_updates(old, updates), update)
        metrics = per_count(parts, "train") | optim.metrics(optimizer_state) | by_layer
        loss_scale = state.loss_scale
        if loss_scale is not None:
            finite = jnp.isfinite(metrics["gradient_norm"])
            params, optimizer_state = _choose(finite, (params, optimizer_state), (state.params, state.optimizer_state))
            metrics |= {"loss_scale": loss_scale.scale, "skipped": 1.0 - finite}
            loss_scale = loss_scale.after(finite)
        average = state.ema
        if ema_decay is not None and average is not None:
            average = optim.ema_update(average, params, ema_decay, state.step)
        return TrainState(
            step=state.step + 1,
            params=params,
            optimizer_state=optimizer_state,
            ema=average,
            loss_scale=loss_scale,
        ), metrics

    return step


def make_evaluate_step(graphdef: Any, objective: Objective, **settings: Any) -> Any:
    """The jitted evaluation of a batch, `(params, batch) -> LossParts`; arguments as for `evaluate_step`."""
    evaluate = evaluate_step(graphdef, objective, **settings)
    return jitted_evaluation(
        lambda params, batch: evaluate(params, batch, {}),
        layout=settings.get("layout"),
        where=(settings.get("where"),),
    )


def jitted_evaluation(evaluate: Callable[..., LossParts], *, layout: Layout | None, where: tuple[Any, ...]) -> Any:
    """An evaluation compiled on its first call; `where` places its arguments but the parameters."""
    if layout is None:
        return jax.jit(evaluate)
    return jax.jit(evaluate, in_shardings=(layout.state.params, *where), out_shardings=layout.state.step)


def evaluate_step(
    graphdef: Any,
    objective: Objective,
    *,
    accumulation: int = 1,
    precision: Precision = "float32",
    placement: Placement | None = None,
    layout: Layout | None = None,
    where: BatchShardings | None = None,
    companion: Companion | None = None,
) -> Callable[[Params, Batch, Any], LossParts]:
    """The evaluation of a batch as a function to be traced, `(params, batch, frozen) -> sums`: no dropout; arguments as
    for `train_step`."""

    pipeline = Pipelined.of(graphdef, objective, layout.axes if layout else {}, placement, precision)

    def evaluate(params: Params, batch: Batch, frozen: Any) -> LossParts:
        with activate(placement):
            model, bound = _bound(graphdef, objective, companion, cast(params, precision), frozen, None)
            batch = bound.prepare(batch)
            if pipeline is not None:
                return pipeline.loss(params, _cut(batch, accumulation))
            return _sum_over_parts(lambda part, _: bound.loss(model, part), batch, accumulation)

    return evaluate


def _bound(
    graphdef: Any, objective: Objective, companion: Companion | None, params: Params, frozen: Any, step: Any
) -> tuple[Any, Objective]:
    """The model of these parameters, and the objective with what it brings along."""
    own, learned = apart(params)
    return merge(graphdef, own), objective if companion is None else companion.bind(learned, frozen, step)


def _masked(tree: Any, factors: Any) -> Any:
    return tree if factors is None else jax.tree.map(lambda x, factor: x * factor, tree, factors)


def per_count(parts: LossParts, prefix: str) -> Metrics:
    """Sums as means over what is counted, named "<prefix>/<metric>"; the loss is the plain one where there is one."""
    sums = {"loss": parts.total} | parts.metrics
    counts = {name: parts.counts.get(name, parts.count) for name in sums}
    return {f"{prefix}/{name}": sums[name] / jnp.where(count > 0, count, 1.0) for name, count in counts.items()}


def batch_shardings(batch: Mapping[str, Any], placement: Placement) -> BatchShardings:
    """Where the arrays of a batch live, by name: rows split as activations are, and the positions of tokens too.

    Args:
        batch: arrays or shapes of the global batch, the batch dimension first. The second dimension of integers is
            taken for a sequence, and split where the sequence axis divides it.
        placement: devices and rules.
    """

    def one(array: Any) -> NamedSharding:
        is_tokens = len(array.shape) > 1 and jnp.issubdtype(array.dtype, jnp.integer)
        return placement.sharding(("batch", "sequence")[: 1 + is_tokens], array.shape)

    return {name: one(array) for name, array in batch.items()}


def _placed(tree: Any, where: Any) -> Any:
    return tree if where is None else jax.lax.with_sharding_constraint(tree, where)


def _choose(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _cut(batch: Batch, num_parts: int) -> Batch:
    """The batch in parts, (num_parts, rows, ...).

    Part i is the rows i, i + num_parts, ...: where rows are split over devices every part is split alike, and nothing
    moves. (Contiguous parts would live on a few devices each.)
    """

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // num_parts, num_parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, batch)


def _sum_over_parts(function: Callable[[Batch, jax.Array | int], Any], batch: Batch, num_parts: int) -> Any:
    """Sum of function(part, number) over the parts of a batch, computed one after the other."""
    if num_parts == 1:
        return function(batch, 0)
    parts = _cut(batch, num_parts)

    def add(total: Any, xs: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*xs)), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts), 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, jnp.arange(num_parts)))[0]
