"""Collectives of compiled programs against counts by hand: single ones, and those of a decoder's whole train step."""

import dataclasses
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llmlab.models.llama import llama
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Constant
from llmlab.plan.collectives import Collective, collectives, sent, total_sent
from llmlab.plan.compile import bytes_per_device
from llmlab.plan.hlo import Module
from llmlab.plan.work import work
from llmlab.sharding import Mesh
from llmlab.training.config import Train
from llmlab.training.program import Program

ROWS, LENGTH = 16, 32
DIM, LAYERS, HIDDEN, VOCAB = 64, 3, 128, 256
STREAM = ROWS * LENGTH * DIM  # elements of the residual stream
SCALARS = 64  # bytes that sums of losses, counts and norms may take


# --- one at a time ---------------------------------------------------------------------------------------------------


def found_in(function: Any, out: P, *, axis: str, trips: int = 1) -> list[Collective]:
    """Collectives of `function` on a share of (16, 8) floats, run `trips` times over a 2 x 4 mesh."""
    mesh = jax.make_mesh((2, 4), ("outer", "inner"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(x: jax.Array) -> jax.Array:
        if trips == 1:
            return function(x)
        return jax.lax.scan(
            lambda total, _: (total + function(x + total.sum()), None), function(x), None, length=trips
        )[0]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(axis), out_specs=out, check_vma=False)
    text = jax.jit(mapped).lower(jax.ShapeDtypeStruct((16, 8), jnp.float32)).compile().as_text()
    return collectives(Module.parse(text), dict(mesh.shape))


WHOLE = 16 * 8 * 4
SHARE = WHOLE // 4


@pytest.mark.parametrize(
    ("function", "out", "kind", "full", "leaves"),
    [
        (partial(jax.lax.all_gather, axis_name="inner", tiled=True), P(), "all-gather", WHOLE, 3 / 4 * WHOLE),
        (partial(jax.lax.psum, axis_name="inner"), P(), "all-reduce", SHARE, 2 * 3 / 4 * SHARE),
        (
            partial(jax.lax.psum_scatter, axis_name="inner", scatter_dimension=1, tiled=True),
            P(None, "inner"),
            "reduce-scatter",
            SHARE,
            3 / 4 * SHARE,
        ),
        (
            partial(jax.lax.all_to_all, axis_name="inner", split_axis=1, concat_axis=0, tiled=True),
            P(None, "inner"),
            "all-to-all",
            SHARE,
            3 / 4 * SHARE,
        ),
        (
            partial(jax.lax.ppermute, axis_name="inner", perm=[(i, (i + 1) % 4) for i in range(4)]),
            P("inner"),
            "collective-permute",
            SHARE,
            SHARE,
        ),
    ],
)
def test_each_kind_is_found_with_its_axis_and_its_bytes(
    function: Any, out: P, kind: str, full: int, leaves: float
) -> None:
    (one,) = found_in(function, out, axis="inner")
    assert (one.kind, one.axes, one.times, one.full_bytes, one.sent_bytes) == (kind, ("inner",), 1, full, leaves)


def test_a_collective_in_a_loop_counts_for_every_trip() -> None:
    found = found_in(partial(jax.lax.psum, axis_name="outer"), P(), axis="outer", trips=5)
    assert sorted((one.kind, one.axes, one.times) for one in found) == [
        ("all-reduce", ("outer",), 1),
        ("all-reduce", ("outer",), 5),
    ]
    assert total_sent(found) == 6 * WHOLE / 2  # 2 (n - 1)/n of a share, which is half, for n = 2


def test_a_group_over_slices_sends_one_chips_share_on_the_slow_network() -> None:
    one = Collective(
        kind="all-reduce", axes=("data",), times=1, group_size=8, num_slices=2, full_bytes=800, groups=[], source=""
    )
    assert one.fast_bytes == 2 * 3 / 4 * 800  # reduced and gathered among the four of a slice
    assert one.slow_bytes == 2 * 1 / 2 * 800 / 4  # a quarter of it, between the two slices
    permute = dataclasses.replace(one, kind="collective-permute", group_size=2)
    assert (permute.fast_bytes, permute.slow_bytes) == (0, 800)


def test_groups_in_several_slices_are_told_by_the_slices_of_their_devices() -> None:
    text = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100] parameter(0)
  %y = f32[100] all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %z = f32[100] all-reduce(%y), replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""
    found = collectives(Module.parse(text), {"data": 2, "fsdp": 2}, slice_of=[0, 0, 1, 1])
    assert [(one.axes, one.num_slices) for one in found] == [(("fsdp",), 1), (("data",), 2)]


def test_a_send_to_the_hosts_is_what_they_do_with_it_between_slices() -> None:
    text = """HloModule m
ENTRY %main (x: f32[100]) -> token[] {
  %x = f32[100] parameter(0)
  %t = token[] after-all()
  %s = (f32[100], u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, frontend_attributes={
_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %d = token[] send-done(%s), channel_id=2
}
"""
    text = text.replace("={\n", "={")
    (one,) = collectives(Module.parse(text), {"data": 4, "tensor": 1}, slice_of=[0, 0, 1, 1])
    assert (one.kind, one.axes, one.groups) == ("all-reduce", ("data",), [[0, 2], [1, 3]])
    assert (one.fast_bytes, one.slow_bytes) == (0, 2 * 1 / 2 * 400)


ASYNCHRONOUS = """HloModule m
%begin (p: bf16[1,128]) -> (bf16[1,128], bf16[4,128], u32[]) {
  %p = bf16[1,128] parameter(0)
  %g = bf16[4,128] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c = (bf16[1,128], bf16[4,128], u32[]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}
%carry (p: bf16[1,128], q: bf16[4,128]) -> (bf16[1,128], bf16[4,128]) {
  %p = bf16[1,128] parameter(0)
  %g = bf16[4,128] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (bf16[1,128], bf16[4,128]) tuple(%p, %g)
}
%end (p: bf16[1,128]) -> bf16[4,128] {
  %p = bf16[1,128] parameter(0)
  %g = bf16[4,128] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %c = bf16[4,128] custom-call(%g), custom_call_target="AsyncCollectiveDone"
}
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
%all-reduce-scatter.1 (p: f32[8,16]) -> f32[2,16] {
  %p = f32[8,16] parameter(0)
  %r = f32[8,16] all-reduce(%p), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  %i = u32[] partition-id()
  ROOT %s = f32[2,16] dynamic-slice(%r, %i, %i), dynamic_slice_sizes={2,16}
}
ENTRY %main (x: bf16[1,128], y: f32[8,16]) -> f32[2,16] {
  %x = bf16[1,128] parameter(0)
  %y = f32[8,16] parameter(1)
  %b = (bf16[1,128], bf16[4,128], u32[]) fusion(%x), kind=kCustom, calls=%begin
  %d = (bf16[1,128], bf16[4,128]) fusion(%b), kind=kCustom, calls=%carry
  %e = bf16[4,128] fusion(%d), kind=kCustom, calls=%end
  ROOT %f = f32[2,16] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_fusions_that_the_tpu_compiler_makes_of_collectives_are_seen_through() -> None:
    found = collectives(Module.parse(ASYNCHRONOUS), {"fsdp": 4})
    assert [(one.kind, one.full_bytes) for one in found] == [
        ("all-gather", 4 * 128 * 2),
        ("reduce-scatter", 8 * 16 * 4),
    ]


def test_bytes_sent_follow_the_table() -> None:
    assert sent("all-gather", 4, 100) == sent("reduce-scatter", 4, 100) == sent("all-to-all", 4, 100) == 75
    assert (sent("all-reduce", 4, 100), sent("collective-permute", 4, 100), sent("all-reduce", 1, 100)) == (150, 100, 0)


# --- a decoder's train step ------------------------------------------------------------------------------------------


def step(mesh: Mesh) -> tuple[Program, Any]:
    """A decoder's program in float32 and its compiled step, on 8 devices."""
    model = llama(embed_dim=DIM, num_layers=LAYERS, num_heads=8, num_kv_heads=8, hidden_dim=HIDDEN, vocab_size=VOCAB)
    program = Program.build(
        dataclasses.replace(model, execution=Execution(mode="scan")),
        NextToken(),
        AdamW(peak_lr=1e-3, schedule=Constant()),
        mesh.build(jax.devices()),
        Train(steps=10, batch_size=ROWS, sequence_length=LENGTH),
        {name: np.zeros((ROWS, LENGTH), np.int32) for name in ("input_ids", "labels", "segment_ids", "position_ids")},
    )
    return program, program.train_step.lower(program.state, program.batch).compile()


def totals(program: Program, compiled: Any) -> Counter[tuple[str, tuple[str, ...]]]:
    """(kind, axes) to the bytes of all arrays."""
    rows: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one in collectives(Module.parse(compiled.as_text()), dict(program.placement.mesh.shape)):
        rows[one.kind, one.axes] += one.times * one.full_bytes
    return rows


def check(program: Program, compiled: Any) -> None:
    """What holds for every layout: arguments are their arrays, and the arithmetic is the model's, shared evenly."""
    held = bytes_per_device((program.state, program.batch))
    # A step reports these and never reads those of the step before: jax drops arguments that nothing uses.
    held += sum(value.nbytes for value in program.scalars.optimizer.values())
    held -= bytes_per_device([program.state.optimizer_state[name] for name in ("learning_rate", "gradient_norm")])
    assert held == compiled.memory_analysis().argument_size_in_bytes
    flops = work(Module.parse(compiled.as_text())).flops
    assert flops * 8 == pytest.approx(program.model.flops(program.shapes), rel=1e-3)  # and a few indices by products


def test_pure_data_parallelism_reduces_every_gradient_once() -> None:
    program, compiled = step(Mesh(data=8))
    check(program, compiled)
    rows, gradients = totals(program, compiled), 4 * program.num_parameters
    assert set(rows) == {("all-reduce", ("data",))}
    assert gradients < rows["all-reduce", ("data",)] <= gradients + SCALARS


def test_pure_fsdp_gathers_layers_forward_and_backward_and_reduces_every_gradient_once() -> None:
    program, compiled = step(Mesh(data=1, fsdp=8))
    check(program, compiled)
    rows, tables = totals(program, compiled), 2 * VOCAB * DIM  # embedding and head are needed once
    assert rows["all-gather", ("fsdp",)] == 4 * (2 * (program.num_parameters - tables) + tables)
    reduced = rows["all-reduce", ("fsdp",)] + rows["reduce-scatter", ("fsdp",)]
    assert 4 * program.num_parameters < reduced <= 4 * program.num_parameters + 2 * SCALARS
    assert {axes for _, axes in rows} == {("fsdp",)}


def test_pure_tensor_parallelism_gathers_and_sums_the_residual_stream() -> None:
    program, compiled = step(Mesh(data=1, tensor=8))
    check(program, compiled)
    rows = totals(program, compiled)
    table = VOCAB * DIM  # the embedding, gathered to look tokens up; its gradient is summed
    # Each layer gathers its input twice, forward and backward; the head does once.
    assert rows["all-gather", ("tensor",)] == 4 * (4 * LAYERS * STREAM + STREAM + table)
    # Each layer sums the outputs of attention and feed-forward, and the gradients of the inputs of q, k, v, gate and
    # up; the head sums the gradient of its input and three numbers a token (largest score, their sum, the target's).
    summed = LAYERS * (2 + 5) * STREAM + STREAM + 3 * ROWS * LENGTH + table + (2 * LAYERS + 1) * DIM
    reduced = rows["all-reduce", ("tensor",)] + rows["reduce-scatter", ("tensor",)]
    assert 4 * summed <= reduced <= 4 * summed + SCALARS
