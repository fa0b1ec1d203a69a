"""Attention whose sequence is split over devices equals the equation on one, and does what it promises to the cost."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from llmlab.nn.kernels import Bias, attention, dispatch
from llmlab.nn.kernels.context import by_all_to_all, split
from llmlab.nn.kernels.reference import reference
from llmlab.nn.kernels.ring_schedule import Ring, Schedule, best
from llmlab.nn.kernels.scoring import Scoring
from llmlab.nn.kernels.splash import splash
from llmlab.nn.masks import Causal, Full, Groups, Marked, Mask, Padding, Prefix, Segments, SlidingWindow
from llmlab.nn.positions import ALiBi, T5Relative
from llmlab.plan.cost import count
from llmlab.sharding import Mesh, activate, sequence
from llmlab.sharding.rules import Context, active_sharding
from tests import optimised, tpu_compiler

pytestmark = pytest.mark.scale

ROWS, HEAD_DIM = 4, 8


@dataclass(frozen=True)
class Problem:
    """An attention to compute."""

    mask: Mask
    heads: int = 4
    kv_heads: int = 2
    bias: Bias | None = None
    softcap: float | None = None
    dropout: float = 0.0
    num_queries: int = 48
    num_keys: int = 48

    def inputs(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        random = np.random.default_rng(0)
        shapes = [(self.num_queries, self.heads), *[(self.num_keys, self.kv_heads)] * 2]
        q, k, v = (jnp.asarray(random.normal(size=(ROWS, *shape, HEAD_DIM)), jnp.float32) for shape in shapes)
        return q, k, v


def padding(num_tokens: int) -> Padding:
    """Some padding before row 0, some after row 1, none in row 2, and nothing else in row 3."""
    place = np.arange(num_tokens)
    return Padding(jnp.asarray(np.stack([place >= 5, place < num_tokens - 7, place >= 0, place < 0])))


def documents(num_tokens: int) -> Segments:
    ids = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (ROWS, num_tokens)), axis=1))
    return Segments(ids, ids)


def t5(heads: int, *, bidirectional: bool) -> Bias:
    config = T5Relative(num_buckets=8, max_distance=20, bidirectional=bidirectional)
    return config.build(heads, rngs=nnx.Rngs(0)).bias()


def alibi(heads: int) -> Bias:
    return ALiBi().build(heads, rngs=nnx.Rngs(0)).bias()


MARKED = Marked(jnp.asarray(np.random.default_rng(2).random((ROWS, 48)) < 0.2))
GROUPS = Groups(jnp.asarray(np.random.default_rng(3).random((ROWS, 48, 6)) < 0.6), size=8)
PROBLEMS: Mapping[str, Problem] = {
    "full": Problem(Full()),
    "causal": Problem(Causal(), heads=8, kv_heads=2, dropout=0.2),
    "causal, one kv head, soft cap": Problem(Causal(), kv_heads=1, softcap=1.5),
    "causal, padding, ALiBi": Problem(Causal() & padding(48), kv_heads=4, bias=alibi(4)),
    "causal, documents, T5": Problem(
        Causal() & documents(48), heads=8, kv_heads=4, bias=t5(8, bidirectional=False), dropout=0.1
    ),
    "causal window": Problem(Causal() & SlidingWindow(left=9), dropout=0.2),
    "window": Problem(SlidingWindow(left=11, right=3) & padding(48), kv_heads=1),
    "prefix": Problem(Prefix(jnp.array([0, 9, 30, 48])), bias=alibi(4), dropout=0.1),
    "padding, T5": Problem(padding(48), bias=t5(4, bidirectional=True), softcap=2.0),
    "marked": Problem(MARKED),
    "cross": Problem(padding(80), num_keys=80, bias=t5(4, bidirectional=True), dropout=0.3),
    "cross, groups": Problem(GROUPS, num_queries=48, num_keys=48, kv_heads=4),
    "uneven blocks": Problem(Causal() & documents(52), num_queries=52, num_keys=52, dropout=0.1),
}

MESHES: Mapping[str, Mesh] = {
    "2": Mesh(data=1, sequence=2),
    "4": Mesh(data=1, sequence=4),
    "8": Mesh(data=1, sequence=8),
    "data x 4": Mesh(data=2, sequence=4),
    "data x 2 x tensor": Mesh(data=2, sequence=2, tensor=2),
    "fsdp x 2 x expert": Mesh(data=1, fsdp=2, sequence=2, expert=2),
    "2 x tensor 4": Mesh(data=1, sequence=2, tensor=4),
}

# Every mesh meets causal and other work, every problem one device of each kind of split; the ring's own shares differ
# between causal, windowed and other masks, which all meet several sizes.
CASES: tuple[tuple[Context, str, str], ...] = (
    ("ring", "2", "uneven blocks"),
    ("ring", "2", "padding, T5"),
    ("ring", "4", "causal window"),
    ("ring", "4", "full"),
    ("ring", "4", "marked"),
    ("ring", "8", "causal"),
    ("ring", "8", "window"),
    ("ring", "data x 4", "causal, padding, ALiBi"),
    ("ring", "data x 4", "cross"),
    ("ring", "data x 2 x tensor", "causal, documents, T5"),
    ("ring", "data x 2 x tensor", "causal, one kv head, soft cap"),
    ("ring", "data x 2 x tensor", "prefix"),
    ("ring", "fsdp x 2 x expert", "cross, groups"),
    ("ring", "2 x tensor 4", "causal"),
    ("all_to_all", "2", "padding, T5"),
    ("all_to_all", "4", "causal, one kv head, soft cap"),
    ("all_to_all", "8", "causal"),
    ("all_to_all", "data x 4", "cross"),
    ("all_to_all", "data x 4", "window"),
    ("all_to_all", "data x 2 x tensor", "causal, documents, T5"),
    ("all_to_all", "data x 2 x tensor", "prefix"),
    ("all_to_all", "fsdp x 2 x expert", "causal window"),
    ("all_to_all", "2 x tensor 4", "causal"),
)


def build(name: str, context: Context) -> Any:
    mesh = replace(MESHES[name], context=context)
    sizes = mesh.sizes()
    return mesh.build(jax.devices()[: int(np.prod(list(sizes.values())))])


def solve(problem: Problem, kernel: dispatch.Kernel = "auto", dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Output and gradients, those of the bias among them."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, bias: Bias | None) -> tuple[jax.Array, jax.Array]:
        o = attention(
            q,
            k,
            v,
            mask=problem.mask,
            bias=bias,
            scale=0.5,
            softcap=problem.softcap,
            dropout=problem.dropout,
            key=jax.random.key(7),
            kernel=kernel,
        )
        return jnp.sum(jnp.sin(o.astype(jnp.float32))), o

    inputs = (*(x.astype(dtype) for x in problem.inputs()), problem.bias)
    gradients, o = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*inputs)
    found = dict(zip(("q", "k", "v", "bias"), gradients, strict=True)) | {"o": o}
    return {name: value for name, value in found.items() if jax.tree.leaves(value)}


@cache
def expected(name: str) -> dict[str, jax.Array]:
    return solve(PROBLEMS[name], "reference")


def assert_equal(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        (one,), (other,) = jax.tree.leaves(value), jax.tree.leaves(wanted[name])
        # float32 sums in another order: 1e-5 of the largest value.
        limit = 1e-5 * float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=limit, err_msg=name)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 5 tokens, so that short chunks have several and the last is partly empty."""
    monkeypatch.setattr(dispatch, "_CPU_BLOCK", 5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("context", "mesh", "problem"), CASES)
def test_a_split_sequence_equals_one_device(context: Context, mesh: str, problem: str) -> None:
    with activate(build(mesh, context)):
        found = solve(PROBLEMS[problem])
    assert_equal(found, expected(problem))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_it_works_inside_a_map_over_the_pipeline(context: Context) -> None:
    """Two stages of which each computes the attention of its own queries: the mesh's other axes are split inside."""
    problem = PROBLEMS["causal, padding, ALiBi"]
    mesh = Mesh(pipeline=2, data=2, sequence=2, context=context).build(jax.devices())
    stages = jnp.array([1.0, 0.5])

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def stage(factor: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            o = attention(factor * q, k, v, mask=problem.mask, bias=problem.bias, scale=0.5)
            return jnp.sin(o)[None]

        spec = PartitionSpec("pipeline")
        none = PartitionSpec()
        run = jax.shard_map(
            stage,
            mesh=mesh.mesh,
            in_specs=(spec, none, none, none),
            out_specs=spec,
            axis_names={"pipeline"},
            check_vma=False,
        )
        return jnp.sum(run(stages, q, k, v))

    with activate(mesh):
        found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*problem.inputs())

    def alone(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scoring = Scoring(mask=problem.mask, bias=problem.bias, scale=0.5)
        return sum((jnp.sum(jnp.sin(reference(factor * q, k, v, scoring))) for factor in stages), start=jnp.zeros(()))

    wanted = jax.jit(jax.value_and_grad(alone, argnums=(0, 1, 2)))(*problem.inputs())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_it_works_in_a_loop_over_layers_that_are_computed_again(context: Context) -> None:
    problem = PROBLEMS["causal, documents, T5"]
    x, _, _ = problem.inputs()
    weights = jnp.asarray([0.7, 1.3])
    seeds = jax.random.split(jax.random.key(0), 2)

    def loss(x: jax.Array, weights: jax.Array, bias: Bias | None, kernel: dispatch.Kernel) -> jax.Array:
        @jax.checkpoint
        def layer(x: jax.Array, params: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            k = params[0] * x[:, :, ::2]
            o = attention(x, k, k, mask=problem.mask, bias=bias, scale=0.5, dropout=0.1, key=params[1], kernel=kernel)
            return x + o, None

        return jnp.sum(jnp.sin(jax.lax.scan(layer, x, (weights, seeds))[0]))

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))
    with activate(build("data x 2 x tensor", context)):
        found = jax.jit(partial(gradient, kernel="auto"))(x, weights, problem.bias)
    wanted = jax.jit(partial(gradient, kernel="reference"))(x, weights, problem.bias)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * float(jnp.abs(other).max()))


def test_whole_sequences_of_some_heads_run_on_splash() -> None:
    problem = Problem(Causal() & documents(128), num_queries=128, num_keys=128)
    scoring = Scoring(mask=problem.mask, scale=0.5)
    q, k, v = problem.inputs()
    with activate(build("data x 2 x tensor", "all_to_all")):
        on_mesh = split(q, k, scoring)
        assert on_mesh is not None
        run = partial(by_all_to_all, on_mesh, local=partial(splash, interpret=True))
        found = jax.jit(run)(q, k, v, scoring)
    assert_equal({"o": found}, {"o": reference(q, k, v, scoring)})


def test_a_ring_in_bfloat16_sums_in_float32() -> None:
    """Against the float32 truth it errs no more than the reference in bfloat16 does, however many steps it takes."""
    problem = replace(PROBLEMS["full"], num_queries=128, num_keys=128)
    truth = solve(problem, "reference")
    plain = solve(problem, "reference", jnp.bfloat16)
    with activate(build("8", "ring")):
        ring = solve(problem, dtype=jnp.bfloat16)
    for name, value in truth.items():
        error, allowed = (float(jnp.sqrt(jnp.mean((x[name].astype(jnp.float32) - value) ** 2))) for x in (ring, plain))
        assert ring[name].dtype == jnp.bfloat16
        assert error < 1.1 * allowed, name


@pytest.mark.parametrize("size", [2, 3, 8])
def test_zigzag_gives_an_early_and_a_late_chunk_and_comes_back(size: int) -> None:
    mesh = Mesh(data=1, sequence=size).build(jax.devices()[:size])
    spec = PartitionSpec(None, "sequence")
    axes = ("sequence",)
    x = jnp.arange(4.0 * size)[None]

    def there(x: jax.Array) -> jax.Array:
        return sequence.zigzag(x, axes, size)

    def back(x: jax.Array) -> jax.Array:
        return sequence.contiguous(there(x), axes, size)

    found = jax.jit(mesh.shard_map(there, in_specs=(spec,), out_specs=spec))(x)
    chunks = np.arange(4 * size).reshape(2 * size, 2)
    wanted = np.concatenate([[chunks[i], chunks[2 * size - 1 - i]] for i in range(size)]).reshape(-1)
    np.testing.assert_array_equal(found[0], wanted)
    np.testing.assert_array_equal(wanted.reshape(size, 2, 2), chunks[sequence.chunks(size, True)])
    np.testing.assert_array_equal(jax.jit(mesh.shard_map(back, in_specs=(spec,), out_specs=spec))(x), x)


def listed(schedule: Schedule, mesh: Any) -> set[tuple[int, int]]:
    """Every (block of queries, block of keys) of the whole sequence that some device really computes; none twice."""
    ring = schedule.ring

    def pairs() -> tuple[jax.Array, ...]:
        rows = []
        for step, length in enumerate(schedule.lengths):
            i, j, real, theirs = schedule.pairs(step, length)
            own = jnp.asarray(schedule.chunks)[sequence.number(ring.axes)]
            query = own[i // ring.query.num_blocks] * ring.query.num_blocks + i % ring.query.num_blocks
            kv = theirs[j // ring.kv.num_blocks] * ring.kv.num_blocks + j % ring.kv.num_blocks
            rows.append(jnp.stack([query, kv, real.astype(jnp.int32)]))
        return (jnp.concatenate(rows, axis=1),)

    (table,) = jax.jit(mesh.shard_map(pairs, in_specs=(), out_specs=(PartitionSpec(None, "sequence"),)))()
    found = [(int(a), int(b)) for a, b, real in np.asarray(table).T if real]
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize(
    ("mask", "zigzag"),
    [
        (Causal(), True),
        (Full(), False),
        (Causal() & SlidingWindow(left=15), False),
        (SlidingWindow(left=4, right=9), False),
        (Causal() & SlidingWindow(left=100), True),
    ],
    ids=["causal", "full", "causal window", "window", "wide window"],
)
def test_devices_compute_the_blocks_that_the_mask_leaves_and_each_once(mask: Mask, zigzag: bool) -> None:
    mesh = Mesh(data=1, sequence=4).build(jax.devices()[:4])
    schedule = Schedule(best(Ring(("sequence",), 4, False, 128, 128, 4), mask), mask)
    assert schedule.ring.zigzag == zigzag
    place = np.arange(128)
    seen = np.asarray(mask.allowed(place, place))[0].reshape(32, 4, 32, 4).any((1, 3))
    assert listed(schedule, mesh) == {(int(a), int(b)) for a, b in np.argwhere(seen)}


def test_causal_work_is_half_and_the_same_on_every_device() -> None:
    """32 chunks of 4 blocks on 16 devices. In step 0 a device's two chunks meet themselves (10 pairs each) and the late
    one the early one (16); in every other step 2 chunks of 4 are seen. Of all 128 x 128 pairs just over a half."""
    ring = Ring(("sequence",), 16, True, 2048, 2048, 16)
    schedule = Schedule(ring, Causal())
    assert (schedule.counts == [[36] + [32] * 15] * 16).all()
    assert schedule.counts.sum() == 128 * 129 // 2
    contiguous = Schedule(ring._replace(zigzag=False), Causal())
    assert contiguous.counts.sum() == 128 * 129 // 2
    assert contiguous.lengths == (36,) + (64,) * 15  # the last device is never idle, and all others wait for it


def test_a_ring_ends_when_the_window_does() -> None:
    """A window of 16 reaches back over one share of 32 only: two steps of eight."""
    mask = Causal() & SlidingWindow(left=15)
    assert len(Schedule(best(Ring(("sequence",), 8, False, 256, 256, 4), mask), mask).lengths) == 2


def test_the_program_of_a_causal_ring_has_half_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in the program itself: 16 x 16 blocks a pair of queries and keys, 2 matmuls forward and 5 backward."""
    monkeypatch.setattr(dispatch, "_CPU_BLOCK", 16)
    q, k, v = replace(PROBLEMS["full"], num_queries=512, num_keys=512).inputs()

    def flops(mask: Mask) -> int:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return attention(q, k, v, mask=mask, scale=0.5).sum()

        return count(jax.value_and_grad(loss, argnums=(0, 1, 2)), q, k, v).matmul_flops

    with activate(build("4", "ring")):
        full, causal = flops(Full()), flops(Causal())
    each = 7 * 2 * 16 * 16 * HEAD_DIM * ROWS * 4
    assert full == 32 * 32 * each
    assert causal == 32 * 33 // 2 * each


@cache
def compiled(context: Context, mesh: str, kernel: dispatch.Kernel = "auto") -> Any:
    """Forward and backward of one row of 2,048 tokens, causal, optimised; in blocks of 32, small beside a share."""
    shape = (1, 2048, 8, 16)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attention(q, k, v, mask=Causal(), scale=0.25, kernel=kernel)))

    with pytest.MonkeyPatch.context() as patch, activate(build(mesh, context)):
        patch.setattr(dispatch, "_CPU_BLOCK", 32)
        placed = active_sharding(shape, "batch", "sequence", "heads", None)
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=placed)
        return optimised.compiled(jax.grad(loss, argnums=(0, 1, 2)), x, x, x)


def gathered(text: str) -> list[str]:
    """Float arrays that a program gathers from several devices."""
    return re.findall(r"= (f32\[[\d,]*\]).* all-gather", text)


@pytest.mark.parametrize(("context", "has"), [("ring", "collective-permute"), ("all_to_all", "all-to-all")])
def test_no_device_gathers_all_keys(context: Context, has: str) -> None:
    text = compiled(context, "8").as_text()
    assert has in text
    assert gathered(text) == []


def test_automatic_partitioning_does_gather_them() -> None:
    """What the test above would see, if it were there: kernel="blockwise" is partitioned by XLA."""
    assert gathered(compiled("ring", "8", "blockwise").as_text())


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_memory_falls_with_the_number_of_devices(context: Context) -> None:
    two, eight = (compiled(context, mesh).memory_analysis().temp_size_in_bytes for mesh in ("2", "8"))
    assert two > 3 * eight  # 4 but for a block of logits, which is the same for both


def test_heads_that_cannot_be_shared_out_are_an_error_that_names_what_works() -> None:
    q, k, v = PROBLEMS["full"].inputs()
    with (
        activate(build("8", "all_to_all")),
        pytest.raises(ValueError, match=r"4 query heads over 8 devices .* use 4, or mesh.context='ring'"),
    ):
        attention(q, k, v, mask=Full(), scale=0.5)


@pytest.mark.parametrize("context", ["ring", "all_to_all"])
def test_lengths_that_do_not_divide_are_partitioned_automatically(context: Context) -> None:
    problem = replace(PROBLEMS["causal window"], num_queries=45, num_keys=45)
    with activate(build("2", context)):
        found = solve(problem)
    assert_equal(found, solve(problem, "reference"))


TPU = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies

from llmlab.nn.kernels import attention
from llmlab.nn.masks import Causal, Segments
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices


def program(context):
    def gradient(q, k, v, ids):  # a function of its own: jit keeps a trace whatever the placement
        mask = Causal() & Segments(ids, ids)
        loss = lambda *a: attention(*a, mask=mask, scale=0.125, softcap=50.0).astype(jnp.float32).sum()
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    with activate(Mesh(data=1, sequence=4, context=context).build(devices)):
        def abstract(shape, dtype, *names):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=active_sharding(shape, *names))

        q = abstract((1, 4096, 8, 64), jnp.bfloat16, "batch", "sequence", "heads", None)
        k = abstract((1, 4096, 2, 64), jnp.bfloat16, "batch", "sequence", "kv_heads", None)
        ids = abstract((1, 4096), jnp.int32, "batch", "sequence")
        compiled = jax.jit(gradient).lower(q, k, k, ids).compile()
    text = compiled.as_text()
    loops = [body.splitlines() for body in text.split("\\n\\n") if "ENTRY" not in body]

    def first(body, what):
        return next((number for number, line in enumerate(body) if what in line), -1)

    return {
        "behind": sum(
            -1 < first(body, "collective-permute-start(") < first(body, " while(") < first(body, "permute-done(")
            for body in loops
        ),
        "kernels": text.count("tpu_custom_call"),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
        "collectives": [name for name in ("all-to-all", "collective-permute") if name in text],
    }


print(json.dumps({context: program(context) for context in ("ring", "all_to_all")}))
"""


def test_both_compile_for_tpu() -> None:
    result = tpu_compiler.run(TPU)
    assert result["ring"]["kernels"] == 0
    # The compiler's schedule of a step, forward and backward: keys leave, blocks are computed, keys arrive.
    assert result["ring"]["behind"] == 2
    assert result["ring"]["collectives"] == ["collective-permute"]
    assert result["all_to_all"]["kernels"] == 3  # splash: forward, gradient of q, gradient of k and v
    assert result["all_to_all"]["collectives"] == ["all-to-all"]
    # A device's queries are 1 MB; a matrix of its weights would be 8 heads x 1024 x 4096 x 4 bytes = 134 MB.
    assert result["ring"]["temporary"] < 32e6
    assert result["all_to_all"]["temporary"] < 32e6
