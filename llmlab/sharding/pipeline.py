"""Pipeline schedules: which stage works on which part of the batch, and when (Huang et al. 2019, 1811.06965).

S stages hold the layers, M parts of the batch go through them one behind the other. Every device runs the same
program, a loop of ticks; in a tick each stage works on the part that has reached it and hands the result on.

    F1 F2 F3 F4                      forward of parts 1 to 4 in stage 1
       F1 F2 F3 F4                   the same in stage 2, a tick later: what stands empty is the bubble

    gpipe   all forward passes, then (by automatic differentiation) all backward passes. Between them every part's
            activations wait: memory grows with M.
    1f1b    a part's backward pass begins as soon as its forward pass has left the last stage (Narayanan et al. 2019,
            1806.03377), so at most 2 S - 1 inputs of a stage wait, however many parts there are. A stage keeps the
            input and computes the rest again when the backward pass arrives.

Interleaving (Narayanan et al. 2021, 2104.04473, section 2.2) gives every stage v chunks of layers, not one: chunk c of
stage s holds layers number c S + s, and a part goes around v times. The bubble, (S - 1) / (v M + S - 1) of the time,
shrinks; v times as many activations travel. It needs M divisible by S.

Ticks are numbered t. With N = M v units of work a stage (a unit is one part in one chunk), stage s does unit t - s of
the forward pass and unit t - T0 - (S - 1 - s) of the backward pass, T0 = v S - 1: when the last chunk has its first
part. Units are ordered in groups of S parts: (group g, chunk c, member i of the group) is g v S + c S + i forward; in
the backward pass the chunks of a group run from last to first. What falls outside 0 ... N - 1 is computed all the same,
on whatever is there, and is masked in what is kept: the gradient and the loss.

Cost: M v + S - 1 ticks of a forward and a backward chunk; 1f1b computes every stage's forward pass twice. Memory, per
device and in units of a stage's input: 2 v S - 1 for 1f1b.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llmlab.sharding.rules import Placement

AXIS = "pipeline"
Tree = Any


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Stages, parts and chunks."""

    stages: int
    """S, devices along the pipeline."""
    parts: int
    """M, parts of the batch."""
    interleave: int = 1
    """v, chunks of layers that a stage has."""

    def __post_init__(self) -> None:
        if self.interleave > 1 and self.parts % self.stages:
            below = self.parts // self.stages * self.stages
            raise ValueError(
                f"train.accumulation={self.parts} is not divisible by mesh.pipeline={self.stages}, which "
                f"mesh.interleave={self.interleave} asks for; use {f'{below} or ' if below else ''}"
                f"{below + self.stages}, or mesh.interleave=1"
            )

    @property
    def units(self) -> int:
        """N, units of work of a stage."""
        return self.parts * self.interleave

    @property
    def ticks(self) -> int:
        """Ticks from the first unit of the first stage to the last unit of the last."""
        return self.units + self.stages - 1

    @property
    def delay(self) -> int:
        """T0, the tick of the first backward unit."""
        return self.interleave * self.stages - 1

    @property
    def bubble(self) -> float:
        """Share of the time that a stage stands idle, (S - 1) / (v M + S - 1)."""
        return (self.stages - 1) / self.ticks

    def forward_unit(self, tick: jax.Array, stage: jax.Array | int) -> "Unit":
        """What a stage computes forward in a tick."""
        number = tick - stage
        q = jnp.clip(number, 0, self.units - 1)
        group, rest = jnp.divmod(q, self.interleave * self.stages)
        chunk, member = jnp.divmod(rest, self.stages)
        return Unit(group * self.stages + member, chunk, number, (number >= 0) & (number < self.units))

    def backward_unit(self, tick: jax.Array, stage: jax.Array | int) -> "Unit":
        """What a stage computes backward in a tick; `number` is that of the same unit in the forward pass."""
        w = tick - self.delay - (self.stages - 1 - stage)
        q = jnp.clip(w, 0, self.units - 1)
        group, rest = jnp.divmod(q, self.interleave * self.stages)
        backwards, member = jnp.divmod(rest, self.stages)
        chunk = self.interleave - 1 - backwards
        number = (group * self.interleave + chunk) * self.stages + member
        return Unit(group * self.stages + member, chunk, number, (w >= 0) & (w < self.units))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unit:
    """One part in one chunk of a stage."""

    part: jax.Array
    chunk: jax.Array
    number: jax.Array
    """In the order of the stage's forward pass."""
    real: jax.Array
    """Whether there is such a unit at all."""


@dataclass(frozen=True)
class Work:
    """What goes through the pipeline. A part's `given` holds what a gradient is wanted of, `fixed` all else.

    empty: (shared, given, fixed) -> x, of which only the shapes matter.
    chunk: (shared, given, fixed, layers, x, number) -> x, a chunk's layers; its number counts from the first layers,
        and number 0 takes what enters in place of x.
    leave: (shared, given, fixed, x) -> (loss, sums), after the last chunk.
    """

    empty: Callable[..., Tree]
    chunk: Callable[..., Tree]
    leave: Callable[..., tuple[jax.Array, Tree]]


@dataclass(frozen=True)
class Inputs:
    """Arrays of a pipeline."""

    shared: Tree
    """Parameters that all stages may look at."""
    layers: Tree
    """Parameters of the layers, (v, S, layers of a chunk, ...)."""
    given: Tree
    """(M, ...) of floats."""
    fixed: Tree
    """(M, ...)."""


def loss(work: Work, inputs: Inputs, schedule: Schedule, placement: Placement, *, remat: bool) -> tuple[Any, Tree]:
    """Loss and sums over all parts, forward pass only; its gradient is the gpipe schedule.

    Args:
        work: what goes through.
        inputs: the arrays.
        schedule: stages and parts.
        placement: the mesh.
        remat: whether the backward pass computes a tick again from what entered it.
    """

    def run(shared: Tree, layers: Tree, given: Tree, fixed: Tree) -> Tree:
        stage = jax.lax.axis_index(AXIS)
        mine = jax.tree.map(lambda x: x[:, 0], layers)

        def tick(carry: tuple[Tree, Tree], t: jax.Array) -> tuple[tuple[Tree, Tree], None]:
            x, sums = carry
            unit = schedule.forward_unit(t, stage)
            part = _take((given, fixed), unit.part)
            number = unit.chunk * schedule.stages + stage
            y = work.chunk(shared, *part, _take(mine, unit.chunk), x, number)
            # The predicate is the last stage's, the same on all devices: a branch may hold collectives.
            last = schedule.forward_unit(t, schedule.stages - 1)
            leaving = last.real & (last.chunk == schedule.interleave - 1)
            zeros = _zeros(lambda: work.leave(shared, *part, y))
            ours = leaving & (stage == schedule.stages - 1)
            left = jax.lax.cond(leaving, lambda: work.leave(shared, *part, y), lambda: zeros)
            sums = jax.tree.map(lambda total, new: total + jnp.where(ours, new, 0), sums, left)
            return (_next(y, 1), sums), None

        first = _take((given, fixed), 0)
        x = _zeros(lambda: work.empty(shared, *first))
        sums = _zeros(lambda: work.leave(shared, *first, x))
        step = jax.checkpoint(tick) if remat else tick
        (_, sums), _ = jax.lax.scan(step, (x, sums), jnp.arange(schedule.ticks))
        return jax.tree.map(lambda x: x[None], sums)

    return _summed(_mapped(run, placement, PartitionSpec(AXIS))(*_arguments(inputs)))


@dataclass(frozen=True)
class Gradients:
    """Of the loss, float32 where they are of parameters."""

    shared: Tree
    layers: Tree
    given: Tree


def loss_and_gradients(
    work: Work,
    inputs: Inputs,
    schedule: Schedule,
    placement: Placement,
    *,
    constrain: Callable[[Tree, Tree], tuple[Tree, Tree]],
) -> tuple[jax.Array, Tree, Gradients]:
    """Loss, sums and gradients over all parts by the 1f1b schedule.

    Args:
        work: what goes through.
        inputs: the arrays.
        schedule: stages and parts.
        placement: the mesh.
        constrain: places gradients of `shared` and of a stage's layers (v, layers of a chunk, ...) on the other axes.
    """
    depth = 2 * schedule.interleave * schedule.stages - 1

    def run(shared: Tree, layers: Tree, given: Tree, fixed: Tree) -> Tree:
        stage = jax.lax.axis_index(AXIS)
        mine = jax.tree.map(lambda x: x[:, 0], layers)

        def forward(state: _State, t: jax.Array) -> _State:
            unit = schedule.forward_unit(t, stage)
            # No mask: what is computed in vain never meets a place of the ring that is in use.
            ring = _put(state.ring, jnp.mod(unit.number, depth), state.forward)
            of_part, number = _take((given, fixed), unit.part), unit.chunk * schedule.stages + stage
            y = work.chunk(shared, *of_part, _take(mine, unit.chunk), state.forward, number)
            return _replace(state, ring=ring, forward=_next(y, 1))

        def backward(state: _State, t: jax.Array) -> _State:
            unit = schedule.backward_unit(t, stage)
            of_part, of_all = _take((given, fixed), unit.part)
            x = _take(state.ring, jnp.mod(unit.number, depth))
            number = unit.chunk * schedule.stages + stage

            def chunk(shared: Tree, of_part: Tree, layers: Tree, x: Tree) -> Tree:
                return work.chunk(shared, of_part, of_all, layers, x, number)

            y, pull = jax.vjp(chunk, shared, of_part, _take(mine, unit.chunk), x)
            last = schedule.backward_unit(t, schedule.stages - 1)
            leaving = last.real & (last.chunk == schedule.interleave - 1)
            ours = leaving & (stage == schedule.stages - 1)
            state, d_head = _leave(work, state, (shared, of_part, of_all, y), leaving, ours, unit.part)
            dy = jax.tree.map(lambda h, b: jnp.where(unit.real, jnp.where(ours, h, b), 0), d_head, state.backward)
            d_shared, d_given, d_layers, dx = pull(dy)
            total = state.gradients
            gradients = Gradients(
                shared=_add(total.shared, d_shared),
                layers=_add_at(total.layers, unit.chunk, d_layers),
                given=_add_at(total.given, unit.part, d_given),
            )
            placed = constrain(gradients.shared, gradients.layers)
            gradients = Gradients(shared=placed[0], layers=placed[1], given=gradients.given)
            return _replace(state, gradients=gradients, backward=_next(dx, -1))

        first = _take((given, fixed), 0)
        x = _zeros(lambda: work.empty(shared, *first))
        shared_zeros, layer_zeros = constrain(_float32_zeros(shared), _float32_zeros(mine))
        state = _State(
            forward=x,
            backward=x,
            ring=jax.tree.map(lambda x: jnp.zeros((depth, *x.shape), x.dtype), x),
            gradients=Gradients(shared_zeros, layer_zeros, jax.tree.map(jnp.zeros_like, given)),
            sums=_zeros(lambda: work.leave(shared, *first, x)),
        )
        start, end = schedule.delay, schedule.ticks
        for body, ticks in (
            (forward, range(start)),
            (lambda state, t: backward(forward(state, t), t), range(start, end)),
            (backward, range(end, end + start)),
        ):
            state = jax.lax.scan(lambda state, t, body=body: (body(state, t), None), state, jnp.asarray(ticks))[0]
        total = state.gradients
        of_stage = jax.tree.map(lambda x: x[None], (state.sums, total.shared, total.given))
        return (*of_stage, jax.tree.map(lambda x: x[:, None], total.layers))

    each, layered = PartitionSpec(AXIS), PartitionSpec(None, AXIS)
    mapped = _mapped(run, placement, (each, each, each, layered))
    sums, d_shared, d_given, d_layers = mapped(*_arguments(inputs))
    value, sums = _summed(sums)
    return value, sums, Gradients(shared=_summed(d_shared), layers=d_layers, given=_summed(d_given))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """What a stage carries from tick to tick."""

    forward: Tree
    """What came from the stage before."""
    backward: Tree
    """The gradient that came from the stage behind."""
    ring: Tree
    """Inputs of forward units whose backward units are still to come."""
    gradients: Gradients
    sums: Tree


jax.tree_util.register_dataclass(Gradients, ["shared", "layers", "given"], [])


def _leave(
    work: Work,
    state: _State,
    inputs: tuple[Tree, Tree, Tree, Tree],
    leaving: jax.Array,
    ours: jax.Array,
    part: jax.Array,
) -> tuple[_State, Tree]:
    """The loss of a part that has left the last chunk, its sums and gradients added; and the gradient of its output.

    `leaving` says whether one does now, and is the same on all devices: a branch may hold collectives. `ours` says
    whether it does so here.
    """
    shared, given, fixed, y = inputs

    def leave() -> tuple[Tree, Gradients, Tree]:
        def value(shared: Tree, given: Tree, y: Tree) -> tuple[jax.Array, Tree]:
            loss, sums = work.leave(shared, given, fixed, y)
            return loss, (loss, sums)

        (d_shared, d_given, dy), sums = jax.grad(value, argnums=(0, 1, 2), has_aux=True)(shared, given, y)
        kept = jax.tree.map(lambda x: jnp.where(ours, x, 0), (sums, d_shared, d_given))
        total = state.gradients
        return (
            jax.tree.map(jnp.add, state.sums, kept[0]),
            Gradients(_add(total.shared, kept[1]), total.layers, _add_at(total.given, part, kept[2])),
            dy,
        )

    def stay() -> tuple[Tree, Gradients, Tree]:
        return state.sums, state.gradients, jax.tree.map(jnp.zeros_like, y)

    sums, gradients, dy = jax.lax.cond(leaving, leave, stay)
    return _replace(state, sums=sums, gradients=gradients), dy


def _mapped(run: Callable[..., Tree], placement: Placement, out_specs: Any) -> Callable[..., Tree]:
    """On every stage's share; the other axes stay with the compiler."""
    everywhere = PartitionSpec()
    return jax.shard_map(
        run,
        mesh=placement.mesh,
        in_specs=(everywhere, PartitionSpec(None, AXIS), everywhere, everywhere),
        out_specs=out_specs,
        axis_names={AXIS},
        check_vma=False,  # maps inside (experts, attention) do not say how their outputs vary
    )


def _arguments(inputs: Inputs) -> tuple[Tree, Tree, Tree, Tree]:
    return inputs.shared, inputs.layers, inputs.given, inputs.fixed


def _replace(state: _State, **changes: Any) -> _State:
    return _State(**{**vars(state), **changes})


def _next(x: Tree, step: int) -> Tree:
    """Handed to the next stage, or with step -1 to the one before."""
    stages = jax.lax.axis_size(AXIS)
    ring = [(s, (s + step) % stages) for s in range(stages)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), x)


def _take(tree: Tree, index: jax.Array | int) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Tree, index: jax.Array, item: Tree) -> Tree:
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, index, 0), tree, item)


def _add(total: Tree, new: Tree) -> Tree:
    return jax.tree.map(lambda t, n: t + n.astype(t.dtype), total, new)


def _add_at(total: Tree, index: jax.Array, new: Tree) -> Tree:
    def one(total: jax.Array, new: jax.Array) -> jax.Array:
        there = jax.lax.dynamic_index_in_dim(total, index, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, there + new.astype(total.dtype), index, 0)

    return jax.tree.map(one, total, new)


def _zeros(function: Callable[[], Tree]) -> Tree:
    """Zeros in the shapes of what a function returns."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function))


def _float32_zeros(tree: Tree) -> Tree:
    # float32: a sum over parts in bfloat16 would lose the small ones
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)


def _summed(tree: Tree) -> Tree:
    """Over the stages, which are the first dimension."""
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)
