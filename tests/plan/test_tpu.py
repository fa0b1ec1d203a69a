"""The estimator against the real TPU compiler, which needs no TPU."""

import dataclasses
import json
from typing import Any

import pytest

from tests import tpu_compiler

pytestmark = pytest.mark.scale

PROGRAM = """
import dataclasses, json
import numpy as np
from llmlab.commands.plan_arithmetic import Arithmetic
from llmlab.commands.plan_worker import program_of
from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.llama import llama
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Constant
from llmlab.plan.compile import plan
from llmlab.plan.topology import Topology
from llmlab.sharding import Mesh
from llmlab.training.config import Train

topology = Topology.parse("v5p:2x2x1")
devices = topology.devices()


def experiment(remat, mesh, **train):
    model = llama(embed_dim=512, num_layers=4, num_heads=8, num_kv_heads=8, hidden_dim=1024, vocab_size=1024)
    return Experiment(
        model=dataclasses.replace(model, execution=Execution(remat=remat)),
        data=Packed(StandardLibrary()),
        objective=NextToken(chunk=512),
        optimizer=AdamW(peak_lr=1e-3, schedule=Constant()),
        mesh=mesh,
        train=Train(steps=10, batch_size=64, sequence_length=512, **train),
    )


def answer(one):
    planned = plan(program_of(one, devices), topology)
    arithmetic = Arithmetic(one).estimate(
        mesh=one.mesh,
        num_devices=4,
        remat=one.model.execution.remat,
        accumulation=1,
        precision=one.train.precision,
    )
    return {**planned.to_json(), "estimate": arithmetic.temporaries}


print(json.dumps({
    "data": answer(experiment("none", Mesh(data=4), precision="bfloat16")),
    "fsdp": answer(experiment("full", Mesh(data=1, fsdp=4), precision="float32")),
}))
"""


@pytest.fixture(scope="module")
def plans() -> dict[str, Any]:
    return tpu_compiler.run(PROGRAM)


MATRICES = 4 * 512 * 512 + 3 * 512 * 1024
LAYER = MATRICES + 2 * 512
NORMS = 4 * 2 * 512 + 512
TABLE = 1024 * 512
PARAMETERS = 4 * LAYER + 2 * TABLE + 512


def test_arguments_are_the_arrays_sizes_and_a_little_padding(plans: dict[str, Any]) -> None:
    for plan, ways in ((plans["data"], 1), (plans["fsdp"], 4)):
        memory = plan["memory"]
        assert memory["parameters"] == 4 * PARAMETERS // ways
        assert memory["batch"] == 4 * (64 * 512 * 4) // 4
        assert 8 * PARAMETERS // ways <= memory["optimizer"] <= 8 * PARAMETERS // ways + 64
        # Vectors fill tiles of 1024 numbers, and nothing else is padded.
        assert 0 <= memory["padding"] < 0.01 * memory["arguments"]


def test_gradients_are_reduced_once_in_pure_data_parallelism(plans: dict[str, Any]) -> None:
    (row,) = plans["data"]["traffic"]
    assert (row["kind"], row["axes"]) == ("all-reduce", ["data"])
    # Bytes that leave a chip are 2 (n - 1)/n of the array, n = 4. Gradients travel as bfloat16, those of norms perhaps
    # as float32; a few scalars are summed as well.
    assert 2 * PARAMETERS < row["sent"] / 1.5 <= 2 * PARAMETERS + 2 * NORMS + 64


def test_layers_are_gathered_twice_and_gradients_reduced_once_in_pure_fsdp(plans: dict[str, Any]) -> None:
    sent = {row["kind"]: row["sent"] for row in plans["fsdp"]["traffic"]}
    # Matrices travel as bfloat16 even in float32 training: that is what the matrix unit takes. Norms and the embedding,
    # whose rows are looked up, travel as they are.
    gathered = 2 * (2 * 4 * MATRICES + TABLE) + 4 * (2 * 4 * 2 * 512 + 512 + TABLE)
    assert sent["all-gather"] == pytest.approx(0.75 * gathered, rel=1e-6)
    # What is not scattered is all-reduced, which sends twice as much: full arrays sum to all gradients.
    full = sent["reduce-scatter"] / 0.75 + sent["all-reduce"] / 1.5
    assert full == pytest.approx(4 * PARAMETERS, rel=1e-3)


def test_full_rematerialisation_costs_a_forward_pass_of_the_layers(plans: dict[str, Any]) -> None:
    """Model FLOPs of a token: 6 for each matrix element, 12 S D a layer in attention. The kernels make 9 products of
    queries and keys where the model's formula has 6; recomputing a layer adds its matrices' forward pass (its
    attention's output and log-sum are kept), and 2 products."""
    matrices, attention = 2 * 4 * MATRICES, 4 * 4 * 512 * 512
    model = 3 * (matrices + 2 * TABLE + attention)
    assert plans["data"]["flops"]["model"] == 64 * 512 * model
    extra = attention / 2 * 3
    assert plans["data"]["flops"]["ratio"] == pytest.approx(1 + extra / model, rel=1e-3)
    assert plans["fsdp"]["flops"]["ratio"] > 1 + (extra + 0.8 * matrices) / model
    assert plans["fsdp"]["flops"]["ratio"] < 1 + (extra + matrices + attention) / model + 1e-3


def test_memory_by_arithmetic_is_within_a_factor_of_two_of_the_compilers(plans: dict[str, Any]) -> None:
    for plan in plans.values():
        assert 0.5 < plan["estimate"] / plan["memory"]["temporaries"] < 2.0


def test_a_plan_survives_json(plans: dict[str, Any]) -> None:
    from llmlab.plan.report import Plan

    for data in plans.values():
        plan = Plan.from_json(data)
        again = json.loads(json.dumps(plan.to_json()))
        assert Plan.from_json(again) == plan
        assert dataclasses.asdict(plan.memory)["needed"] is None


def test_what_does_not_fit_is_an_answer_with_the_compilers_number() -> None:
    program = """
import json
from llmlab.plan.compile import memory_needed
print(json.dumps([memory_needed(text) for text in (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (223.59G) exceeds "
    "available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of 15.75G "
    "hbm. Exceeded hbm capacity by 4.35G.",
    "INVALID_ARGUMENT: no",
)]))
"""
    assert tpu_compiler.run(program) == [round(223.59 * 2**30), round(20.1 * 2**30), None]
