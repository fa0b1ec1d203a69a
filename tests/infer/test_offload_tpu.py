"""Layers in the host's memory, compiled by the real TPU compiler, which needs no TPU: when they are on the device."""

import pytest

from tests import tpu_compiler

pytestmark = pytest.mark.scale

PROGRAM = """
import dataclasses, json

import jax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from llmlab.infer import decoding
from llmlab.infer.offload import offload, offloaded_bytes
from llmlab.models.llama import llama
from tests.infer.offloading import decode_call

device = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices[0]
config = llama(embed_dim=256, num_layers=8, num_heads=4, num_kv_heads=2, hidden_dim=512, vocab_size=256)


def there(leaf):
    kind = leaf.sharding.memory_kind if isinstance(leaf, jax.Array) else "device"
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SingleDeviceSharding(device, memory_kind=kind))


def compiled(count):
    moved = offload(config.build(nnx.Rngs(params=0)), count)
    program, steps, *arguments = decode_call(moved)
    done = decoding._decode.lower(program, steps, *jax.tree.map(there, arguments)).compile()
    account = done.memory_analysis()
    transfers, computation = {}, None
    for line in done.as_text().splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.split()[0]
        if " copy-start(" in line and "S(5)" in line:
            transfers[computation] = transfers.get(computation, 0) + 1
    return {
        "layers": offloaded_bytes(moved),
        "host": account.host_argument_size_in_bytes,
        "arguments": account.argument_size_in_bytes,
        "temporary": account.temp_size_in_bytes,
        "transfers": transfers,
        "leaves": len(jax.tree.leaves(nnx.split(moved.stack.remainder[7])[1])),
    }


print(json.dumps({"plain": compiled(0), "offloaded": compiled(6)}))
"""


def test_one_layer_at_a_time_is_on_the_device_inside_the_loop_of_steps() -> None:
    found = tpu_compiler.run(PROGRAM)
    plain, offloaded = found["plain"], found["offloaded"]
    assert (plain["host"], plain["transfers"]) == (0, {})
    assert offloaded["host"] == pytest.approx(sum(offloaded["layers"]), rel=0.01)
    assert plain["arguments"] - offloaded["arguments"] == pytest.approx(offloaded["host"], rel=0.01)
    assert offloaded["temporary"] - plain["temporary"] < 1.5 * max(offloaded["layers"])  # all of them are six
    ((computation, count),) = offloaded["transfers"].items()  # one loop's body, not the program around it
    assert computation != "ENTRY"
    assert count == 6 * offloaded["leaves"]
