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
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


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
    def last(self) -> int:
        """Place of the chunk that a part leaves from; it enters at place 0."""
        return self.stages * self.interleave - 1

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
        real = (number >= 0) & (number < self.units)
        return Unit(group * self.stages + member, chunk, chunk * self.stages + stage, number, real)

    def backward_unit(self, tick: jax.Array, stage: jax.Array | int) -> "Unit":
        """What a stage computes backward in a tick; `number` is that of the same unit in the forward pass."""
        w = tick - self.delay - (self.stages - 1 - stage)
        q = jnp.clip(w, 0, self.units - 1)
        group, rest = jnp.divmod(q, self.interleave * self.stages)
        backwards, member = jnp.divmod(rest, self.stages)
        chunk = self.interleave - 1 - backwards
        number = (group * self.interleave + chunk) * self.stages + member
        real = (w >= 0) & (w < self.units)
        return Unit(group * self.stages + member, chunk, chunk * self.stages + stage, number, real)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unit:
    """One part in one chunk of a stage."""

    part: jax.Array
    chunk: jax.Array
    place: jax.Array
    """Of the chunk among those of all stages, in the order in which a part goes through them."""
    number: jax.Array
    """In the order of the stage's forward pass."""
    real: jax.Array
    """Whether there is such a unit at all."""
