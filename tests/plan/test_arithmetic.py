"""Memory by arithmetic, topologies, the roofline's formulas and the search's candidates, against counts by hand."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.commands.plan_arithmetic import Arithmetic, for_accelerator, with_remat
from llmlab.commands.plan_search import Outcome, changed, choose
from llmlab.commands.plan_worker import settled
from llmlab.data import Packed, StandardLibrary
from llmlab.data.masking import TokenMasking
from llmlab.experiment import Experiment
from llmlab.models.llama import llama
from llmlab.objectives import MaskedToken, NextToken
from llmlab.optim import SGD, AdamW, Constant
from llmlab.plan.collectives import Collective
from llmlab.plan.compile import bytes_per_device, remarks
from llmlab.plan.memory import kept, parse_size
from llmlab.plan.report import Memory, Plan, Times
from llmlab.plan.roofline import num_links, roofline
from llmlab.plan.search import AXES_TRIED, Candidate, Limits, candidates, factorizations
from llmlab.plan.topology import Topology
from llmlab.plan.work import Work
from llmlab.sharding import Mesh
from llmlab.tokenizers import Bytes, SentencePiece, SpecialTokens
from llmlab.training.config import Train
from llmlab.training.program import Program

MODEL = llama(embed_dim=64, num_layers=4, num_heads=8, num_kv_heads=4, hidden_dim=128, vocab_size=384)


def experiment(mesh: Mesh | None = None, **train: Any) -> Experiment:
    return Experiment(
        model=MODEL,
        data=Packed(StandardLibrary()),
        objective=NextToken(),
        optimizer=AdamW(peak_lr=1e-3, schedule=Constant()),
        mesh=mesh or Mesh(),
        train=Train(**{"steps": 10, "batch_size": 16, "sequence_length": 32, **train}),
    )


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=8),
        Mesh(data=1, fsdp=8),
        Mesh(data=1, fsdp=8, zero=1),
        Mesh(data=2, fsdp=2, tensor=2),
        Mesh(data=2, fsdp=4, zero=2),
    ],
)
def test_state_by_arithmetic_is_the_state_that_training_lays_out(mesh: Mesh) -> None:
    one = experiment(mesh)
    model, batch = settled(one)
    placement = mesh.build(jax.devices())
    program = Program.build(model, one.objective, one.optimizer, placement, one.train, batch)
    estimate = Arithmetic(one).estimate(mesh=mesh, num_devices=8, remat="none", accumulation=1, precision="float32")
    assert estimate.parameters == bytes_per_device(program.state.params)
    assert estimate.optimizer == bytes_per_device(program.state.optimizer_state)
    split = 1 if mesh.zero == 1 else math.prod(mesh.sizes()[axis] for axis in ("fsdp",))
    assert estimate.gradients >= 4 * model.num_parameters() // (split * mesh.tensor)


def test_what_the_backward_pass_keeps_grows_with_rows_and_nothing_else() -> None:
    w = jax.ShapeDtypeStruct((8, 16), jnp.float32)

    def loss(w: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(batch["x"] @ w))

    found = kept(loss, w, {"x": np.zeros((5, 8), np.float32)})
    assert found == 4 * (8 + 16)  # x for the gradient of w; the derivative of sin at the product


def test_rematerialisation_keeps_one_stream_a_layer() -> None:
    arithmetic = Arithmetic(experiment())
    none, dots, full = (arithmetic.kept(remat, "float32") for remat in ("none", "dots", "full"))
    stream = 4 * 32 * 64  # one layer's input, of a row
    assert full < dots < none
    assert 4 * stream <= full <= 4 * stream + 8 * stream  # and the ends of the model
    # dots adds the outputs of matrices that a gradient needs: q, k, v, attention's, gate, up; down's is only added
    width = 64 + 32 + 32 + 64 + 128 + 128
    assert dots - full == pytest.approx(4 * 4 * 32 * width, rel=0.02)


def test_accumulation_divides_activations_and_adds_a_sum_of_gradients() -> None:
    arithmetic = Arithmetic(experiment())
    whole, parts = (
        arithmetic.estimate(mesh=Mesh(), num_devices=1, remat="full", accumulation=n, precision="bfloat16")
        for n in (1, 4)
    )
    assert whole.activations == 4 * parts.activations
    assert parts.gradients == 3 * whole.gradients  # float32 beside bfloat16
    sgd = SGD(peak_lr=1e-3, schedule=Constant())
    lean = arithmetic.estimate(
        mesh=Mesh(), num_devices=1, remat="full", accumulation=1, precision="bfloat16", optimizer=sgd
    )
    assert whole.optimizer > 2 * whole.parameters - 100
    assert lean.optimizer < 100


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(text) for text in ("80GB", "24GiB", "16G", "512 mb")] == [80e9, 24 * 2**30, 2**34, 512e6]
    for text in ("80", "GB", "lots", "1.2.3GB"):
        with pytest.raises(ValueError, match="80GB, 24GiB"):
            parse_size(text)


def test_what_auto_chooses_on_accelerators_keeps_no_matrix_of_weights() -> None:
    changed = for_accelerator(MODEL)
    assert (changed.execution.mode, changed.pattern[0].mixer.kernel) == ("scan", "blockwise")
    assert for_accelerator(changed) == changed
    assert with_remat(MODEL, "dots").execution.remat == "dots"


# --- batches ---------------------------------------------------------------------------------------------------------


def shapes(one: Experiment) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (array.shape, str(array.dtype)) for name, array in settled(one)[1].items()}


def built(one: Experiment, tokenizer: Any, tmp_path: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    from llmlab.data.sources import TextFiles

    (tmp_path / "a.txt").write_text("one text of some words\n" * 40)
    (tmp_path / "b.txt").write_text("and another one, of others\n" * 40)
    data = dataclasses.replace(
        one.data, source=TextFiles(str(tmp_path / "a.txt")), validation=TextFiles(str(tmp_path / "b.txt"))
    )
    train = one.train
    dataset = data.build(
        tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=0, cache_dir=tmp_path
    )
    return {name: (array.shape, str(array.dtype)) for name, array in dataset.train.batch(0).items()}


@pytest.mark.parametrize("isolate", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_made_up_batch_has_the_shapes_of_a_real_one(masked: bool, isolate: bool, tmp_path: Any) -> None:
    special = SpecialTokens(mask="[MASK]", pad="[PAD]", cls="[CLS]", sep="[SEP]", bos=None, eos=None)
    corruption = TokenMasking() if masked else None
    one = dataclasses.replace(
        experiment(),
        tokenizer=Bytes(special=special),
        data=Packed(StandardLibrary(), isolate=isolate, corruption=corruption),
        objective=MaskedToken() if masked else NextToken(),
    )
    assert shapes(one) == built(one, Bytes(special=special).build(), tmp_path)


def test_the_vocabulary_of_a_tokenizer_that_is_still_to_be_trained_is_its_configs() -> None:
    one = dataclasses.replace(
        experiment(),
        model=dataclasses.replace(MODEL, vocab_size=None),
        tokenizer=SentencePiece(vocab_size=1000),
    )
    assert settled(one)[0].vocab_size == 1024


# --- topologies and the roofline -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("v9:2x2", "name a chip and the shape"),
        ("v5p", "name a chip and the shape"),
        ("v5p:4x4", "wired in 3 dimensions and this has 2"),
        ("v5p:3x3x3", "multiples of 4 in every dimension"),
        ("v5e:3x5", "slices are 1x1, 2x2"),
        ("v5e:32x16", "--mesh.slices 2"),
    ],
)
def test_an_impossible_topology_is_refused_with_what_would_work(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Topology.parse(name)


def test_chips_are_counted_over_slices() -> None:
    assert Topology.parse("v5p:4x4x8").num_chips == 128
    assert Topology.parse("v5e:4x8", num_slices=2).num_chips == 64


CUBE = Topology.parse("v5p:4x4x4")
PLACES = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]


def test_a_group_uses_the_links_of_the_dimensions_it_runs_along() -> None:
    row, plane = [[0, 1, 2, 3]], [list(range(16))]
    assert num_links(row, CUBE, PLACES) == 2  # a ring of four, both ways
    assert num_links(plane, CUBE, PLACES) == 4
    assert num_links(row, CUBE, PLACES, both_ways=False) == 1
    flat = Topology.parse("v5e:4x8")  # lines: rings need 16
    assert num_links([[0, 1, 2]], flat, [(0, i, 0) for i in range(8)]) == 1


def test_the_roofline_is_bytes_and_flops_over_the_chips_constants() -> None:
    gather = Collective(
        kind="all-gather", axes=("fsdp",), times=10, group_size=4, num_slices=1, full_bytes=4 * 10**9,
        groups=[[0, 1, 2, 3]], source="",
    )  # fmt: skip
    done = Work(flops=10**15, traffic=10**12)
    times = roofline(CUBE, done, [gather], model_flops=32 * 10**15, coords=PLACES)
    assert times.compute == pytest.approx(1e15 / 459e12)
    assert times.memory == pytest.approx(1e12 / 2.765e12)
    assert times.interconnect == pytest.approx(10 * 3e9 / (2 * 9e10))
    assert times.bound == "compute"
    assert times.mfu == pytest.approx(0.5)  # 64 chips did 10^15 each for 32 x 10^15
    assert times.mfu_without_overlap == pytest.approx(0.5 * times.compute / sum(times.parts.values()))


# --- search ----------------------------------------------------------------------------------------------------------


def test_every_factorization_is_found_once() -> None:
    found = list(factorizations(12, 3))
    assert len(found) == len(set(found)) == sum(math.prod(t) == 12 for t in np.ndindex(13, 13, 13))
    assert all(math.prod(one) == 12 for one in found)


def test_candidates_divide_what_they_split() -> None:
    limits = Limits.of({"heads": {8}, "mlp": {128}, "embed": {64}}, length=256, batch_size=16)
    found = list(candidates(Mesh(), 16, limits, ("none", "full")))
    assert found
    for one in found:
        sizes = one.mesh.resolve(16)
        rows = sizes["data"] * sizes["fsdp"] * sizes["expert"]
        assert math.prod(sizes[axis] for axis in AXES_TRIED) == 16
        assert 16 // one.accumulation % rows == 0
        assert sizes["expert"] == 1  # there are none
        assert 8 % sizes["tensor"] == 0
        assert sizes["sequence"] in (1, 2)
    assert len({(one.label, one.remat, one.accumulation) for one in found}) == len(found)


def test_a_candidates_flags_give_its_mesh() -> None:
    from llmlab.flags import parse

    limits = Limits.of({"heads": {8}, "mlp": {128}}, length=256, batch_size=16)
    for one in list(candidates(Mesh(), 16, limits, ("dots",)))[::7]:
        changed = parse(experiment(), one.flags(), prog="x")
        assert changed.mesh.resolve(16) == one.mesh.resolve(16)
        assert (changed.model.execution.remat, changed.train.accumulation) == ("dots", one.accumulation)  # type: ignore[attr-defined]  a Transformer


def test_a_search_compiles_the_experiments_own_choices_first_and_nothing_twice() -> None:
    one = experiment(Mesh(fsdp=2), accumulation=2)
    possible, chosen = choose(Arithmetic(one), Topology.parse("v5p:2x2x1"), limit=6)
    assert [each.written for each in chosen] == [True, *[False] * 5]
    assert possible > 6
    own = changed(one, chosen[0])
    assert own.mesh.resolve(4) == one.mesh.resolve(4)
    assert (own.train, own.model) == (one.train, one.model)
    assert len({(each.label, each.remat, each.accumulation) for each in chosen}) == 6


def test_a_search_does_without_choices_that_the_chips_do_not_admit() -> None:
    for mesh in (Mesh(data=1, fsdp=3), Mesh(data=1, tensor=4, sequence=1, fsdp=1, expert=1, pipeline=1)):
        _, chosen = choose(Arithmetic(experiment(mesh, batch_size=16)), Topology.parse("v5p:2x2x2"), limit=4)
        assert chosen
        assert not any(each.written for each in chosen)


def planned(compute: float, memory: float, *, needs: int = 1) -> Outcome:
    """A made-up outcome on a chip with two bytes of memory."""
    times = Times(compute=compute, memory=memory, interconnect=0, between_slices=0, mfu=0, mfu_without_overlap=0)
    space = Memory(capacity=2, parameters=needs, optimizer=0, other=0, batch=0)
    plan = Plan(topology="", num_chips=1, mesh={}, tokens=1, num_parameters=1, memory=space, times=times)
    return Outcome(candidate=Candidate(mesh=Mesh(), remat="none", accumulation=1), plan=plan)


def test_a_search_ranks_what_fits_by_the_bound_and_equal_bounds_by_the_sum_of_their_parts() -> None:
    failed = Outcome(candidate=Candidate(mesh=Mesh(), remat="none", accumulation=1), plan=None, problem="no memory")
    best, as_fast, slower = planned(1.0004, 0.5), planned(1.0, 0.9), planned(1.01, 0.1)
    too_large = planned(0.1, 0.1, needs=3)
    for given in itertools.permutations([failed, too_large, slower, as_fast, best]):
        assert sorted(given, key=lambda one: one.rank) == [best, as_fast, slower, too_large, failed]


def test_the_compilers_complaints_are_found_in_its_output() -> None:
    line = (
        "W1125 23:16:51.824260    4410 spmd_partitioner.cc:630] [SPMD] Involuntary full rematerialization. "
        "The compiler cannot go from sharding A to B"
    )
    (found,) = remarks(f"{line}\nI0000 something else\n{line}\n")
    assert found.startswith("[SPMD] Involuntary full rematerialization")
    assert found.endswith("(2 times)")
