"""The schedules' arithmetic against what a pipeline must do: every unit once, in order, its input there when wanted."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.objectives import NextToken
from llmlab.optim import SGD
from llmlab.sharding import Mesh
from llmlab.sharding.rules import ScheduleName
from llmlab.sharding.schedule import Schedule, Unit
from llmlab.training.config import Train
from llmlab.training.program import Program
from tests.training.models_on_meshes import MLP, decoder

SHAPES = [(1, 1, 1), (2, 1, 1), (2, 5, 1), (4, 4, 1), (8, 20, 1), (4, 8, 2), (4, 8, 3), (3, 6, 2)]


def table(units: Unit, ticks: int, stages: int) -> dict[tuple[int, int, int], int]:
    """(stage, part, chunk) to the tick in which it is computed; each may be there once."""
    found: dict[tuple[int, int, int], int] = {}
    part, chunk, real = (np.asarray(x).reshape(stages, ticks) for x in (units.part, units.chunk, units.real))
    for stage, tick in zip(*np.nonzero(real), strict=True):
        key = (int(stage), int(part[stage, tick]), int(chunk[stage, tick]))
        assert key not in found
        found[key] = int(tick)
    return found


def tables(schedule: Schedule) -> tuple[dict[tuple[int, int, int], int], dict[tuple[int, int, int], int]]:
    ticks = schedule.delay + schedule.ticks
    stage, tick = (x.reshape(-1) for x in np.meshgrid(np.arange(schedule.stages), np.arange(ticks), indexing="ij"))
    forward = schedule.forward_unit(jnp.asarray(tick), jnp.asarray(stage))
    backward = schedule.backward_unit(jnp.asarray(tick), jnp.asarray(stage))
    return table(forward, ticks, schedule.stages), table(backward, ticks, schedule.stages)


@pytest.mark.parametrize(("stages", "parts", "interleave"), SHAPES)
def test_every_unit_is_computed_once_when_its_input_arrives(stages: int, parts: int, interleave: int) -> None:
    schedule = Schedule(stages=stages, parts=parts, interleave=interleave)
    forward, backward = tables(schedule)
    everything = {(s, m, c) for s in range(stages) for m in range(parts) for c in range(interleave)}
    assert forward.keys() == backward.keys() == everything
    for (s, m, c), tick in forward.items():
        assert tick < schedule.ticks
        if s > 0:  # handed on in the tick before
            assert tick == forward[s - 1, m, c] + 1
        elif c > 0:
            assert tick == forward[stages - 1, m, c - 1] + 1
    for (s, m, c), tick in backward.items():
        assert tick >= schedule.delay
        if s < stages - 1:
            assert tick == backward[s + 1, m, c] + 1
        elif c < interleave - 1:
            assert tick == backward[0, m, c + 1] + 1
        else:  # the loss begins the way back in the tick in which the last chunk has been computed
            assert tick == forward[s, m, c]


@pytest.mark.parametrize(("stages", "parts", "interleave"), SHAPES)
def test_the_ring_keeps_an_input_until_its_gradient_is_wanted(stages: int, parts: int, interleave: int) -> None:
    schedule = Schedule(stages=stages, parts=parts, interleave=interleave)
    forward, backward = tables(schedule)
    depth = 2 * interleave * stages - 1
    for stage in range(stages):
        order = sorted((tick, m, c) for (s, m, c), tick in forward.items() if s == stage)
        # a place is written again by the unit `depth` later, and by what is computed in vain after the last
        for number, (_, m, c) in enumerate(order):
            overwritten = stage + number + depth
            assert backward[stage, m, c] < overwritten or overwritten >= schedule.ticks


def test_the_bubble_is_the_share_of_idle_ticks() -> None:
    schedule = Schedule(stages=4, parts=8, interleave=2)
    forward, _ = tables(schedule)
    busy = sum(1 for (stage, _, _) in forward if stage == 0)
    assert schedule.bubble == (schedule.ticks - busy) / schedule.ticks == 3 / 19
    assert Schedule(stages=4, parts=8).bubble == 3 / 11


def test_interleaving_asks_for_parts_that_stages_divide() -> None:
    with pytest.raises(ValueError, match=r"train.accumulation=6 is not divisible by mesh.pipeline=4.*use 4 or 8"):
        Schedule(stages=4, parts=6, interleave=2)


def temporary_bytes(schedule: ScheduleName, parts: int) -> int:
    """Of a step, where every part has one row of 256 tokens."""
    model = dataclasses.replace(decoder(4, dataclasses.replace(MLP, hidden_dim=64), remat="full"), embed_dim=64)
    rows = {name: np.zeros((parts, 256), np.int32) for name in ("input_ids", "labels")}
    mesh = Mesh(data=1, pipeline=4, schedule=schedule).build(jax.devices()[:4])
    train = Train(steps=1, batch_size=parts, sequence_length=256, accumulation=parts)
    program = Program.build(model, NextToken(), SGD(peak_lr=0.1), mesh, train, rows)
    return program.train_step.lower(program.state, program.batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.scale
def test_memory_grows_with_the_parts_in_gpipe_and_not_in_1f1b() -> None:
    few, many = temporary_bytes("1f1b", 8), temporary_bytes("1f1b", 32)
    assert many <= 1.02 * few  # a few numbers a part
    one = 4 * 256 * 64  # the bytes of a part's input
    assert temporary_bytes("gpipe", 32) - temporary_bytes("gpipe", 8) >= 24 * one


@pytest.mark.scale
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_stages_share_the_work_on_the_vocabulary(schedule: ScheduleName) -> None:
    vocab, stages, rows = 4096, 4, 8
    model = dataclasses.replace(decoder(4, MLP), vocab_size=vocab)
    batch = {name: np.zeros((rows, 16), np.int32) for name in ("input_ids", "labels")}
    mesh = Mesh(data=1, pipeline=stages, schedule=schedule).build(jax.devices()[:stages])
    train = Train(steps=1, batch_size=rows, sequence_length=16, accumulation=rows)
    program = Program.build(model, NextToken(), SGD(peak_lr=0.1), mesh, train, batch)
    text = program.train_step.lower(program.state, program.batch).compile().as_text()
    products = [{int(n) for n in dims.split(",")} for dims in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)]
    assert any(vocab // stages in dims for dims in products), "each stage scores its share of the tokens"
    assert not any(vocab in dims for dims in products), "and no stage scores all"
