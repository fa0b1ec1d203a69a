"""A pipeline: layers spread over stages, parts of the batch going through them by a schedule.

The loop over ticks is one program for all devices. In a tick (llmlab.sharding.schedule says whose turn it is):

    enter    a part meets what comes before the layers, embedding above all
    chunk    every stage applies its layers to the part that it has: `shard_map` over the pipeline axis
    leave    a part that has left the last stage meets what comes after: norm, head, loss

In most pipelines the first stage holds the embedding and the last the head, which is the work of several layers: the
other stages wait for it in every tick, and the one has more to hold than its neighbours. Here both belong to all stages
together. What enters and what leaves is outside of the map, where the rules of placement hold as everywhere: the
vocabulary is split over the pipeline axis too, so every stage has a share of the table, of its optimizer state and of
every part's scores (Yeung et al. 2024, 2411.05288). The price is one part's activations summed over the stages twice a
tick.

Cost: M v + S - 1 ticks of a forward and a backward chunk; 1f1b computes every stage's forward pass twice. Memory, per
device and in units of a stage's input: 2 v S - 1 for 1f1b.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llmlab.sharding.rules import Placement
from llmlab.sharding.schedule import Schedule

AXIS = "pipeline"
Tree = Any


@dataclass(frozen=True)
class Work:
    """What is done to a part, of which `given` holds what a gradient is wanted of, and `fixed` all else.

    enter: (shared, given, fixed) -> x, before the first chunk.
    chunk: (given, fixed, layers, x, place) -> x, a chunk's layers; its place counts from the first layers.
    leave: (shared, given, fixed, x) -> (loss, sums), after the last chunk.
    """

    enter: Callable[..., Tree]
    chunk: Callable[..., Tree]
    leave: Callable[..., tuple[jax.Array, Tree]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """Arrays of a pipeline."""

    shared: Tree
    """Parameters for entering and leaving."""
    layers: Tree
    """Parameters of the layers, (S, v, layers of a chunk, ...)."""
    given: Tree
    """(M, ...) of floats."""
    fixed: Tree
    """(M, ...)."""

    def part(self, number: jax.Array | int) -> tuple[Tree, Tree]:
        """What is given of a part, and what is fixed."""
        return _take((self.given, self.fixed), number)


@dataclass(frozen=True)
class Gradients:
    """Of the loss, float32 where they are of parameters."""

    shared: Tree
    layers: Tree
    given: Tree


def loss(work: Work, inputs: Inputs, schedule: Schedule, placement: Placement, *, remat: bool) -> tuple[Any, Tree]:
    """Loss and sums over all parts, forward pass only; its gradient is the gpipe schedule.

    Args:
        work: what is done to a part.
        inputs: the arrays.
        schedule: stages and parts.
        placement: the mesh.
        remat: whether the backward pass computes a tick again from what entered it.
    """
    # A copy for each stage: a gradient of what all have in common would be summed over them in every tick.
    given = _copied(inputs.given, placement)

    def chunk(stage: jax.Array, mine: Tree, common: Tree) -> Tree:
        (layers, x, entering, given), (fixed, t) = mine, common
        unit = schedule.forward_unit(t, stage)
        x = _where(unit.place == 0, entering, x)
        y = work.chunk(*_take((given, fixed), unit.part), _take(layers, unit.chunk), x, unit.place)
        return y, _next(y, 1)

    def tick(carry: tuple[Tree, Tree], t: jax.Array) -> tuple[tuple[Tree, Tree], None]:
        x, sums = carry
        first, last = schedule.forward_unit(t, 0), schedule.forward_unit(t, schedule.stages - 1)
        entering = work.enter(inputs.shared, *inputs.part(first.part))
        mine = inputs.layers, x, _copied(entering, placement), given
        y, x = _on_stages(chunk, placement)(mine, (inputs.fixed, t))

        def leave() -> Tree:
            return work.leave(inputs.shared, *inputs.part(last.part), _last(y))

        leaving = last.real & (last.place == schedule.last)
        left = jax.lax.cond(leaving, leave, lambda: _zeros(leave))
        return (x, jax.tree.map(jnp.add, sums, left)), None

    first = inputs.part(0)
    x = _zeros(lambda: work.enter(inputs.shared, *first))
    sums = _zeros(lambda: work.leave(inputs.shared, *first, x))
    carry = (_copied(x, placement), sums)
    return jax.lax.scan(jax.checkpoint(tick) if remat else tick, carry, jnp.arange(schedule.ticks))[0][1]


def loss_and_gradients(
    work: Work,
    inputs: Inputs,
    schedule: Schedule,
    placement: Placement,
    *,
    place_shared: Callable[[Tree], Tree],
    place_layers: Callable[[Tree], Tree],
) -> tuple[jax.Array, Tree, Gradients]:
    """Loss, sums and gradients over all parts by the 1f1b schedule.

    Args:
        work: what is done to a part.
        inputs: the arrays.
        schedule: stages and parts.
        placement: the mesh.
        place_shared: places gradients of `shared` on the mesh.
        place_layers: places gradients of a stage's layers (v, layers of a chunk, ...) on its other axes.
    """
    run = _OneForwardOneBackward(work, inputs, schedule, placement, place_shared, place_layers)
    state, start, end = run.state(), schedule.delay, schedule.ticks
    for body, ticks in (
        (lambda state, t: run.forward(state, t)[0], range(start)),
        (run.both, range(start, end)),
        (lambda state, t: run.backward(state, _zeros_of_one_stage(state.backward), t), range(end, end + start)),
    ):
        state = jax.lax.scan(lambda state, t, body=body: (body(state, t), None), state, jnp.asarray(ticks))[0]
    gradients = Gradients(
        shared=state.d_shared,
        layers=state.d_layers,
        given=jax.tree.map(jnp.add, state.d_given, _summed(state.d_given_to_stages)),
    )
    return *state.sums, gradients


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What is carried from tick to tick. First dimension: stages, but in the last three."""

    forward: Tree
    """What came from the stage before."""
    backward: Tree
    """The gradient that came from the stage behind."""
    ring: Tree
    """Inputs of forward units whose backward units are still to come."""
    d_layers: Tree
    d_given_to_stages: Tree
    """By way of the chunks."""
    d_shared: Tree
    d_given: Tree
    """By way of entering and leaving."""
    sums: tuple[jax.Array, Tree]
    """Loss, and the sums."""


@dataclass(frozen=True)
class _OneForwardOneBackward:
    """The ticks of the 1f1b schedule."""

    work: Work
    inputs: Inputs
    schedule: Schedule
    placement: Placement
    place_shared: Callable[[Tree], Tree]
    place_layers: Callable[[Tree], Tree]

    @property
    def depth(self) -> int:
        """Places of the ring."""
        return 2 * self.schedule.interleave * self.schedule.stages - 1

    def state(self) -> _State:
        """Before the first tick."""
        inputs, first = self.inputs, self.inputs.part(0)
        x = _zeros(lambda: self.work.enter(inputs.shared, *first))
        sums = _zeros(lambda: self.work.leave(inputs.shared, *first, x))
        ring = jax.tree.map(lambda x: jnp.zeros((self.depth, *x.shape), x.dtype), x)
        d_given = jax.tree.map(jnp.zeros_like, inputs.given)
        copied = _copied((x, x, ring, d_given), self.placement)
        return _State(
            forward=copied[0],
            backward=copied[1],
            ring=copied[2],
            d_layers=_float32_zeros(inputs.layers),
            d_given_to_stages=copied[3],
            d_shared=self.place_shared(_float32_zeros(inputs.shared)),
            d_given=d_given,
            sums=sums,
        )

    def forward(self, state: _State, t: jax.Array) -> tuple[_State, Tree]:
        """Every stage's forward unit; and what its layers gave."""
        entering = self.work.enter(self.inputs.shared, *self.inputs.part(self.schedule.forward_unit(t, 0).part))
        mine = self.inputs.layers, state.ring, state.forward
        common = self.inputs.given, self.inputs.fixed, entering, t
        ring, y, forward = _on_stages(self._forward_chunk, self.placement)(mine, common)
        return replace(state, ring=ring, forward=forward), y

    def both(self, state: _State, t: jax.Array) -> _State:
        """A forward unit and a backward unit; what leaves the last stage in the one begins the other."""
        state, y = self.forward(state, t)
        unit = self.schedule.backward_unit(t, self.schedule.stages - 1)

        def leave() -> tuple[_State, Tree]:
            return self._leave(state, _last(y), unit.part)

        if self.schedule.interleave == 1:  # a part leaves in each of these ticks
            state, d_leaving = leave()
        else:
            leaving = unit.real & (unit.place == self.schedule.last)
            state, d_leaving = jax.lax.cond(leaving, leave, lambda: (state, _zeros_of_one_stage(y)))
        return self.backward(state, d_leaving, t)

    def backward(self, state: _State, d_leaving: Tree, t: jax.Array) -> _State:
        """Every stage's backward unit; `d_leaving` is the gradient of what has left the last one."""
        mine = self.inputs.layers, state.ring, state.backward, (state.d_layers, state.d_given_to_stages)
        common = self.inputs.given, self.inputs.fixed, d_leaving, t
        totals, backward, d_entering = _on_stages(self._backward_chunk, self.placement)(mine, common)
        part = self.schedule.backward_unit(t, 0).part
        of_part, of_all = self.inputs.part(part)
        _, pull = jax.vjp(lambda *given: self.work.enter(*given, of_all), self.inputs.shared, of_part)
        d_shared, d_given = pull(_summed(d_entering))
        return replace(
            state,
            backward=backward,
            d_layers=totals[0],
            d_given_to_stages=totals[1],
            d_shared=self.place_shared(_add(state.d_shared, d_shared)),
            d_given=_add_at(state.d_given, part, d_given),
        )

    def _forward_chunk(self, stage: jax.Array, mine: Tree, common: Tree) -> Tree:
        (layers, ring, x), (given, fixed, entering, t) = mine, common
        unit = self.schedule.forward_unit(t, stage)
        x = _where(unit.place == 0, entering, x)
        # No mask: what is computed in vain never meets a place of the ring that is in use.
        ring = _put(ring, jnp.mod(unit.number, self.depth), x)
        y = self.work.chunk(*_take((given, fixed), unit.part), _take(layers, unit.chunk), x, unit.place)
        return ring, y, _next(y, 1)

    def _backward_chunk(self, stage: jax.Array, mine: Tree, common: Tree) -> Tree:
        (layers, ring, dy, (d_layers, d_given)), (given, fixed, d_leaving, t) = mine, common
        unit = self.schedule.backward_unit(t, stage)
        of_part, of_all = _take((given, fixed), unit.part)

        def chunk(of_part: Tree, layers: Tree, x: Tree) -> Tree:
            return self.work.chunk(of_part, of_all, layers, x, unit.place)

        x = _take(ring, jnp.mod(unit.number, self.depth))
        _, pull = jax.vjp(chunk, of_part, _take(layers, unit.chunk), x)
        dy = _where(unit.place == self.schedule.last, d_leaving, dy)
        more_given, more_layers, dx = pull(_masked(unit.real, dy))
        d_layers = self.place_layers(_add_at(d_layers, unit.chunk, more_layers))
        d_given = _add_at(d_given, unit.part, more_given)
        return (d_layers, d_given), _next(dx, -1), _masked(unit.real & (unit.place == 0), dx)

    def _leave(self, state: _State, y: Tree, part: jax.Array) -> tuple[_State, Tree]:
        """The loss of a part that has left the last stage, its sums and gradients added; the gradient of its output."""
        of_part, of_all = self.inputs.part(part)

        def value(shared: Tree, of_part: Tree, y: Tree) -> tuple[jax.Array, Tree]:
            loss, sums = self.work.leave(shared, of_part, of_all, y)
            return loss, (loss, sums)

        grad = jax.grad(value, argnums=(0, 1, 2), has_aux=True)
        (d_shared, d_given, dy), sums = grad(self.inputs.shared, of_part, y)
        return replace(
            state,
            sums=jax.tree.map(jnp.add, state.sums, sums),
            d_shared=self.place_shared(_add(state.d_shared, d_shared)),
            d_given=_add_at(state.d_given, part, d_given),
        ), dy


def _on_stages(function: Callable[..., Tree], placement: Placement) -> Callable[..., Tree]:
    """function(stage, mine, common) on every stage, `mine` and the result having a first dimension of stages outside;
    axes of the mesh but the pipeline's stay with the compiler."""

    def one(mine: Tree, common: Tree) -> Tree:
        result = function(jax.lax.axis_index(AXIS), jax.tree.map(lambda x: x[0], mine), common)
        return jax.tree.map(lambda x: x[None], result)

    return jax.shard_map(
        one,
        mesh=placement.mesh,
        in_specs=(PartitionSpec(AXIS), PartitionSpec()),
        out_specs=PartitionSpec(AXIS),
        axis_names={AXIS},
        check_vma=False,  # maps inside (experts, attention) do not say how their outputs vary
    )


def _copied(tree: Tree, placement: Placement) -> Tree:
    """One for each stage, and on it."""

    def one(x: jax.Array) -> jax.Array:
        copies = jnp.broadcast_to(x[None], (placement.mesh.shape[AXIS], *x.shape))
        spec = PartitionSpec(AXIS, *(PartitionSpec.UNCONSTRAINED,) * x.ndim)
        return jax.lax.with_sharding_constraint(copies, NamedSharding(placement.mesh, spec))

    return jax.tree.map(one, tree)


def _last(tree: Tree) -> Tree:
    """The last stage's, for all."""

    def one(x: jax.Array) -> jax.Array:
        is_last = jnp.arange(x.shape[0]) == x.shape[0] - 1
        return jnp.where(is_last.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

    return _summed(jax.tree.map(one, tree))


def _summed(tree: Tree) -> Tree:
    """Over the stages, which are the first dimension. What is summed is not made longer on its way (jnp.sum would)."""
    return jax.tree.map(lambda x: jax.lax.reduce(x, jnp.zeros((), x.dtype), jax.lax.add, (0,)), tree)


def _next(x: Tree, step: int) -> Tree:
    """Handed to the next stage, or with step -1 to the one before."""
    stages = jax.lax.axis_size(AXIS)
    ring = [(s, (s + step) % stages) for s in range(stages)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), x)


def _take(tree: Tree, index: jax.Array | int) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Tree, index: jax.Array, item: Tree) -> Tree:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), tree, item)


def _where(condition: jax.Array, tree: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


def _masked(condition: jax.Array, tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.where(condition, x, 0), tree)


def _add(total: Tree, new: Tree) -> Tree:
    return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new)


def _add_at(total: Tree, index: jax.Array, new: Tree) -> Tree:
    def one(total: jax.Array, new: jax.Array) -> jax.Array:
        there = jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, there + new.astype(total.dtype), index, 0)

    return jax.tree.map(one, total, new)


def _zeros_of_one_stage(tree: Tree) -> Tree:
    """Zeros in the shapes of one stage's."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), tree)


def _zeros(function: Callable[[], Tree]) -> Tree:
    """Zeros in the shapes of what a function returns."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function))


def _float32_zeros(tree: Tree) -> Tree:
    # float32: a sum over parts in bfloat16 would lose the small ones
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)
