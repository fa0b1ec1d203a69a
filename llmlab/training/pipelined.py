"""A model taken apart for the pipeline: what comes before its layers, the layers, and what comes after.

Nothing in a model or an objective knows of pipelines. The objective's loss is traced with its stack of layers cut out
(llmlab.nn.stack.cut_by), twice:

    before   up to the stack: embedding, masks, positions. It gives the stack's input and its context.
    after    from the stack's output on: layers beyond the last whole repeat, final norm, head, loss.

`before` gives the first stage its input, and all stages the context, which each computes for itself: masks and
positions. Where the context takes parameters, or another stack of layers that runs first (the encoder of an
encoder-decoder, the tower of a vision-language model), `before` is computed beforehand for all parts of the batch at
once, the parts spread over the stages. The last stack that the loss calls is the one that is cut out.

The parts of the pipeline are those of `train.accumulation`: rows, dropout keys and sums are the same as without a
pipeline, only when they are computed differs. Repeats of the layers are shared out evenly; where they do not divide,
the last stages have fewer, and wait for the first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import Array, Float, Int, Key, PyTree

from llmlab.nn.config import Context
from llmlab.nn.module import Axes, Params, merge, native_keys
from llmlab.nn.stack import Repeats, Stack, cut_by
from llmlab.objectives import Batch, LossParts, Objective
from llmlab.sharding import Placement
from llmlab.sharding.pipeline import AXIS, Inputs, Work, loss, loss_and_gradients
from llmlab.sharding.schedule import Schedule
from llmlab.training.precision import Precision, cast


@dataclass(frozen=True)
class Anatomy:
    """Where a model is cut."""

    path: tuple[str, ...]
    """Of the parameters of the stack's blocks."""
    repeats: Repeats
    """The stack, apart from its parameters."""
    calls: int
    """Stacks that run before it."""
    beforehand: bool
    """Whether what comes before it is computed for all parts at once: it is no lookup, or its context takes parameters.
    """


@dataclass(frozen=True)
class Pipelined:
    """The loss of a batch, and its gradient, by a pipeline."""

    graphdef: Any
    objective: Objective
    axes: Axes
    """Logical names of the parameters' dimensions."""
    placement: Placement
    """Its mesh has a pipeline axis of several devices."""
    precision: Precision

    @classmethod
    def of(
        cls, graphdef: Any, objective: Objective, axes: Axes, placement: Placement | None, precision: Precision
    ) -> "Pipelined | None":
        """None where the layers are not spread over devices."""
        if placement is None or placement.mesh.shape[AXIS] == 1:
            return None
        return cls(graphdef, objective, axes, placement, precision)

    def loss(self, params: Params, parts: PyTree) -> LossParts:
        """Sums over all parts, which are arrays (M, rows, ...), without dropout."""
        work, inputs, schedule, _ = self._prepare(params, parts, None, 1.0)
        return loss(work, inputs, schedule, self.placement, remat=False)[1]

    def gradient(
        self, params: Params, parts: PyTree, keys: Key[Array, "M"], factor: Float[Array, ""] | float
    ) -> tuple[Params, LossParts]:
        """Gradient of `factor` times the sum of what is minimised, float32, and the sums over all parts.

        Args:
            params: float32.
            parts: of the batch, arrays (M, rows, ...).
            keys: of every part's dropout.
            factor: on the sum.
        """
        by_hand = self.placement.schedule == "1f1b"
        if by_hand:  # sums of gradients are float32 there whatever the parameters are
            params = cast(params, self.precision)
        work, inputs, schedule, cut = self._prepare(params, parts, keys, factor)
        if by_hand:
            place_shared, place_layers = self._places(cut)
            sums, gradients = loss_and_gradients(
                work, inputs, schedule, self.placement, place_shared=place_shared, place_layers=place_layers
            )[1:]
            d_shared, d_layers, d_given = gradients.shared, gradients.layers, gradients.given
        else:
            remat = cut.repeats.execution.remat != "none"

            def value(shared: Any, layers: Any, given: Any) -> Any:
                return loss(work, Inputs(shared, layers, given, inputs.fixed), schedule, self.placement, remat=remat)

            grad = jax.grad(value, argnums=(0, 1, 2), has_aux=True)
            (d_shared, d_layers, d_given), sums = grad(inputs.shared, inputs.layers, inputs.given)
        if cut.beforehand:
            d_shared = jax.tree.map(jnp.add, d_shared, self._pull_back(params, parts, keys, cut, d_given))
        d_blocks = jax.tree.map(lambda x: _brought_together(x, cut.repeats.num), d_layers)
        return jax.tree.map(lambda g: g.astype(jnp.float32), _with(d_shared, cut.path, d_blocks)), sums

    def anatomy(self, params: PyTree, part: PyTree, key: Any) -> Anatomy:
        """Where the loss is cut; arguments are shapes or arrays.

        Raises:
            ValueError: the loss runs no stack, or the last one several times.
        """
        called: list[tuple[tuple[str, ...], Repeats]] = []

        def trace(params: Any, part: Any, key: Any) -> jax.Array:
            model = merge(self.graphdef, params)
            paths = {id(node): tuple(map(str, path)) for path, node in nnx.iter_graph(model) if isinstance(node, Stack)}

            def record(stack: Stack, *_: Any) -> None:
                called.append((paths[id(stack)], stack.repeats))

            with cut_by(record):
                return self.objective.loss(model, part, key=key).total

        jax.eval_shape(trace, params, part, key)
        names = [path for path, _ in called]
        if not called or names.count(names[-1]) > 1:
            raise ValueError(
                "mesh.pipeline cannot split this model: its loss runs "
                f"{'the same stack of layers twice' if called else 'no stack of layers that could be cut out'}; use "
                "mesh.pipeline=1 and another axis, fsdp for instance"
            )
        path, repeats = called[-1]
        cut = Anatomy((*path, "blocks"), repeats, len(called) - 1, beforehand=len(called) > 1)
        shared, blocks = map(_shapes, _without(params, cut.path))
        of_part = _Parts(self, cut, shared, blocks, 1)
        return cut if cut.beforehand else replace(cut, beforehand=of_part.context_takes_parameters(part, key))

    def _prepare(self, params: Params, parts: Any, keys: Any, factor: Any) -> tuple[Work, Inputs, Schedule, Anatomy]:
        one, key = jax.tree.map(lambda x: x[0], (parts, keys))
        cut = self.anatomy(params, one, key)
        count = jax.tree.leaves(parts)[0].shape[0]
        schedule = Schedule(stages=self.placement.mesh.shape[AXIS], parts=count, interleave=self.placement.interleave)
        chunks = schedule.stages * schedule.interleave
        if chunks > cut.repeats.num:
            raise ValueError(
                f"mesh.pipeline={schedule.stages} x mesh.interleave={schedule.interleave} is more than the "
                f"{cut.repeats.num} repeats of the model's layers; use at most {cut.repeats.num} in all"
            )
        shared, blocks = _without(params, cut.path)
        given, others = _floats(self._beforehand(shared, blocks, parts, keys, cut)) if cut.beforehand else ({}, {})
        fixed = (parts, keys, others, jnp.broadcast_to(jnp.asarray(factor, jnp.float32), (count,)))
        layers = jax.tree.map(lambda x: _shared_out(x, schedule), blocks)
        work = _Parts(self, cut, _shapes(shared), _shapes(blocks), chunks).work
        return work, Inputs(shared, layers, given, fixed), schedule, cut

    def _beforehand(self, shared: Params, blocks: Any, parts: Any, keys: Any, cut: Anatomy) -> Any:
        """What comes before the stack for all parts, (M, ...), the parts spread over the stages."""
        of_part = _Parts(self, cut, _shapes(shared), _shapes(blocks), 1)
        spread = jax.tree.leaves(parts)[0].shape[0] % self.placement.mesh.shape[AXIS] == 0
        every = jax.vmap(lambda part, key: of_part.reach(shared, part, key), spmd_axis_name=AXIS if spread else None)
        return every(parts, keys)

    def _pull_back(self, params: Params, parts: Any, keys: Any, cut: Anatomy, d_given: Any) -> Any:
        """Gradient of the parameters that what comes before the stack depends on."""
        shared, blocks = _without(params, cut.path)
        _, pull = jax.vjp(lambda shared: _floats(self._beforehand(shared, blocks, parts, keys, cut))[0], shared)
        return pull(d_given)[0]

    def _places(self, cut: Anatomy) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """What places gradients of the shared parameters, and of a stage's layers (v, layers of a chunk, ...)."""
        shared_axes, layer_axes = _without(self.axes, cut.path)
        where = self.placement.of_gradients

        def place(axes: Any, tree: Any, *extra: None) -> Any:
            def one(names: tuple[str, ...], x: jax.Array) -> jax.Array:
                return jax.lax.with_sharding_constraint(x, where.sharding((*extra, *names), x.shape))

            return jax.tree.map(one, axes, tree, is_leaf=lambda node: isinstance(node, tuple))

        return lambda shared: place(shared_axes, shared), lambda layers: place(layer_axes, layers, None)


@dataclass(frozen=True)
class _Parts:
    """The three parts of a model, as functions of a part of the batch."""

    pipelined: Pipelined
    cut: Anatomy
    shared: Any
    """Shapes of the shared parameters."""
    blocks: Any
    """Shapes of the layers' parameters."""
    chunks: int
    """Into which the layers are cut."""

    @property
    def work(self) -> Work:
        return Work(enter=self.enter, chunk=self.chunk, leave=self.leave)

    @property
    def size(self) -> int:
        """Repeats in a chunk."""
        return -(-self.cut.repeats.num // self.chunks)

    def model(self, shared: Params) -> Any:
        """The model, with stand-ins for the layers, which are not looked at."""
        whole = _with(cast(shared, self.pipelined.precision), self.cut.path, self.blocks)
        return merge(self.pipelined.graphdef, whole)

    def reach(self, shared: Params, part: Batch, key: Any) -> tuple[jax.Array, Context, Any]:
        """The stack's input, its context and its key."""
        calls = 0

        def stop(stack: Stack, x_BSD: jax.Array, context: Context, key: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > self.cut.calls:
                raise _Reached(x_BSD, context, key)

        try:
            with cut_by(stop):
                self.pipelined.objective.loss(self.model(shared), part, key=key)
        except _Reached as reached:
            return reached.x_BSD, reached.context, reached.key
        raise AssertionError("the stack was not reached, and has been before")

    def context_takes_parameters(self, part: PyTree, key: Any) -> bool:
        """Whether the stack's context depends on any."""
        jaxpr = jax.make_jaxpr(lambda shared: self.reach(shared, part, key)[1:])(self.shared).jaxpr
        return any(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])

    def before(self, shared: Params, given: Any, fixed: Any) -> tuple[jax.Array, Context, Any]:
        part, key, others, _ = fixed
        if not self.cut.beforehand:
            return self.reach(shared, part, key)
        structure = jax.tree.structure(jax.eval_shape(lambda: self.reach(shared, part, key)))
        leaves = given | others
        return jax.tree.unflatten(structure, [leaves[str(i)] for i in range(len(leaves))])

    def enter(self, shared: Params, given: Any, fixed: Any) -> Any:
        x_BSD, context, key = self.before(shared, given, fixed)
        return x_BSD, self.no_reports(x_BSD, context, key)

    def chunk(self, given: Any, fixed: Any, layers: Any, x: Any, place: Int[Array, ""]) -> Any:
        # The context does not depend on these parameters, or is given.
        shared = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shared)
        _, context, key = self.before(shared, given, fixed)
        first = place * self.size
        layers = _listed(cast(layers, self.pipelined.precision))
        y_BSD, reports = self.cut.repeats(layers, x[0], context, key, first)

        def put(everything: jax.Array, mine: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(everything, mine, first, 0)

        return y_BSD, jax.tree.map(put, x[1], reports)

    def leave(self, shared: Params, given: Any, fixed: Any, y: Any) -> tuple[jax.Array, LossParts]:
        part, key, _, factor = fixed
        calls = 0

        def give(stack: Stack, *_: Any) -> Any:
            nonlocal calls
            calls += 1
            return (y[0], jax.tree.map(lambda x: x[: self.cut.repeats.num], y[1])) if calls > self.cut.calls else None

        with cut_by(give):
            sums = self.pipelined.objective.loss(self.model(shared), part, key=key)
        return sums.total * factor, sums

    def no_reports(self, x_BSD: jax.Array, context: Context, key: Any) -> Any:
        """Room for the reports of all layers."""
        one = jax.tree.map(lambda x: jnp.zeros((1, *x.shape[1:]), x.dtype), self.blocks)
        params, first = _listed(cast(one, self.pipelined.precision)), jnp.zeros((), jnp.int32)
        shapes = jax.eval_shape(lambda: self.cut.repeats(params, x_BSD, context, key, first)[1])
        return jax.tree.map(lambda x: jnp.zeros((self.size * self.chunks, *x.shape[1:]), x.dtype), shapes)


class _Reached(Exception):
    """The stack was reached: what comes after need not be traced."""

    def __init__(self, x_BSD: jax.Array, context: Context, key: Any) -> None:
        super().__init__()
        self.x_BSD, self.context, self.key = x_BSD, context, key


def _shared_out(x: Array, schedule: Schedule) -> Array:
    """Layers (L, ...) as (S, v, layers of a chunk, ...): chunk c of stage s holds the chunk c S + s of them all."""
    size = -(-x.shape[0] // (schedule.stages * schedule.interleave))
    missing = size * schedule.stages * schedule.interleave - x.shape[0]
    x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
    return x.reshape(schedule.interleave, schedule.stages, size, *x.shape[1:]).swapaxes(0, 1)


def _brought_together(x: Array, num: int) -> Array:
    """The inverse of `_shared_out`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[:num]


def _listed(layers: Any) -> list[Any]:
    """Parameters of a pattern's blocks, in its order."""
    return [native_keys(layers[name]) for name in sorted(layers, key=int)]


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _floats(tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leaves that have a gradient and leaves that have none, by their number."""
    numbered = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}
    floats = {i: leaf for i, leaf in numbered.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    return floats, {i: leaf for i, leaf in numbered.items() if i not in floats}


def _without(tree: Any, path: tuple[str, ...]) -> tuple[Any, Any]:
    """A nested dict without what is at a path, and that."""
    first, *rest = path
    if not rest:
        return {name: value for name, value in tree.items() if name != first}, tree[first]
    inner, found = _without(tree[first], tuple(rest))
    return {**tree, first: inner}, found


def _with(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """The inverse of `_without`."""
    first, *rest = path
    return {**tree, first: _with(tree[first], tuple(rest), value) if rest else value}
