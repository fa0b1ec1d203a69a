"""Offloading, compiled by the real TPU compiler, which needs no TPU: what leaves the memory of the devices."""

import pytest

from tests import tpu_compiler

pytestmark = pytest.mark.scale

PROGRAM = """
import json
from dataclasses import replace

import jax, numpy as np
from jax.experimental import topologies

from llmlab.models import llama
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import AdamW
from llmlab.sharding import Mesh
from llmlab.training.config import Train
from llmlab.training.program import Program

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
rows, length = 8, 1024
batch = {name: np.zeros((rows, length), np.int32) for name in ("input_ids", "labels")}


def memory(remat="dots", **settings):
    model = replace(
        llama.preset("nano").with_vocabulary(1024), num_layers=4, execution=Execution(mode="scan", remat=remat)
    )
    train = Train(steps=2, batch_size=rows, sequence_length=length, precision="bfloat16", **settings)
    mesh = Mesh(fsdp=4, data=1).build(devices)
    # Few scores at once: those of whole rows are as large as the activations, and would be what is left of the peak.
    program = Program.build(model, NextToken(chunk=256), AdamW(peak_lr=1e-3), mesh, train, batch)
    account = program.train_step.lower(program.state, program.batch).compile().memory_analysis()
    return {
        "parameters": program.num_parameters,
        "arguments": account.argument_size_in_bytes,
        "host_arguments": account.host_argument_size_in_bytes,
        "host_outputs": account.host_output_size_in_bytes,
        "temporary": account.temp_size_in_bytes,
        "host_temporary": account.host_temp_size_in_bytes,
    }


print(json.dumps({"plain": memory(), "offloaded": memory(remat="offload", offload_optimizer=True)}))
"""


def test_what_is_offloaded_leaves_the_devices_memory() -> None:
    found = tpu_compiler.run(PROGRAM)
    plain, offloaded = found["plain"], found["offloaded"]
    moments = 2 * 4 * plain["parameters"] / 4  # two float32 numbers a parameter, over four devices
    assert plain["host_arguments"] == plain["host_temporary"] == 0
    # Small arrays are padded to tiles, on the devices and on the host alike: here two fifths of all.
    assert moments < offloaded["host_arguments"] < 1.5 * moments
    assert offloaded["host_outputs"] == offloaded["host_arguments"]
    assert plain["arguments"] - offloaded["arguments"] == pytest.approx(offloaded["host_arguments"], rel=1e-3)
    # Of activations: what the matmuls of a layer give (query, key, value, output, gate, up; nobody needs down's again),
    # in bfloat16, for four layers and a device's 2 rows.
    widths = 192 + 64 + 64 + 192 + 512 + 512
    assert offloaded["host_temporary"] == pytest.approx(4 * 2 * 1024 * widths * 2, rel=0.05)
    assert plain["temporary"] - offloaded["temporary"] > 0.8 * offloaded["host_temporary"]
