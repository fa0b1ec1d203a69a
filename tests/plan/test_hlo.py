"""Compiled programs read back: how often everything runs, and what it computes."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llmlab.nn.moe.exchange import even_rows, sum_of_further_rounds
from llmlab.plan.cost import count
from llmlab.plan.hlo import UNEVEN, Module, Shape, parse_instruction, shapes_of
from llmlab.plan.work import EVEN_ROWS, convolution_flops, work


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def module(function: Any, *args: Any) -> Module:
    return Module.parse(jax.jit(function).lower(*args).compile().as_text())


def nested(x: jax.Array, outer: jax.Array, inner: jax.Array) -> jax.Array:
    """5 x 3 products inside, 5 outside."""

    def one(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        x = jnp.tanh(x @ w)
        return jax.lax.scan(lambda x, v: (jnp.tanh(x @ v), None), x, inner)[0], None

    return jax.lax.scan(one, x, outer)[0]


def test_a_product_in_nested_loops_counts_once_for_every_trip() -> None:
    args = (shape(4, 6), shape(5, 6, 6), shape(3, 6, 6))
    read = module(nested, *args)
    by_trips = Counter(run.times for run in read.runs() if run.instruction.opcode == "dot")
    assert by_trips == {5: 1, 15: 1}
    assert work(read).flops == count(nested, *args).matmul_flops == 20 * 2 * 4 * 6 * 6
    assert read.unknown_loops == []


def test_a_trip_count_that_the_compiler_did_not_record_is_read_from_the_condition() -> None:
    text = jax.jit(nested).lower(shape(4, 6), shape(5, 6, 6), shape(3, 6, 6)).compile().as_text()
    assert text is not None
    assert "known_trip_count" in text
    stripped = Module.parse(text.replace("known_trip_count", "unknown"))
    assert {run.times for run in stripped.runs() if run.instruction.opcode == "dot"} == {5, 15}
    assert stripped.unknown_loops == []


def test_a_loop_that_only_the_data_ends_counts_once_and_is_named() -> None:
    read = module(
        lambda x, w: jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ w, x), shape(4, 4), shape(4, 4)
    )
    assert [run.times for run in read.runs() if run.instruction.opcode == "dot"] == [1]
    assert len(read.unknown_loops) == 1
    assert "while" in read.unknown_loops[0]


def test_the_gradient_of_a_loop_costs_what_the_counter_says() -> None:
    def loss(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0])

    gradient, args = jax.grad(loss, argnums=(0, 1)), (shape(8, 16), shape(7, 16, 16))
    assert work(module(gradient, *args)).flops == count(gradient, *args).matmul_flops


def test_types_with_layouts_tuples_and_comments_are_read() -> None:
    line = (
        "  ROOT %fusion.1 = (bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}, s32[<=4]) "
        'fusion(%a.1, f32[2]{0} %b), kind=kLoop, calls=%inside, metadata={op_name="jit(f)/add"}'
    )
    instruction = parse_instruction(line)
    assert instruction is not None
    assert instruction.shapes == (Shape("bf16", (8, 128), fast=True), Shape("f32", ()), Shape("s32", (4,)))
    assert [shape.bytes for shape in instruction.shapes] == [2048, 4, 16]
    assert (instruction.opcode, instruction.operands, instruction.is_root) == ("fusion", ("a.1", "b"), True)
    assert (instruction.called, instruction.source) == ({"calls": "inside"}, "jit(f)/add")


def test_a_line_that_a_kernels_metadata_breaks_does_not_end_its_computation() -> None:
    text = """HloModule m
ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  %k = f32[2] custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a":"b"
}}, metadata={op_name="k"}
  ROOT %y = f32[2] add(%k, %k)
}
"""
    assert list(Module.parse(text).computations["main"].instructions) == ["x", "k", "y"]


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match="no HLO module"):
        Module.parse("nothing")


def test_half_bytes_are_counted_in_pairs() -> None:
    assert [each.bytes for each in shapes_of("s4[3]{0}, pred[5], f8e4m3fn[7], c128[2]")] == [2, 5, 7, 32]


def flops_of(left: str, kernel: str, result: str, attributes: str) -> int:
    text = f"""HloModule m
ENTRY %main (a: f32[1], b: f32[1]) -> f32[1] {{
  %a = f32[{left}] parameter(0)
  %b = f32[{kernel}] parameter(1)
  ROOT %c = f32[{result}] convolution(%a, %b), {attributes}
}}
"""
    computation = Module.parse(text).computations["main"]
    return convolution_flops(computation.root, computation)


def test_a_product_of_matrices_written_as_a_convolution_costs_what_the_product_does() -> None:
    # As compiled for TPU: (16 x 256) rows of 512 times (512, 8 heads, 64), the heads a window that slides over padding.
    attributes = "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
    assert flops_of("16,256,512,1", "512,8,64,1", "16,256,8,64", attributes) == 2 * (16 * 256) * 512 * (8 * 64)


def test_a_convolutions_window_counts_where_it_meets_data() -> None:
    def by_hand(length: int, taps: int, stride: int, pad: int, dilate: int) -> int:
        places = (length + 2 * pad - (taps - 1) * dilate - 1) // stride + 1
        return sum(0 <= o * stride + t * dilate - pad < length for o in range(places) for t in range(taps))

    for length, taps, stride, pad, dilate in ((10, 3, 1, 1, 1), (10, 3, 2, 1, 1), (11, 4, 3, 2, 2)):
        places = (length + 2 * pad - (taps - 1) * dilate - 1) // stride + 1
        window = f"window={{size={taps} stride={stride} pad={pad}_{pad} rhs_dilate={dilate}}}, dim_labels=b0f_0io->b0f"
        expected = 2 * 2 * 5 * 7 * by_hand(length, taps, stride, pad, dilate)
        assert flops_of(f"2,{length},5", f"{taps},5,7", f"2,{places},7", window) == expected


def test_slices_and_updates_in_place_count_as_what_is_moved() -> None:
    text = """HloModule m
ENTRY %main (a: f32[100,8], b: f32[1,8], i: s32[]) -> f32[100,8] {
  %a = f32[100,8] parameter(0)
  %b = f32[1,8] parameter(1)
  %i = s32[] parameter(2)
  %s = f32[1,8] dynamic-slice(%a, %i, %i), dynamic_slice_sizes={1,8}
  %t = f32[1,8]{1,0:S(1)} add(%s, %b)
  ROOT %u = f32[100,8] dynamic-update-slice(%a, %b, %i, %i)
}
"""
    row = 8 * 4
    # read and write the slice; read both operands (the sum stays in fast memory); read and write the update
    assert work(Module.parse(text)).traffic == 2 * row + 2 * row + 2 * row


NESTED = """HloModule m
%layout (p: f32[100,8]) -> f32[100,8] {
  %p = f32[100,8]{1,0} parameter(0)
  ROOT %c = f32[100,8]{0,1} copy(%p)
}

%row (p: f32[100,8], i: s32[]) -> f32[8] {
  %p = f32[100,8] parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,8] dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,8}
  ROOT %b = f32[8] bitcast(%s)
}

%read (p: f32[100,8], q: f32[100,8], i: s32[], r: f32[8]) -> f32[8] {
  %p = f32[100,8] parameter(0)
  %q = f32[100,8] parameter(1)
  %i = s32[] parameter(2)
  %r = f32[8]{0:S(1)} parameter(3)
  %a = f32[8] fusion(%p, %i), kind=kLoop, calls=%row
  %f = f32[100,8]{0,1} fusion(%q), kind=kLoop, calls=%layout
  %v = bf16[100,8]{0,1} convert(%f)
  %s = bf16[2,8] slice(%v), slice={[0:2], [0:8]}
  %b = f32[8] custom(%s, %r)
  ROOT %sum = f32[8] add(%a, %b)
}

%write (p: f32[100,8], u: f32[1,8], i: s32[]) -> f32[100,8] {
  %p = f32[100,8] parameter(0)
  %u = f32[1,8] parameter(1)
  %i = s32[] parameter(2)
  %f = f32[100,8]{0,1} fusion(%p), kind=kLoop, calls=%layout
  ROOT %d = f32[100,8]{0,1} dynamic-update-slice(%f, %u, %i, %i)
}

ENTRY %main (a: f32[100,8], b: f32[100,8], c: f32[1,8], i: s32[], r: f32[8]) -> f32[100,8] {
  %a = f32[100,8] parameter(0)
  %b = f32[100,8] parameter(1)
  %c = f32[1,8] parameter(2)
  %i = s32[]{:S(6)} parameter(3)
  %r = f32[8]{0:S(1)} parameter(4)
  FUSION
}
"""


@pytest.mark.parametrize(
    ("fusion", "rows"),
    [
        # one row of a; two rows of b; the result; what r has is in fast memory
        ("ROOT %x = f32[8] fusion(%a, %b, %i, %r), kind=kLoop, calls=%read", 1 + 2 + 1),
        # the new row, read and written; the old array is not read
        ("ROOT %x = f32[100,8] fusion(%b, %c, %i), kind=kLoop, calls=%write", 1 + 1),
        # nothing but the layout changes: all of it, read and written
        ("ROOT %x = f32[100,8] fusion(%a), kind=kLoop, calls=%layout", 100 + 100),
    ],
    ids=["slices", "update", "all"],
)
def test_slices_and_updates_count_as_such_in_fusions_within_fusions(fusion: str, rows: int) -> None:
    assert work(Module.parse(NESTED.replace("FUSION", fusion))).traffic == rows * 8 * 4


def test_a_computation_of_another_thread_ends_as_others_do() -> None:
    text = """HloModule m
%first (p: f32[2]) -> f32[2] {
  ROOT %p = f32[2] parameter(0)
}, execution_thread="sparsecore"

%second (q: f32[2]) -> f32[2] {
  ROOT %q = f32[2] parameter(0)
}

ENTRY %main (x: f32[2]) -> f32[2] {
  %x = f32[2] parameter(0)
  ROOT %y = f32[2] fusion(%x), kind=kLoop, calls=%second
}
"""
    assert list(Module.parse(text).computations) == ["first", "second", "main"]


def test_a_program_is_counted_for_experts_that_are_used_evenly() -> None:
    text = """HloModule m
%never (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] copy(%i)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %v = f32[8] get-tuple-element(%q), index=1
  %d = f32[] dot(%v, %v), lhs_contracting_dims={0}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8]) tuple(%j, %v)
}

ENTRY %main (x: bf16[96,16], w: bf16[4,16,32], s: (s32[], f32[8])) -> bf16[96,32] {
  %x = bf16[96,16] parameter(0)
  %w = bf16[4,16,32] parameter(1)
  %s = (s32[], f32[8]) parameter(2)
  %l = (s32[], f32[8]) while(%s), condition=%never, body=%body, metadata={op_name="jit(step)/LOOP/while"}
  ROOT %gmm.1 = bf16[96,32] custom-call(%x, %w), custom_call_target="tpu_custom_call", metadata={op_name="NAME"}
}
"""
    product = 2 * 96 * 16 * 32
    found = Module.parse(text.replace("NAME", "jit(step)/gmm"))
    assert work(found).flops == product + 2 * 8
    assert found.unknown_loops == ["jit(step)/LOOP/while"]
    text = text.replace("NAME", "jit(step)/transpose(jvp(even_rows_64_of_96))/gmm")
    found = Module.parse(text.replace("LOOP", "jit(sum_of_further_rounds)"))
    assert work(found).flops == product * 64 // 96
    assert work(found).evenly
    assert not found.unknown_loops


def test_layers_name_what_depends_on_the_use_of_experts_as_plans_read_it() -> None:
    def loss(x: jax.Array) -> jax.Array:
        with even_rows(4, 6):
            return jnp.sum(x @ x)

    computations = module(jax.grad(loss), jnp.ones((6, 6))).computations.values()
    products = [i for computation in computations for i in computation.instructions.values() if i.opcode == "dot"]
    assert len(products) == 2  # gradients of the two factors
    for product in products:
        found = EVEN_ROWS.search(product.source)
        assert found is not None
        assert found.groups() == ("4", "6")

    rounds = module(lambda num, x: sum_of_further_rounds(lambda i, x: x * x, num, x), jnp.asarray(3), jnp.ones(2))
    loops = [i for c in rounds.computations.values() for i in c.instructions.values() if i.opcode == "while"]
    assert loops
    assert all(UNEVEN in loop.source for loop in loops)
