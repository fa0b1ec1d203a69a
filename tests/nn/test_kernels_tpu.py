"""Attention compiled by the real TPU compiler, which needs no TPU."""

import pytest

from tests import tpu_compiler

PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies

from llmlab.nn.kernels import attention
from llmlab.nn.masks import Causal, Segments, SlidingWindow
from llmlab.nn.positions import ALiBi
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = Mesh(data=2, tensor=2).build(devices)


def gradient(q, k, v, ids):
    mask = Causal() & SlidingWindow(left=255) & Segments(ids, ids)
    loss = lambda *a: attention(*a, mask=mask, scale=0.125, **SETTINGS).astype(jnp.float32).sum()
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


with activate(mesh):
    def abstract(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=active_sharding(shape, *names))

    q = abstract((4, 2048, 8, 64), jnp.bfloat16, "batch", None, "heads", None)
    k = abstract((4, 2048, 2, 64), jnp.bfloat16, "batch", None, "kv_heads", None)
    compiled = jax.jit(gradient).lower(q, k, k, abstract((4, 2048), jnp.int32, "batch", None)).compile()
text = compiled.as_text()
print(json.dumps({
    "kernels": text.count("tpu_custom_call"),
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "collectives": [name for name in ("all-gather", "all-to-all", "collective-permute") if name in text],
}))
"""


@pytest.mark.parametrize("settings", ["{'softcap': 50.0}", "{'bias': ALiBi().build(8, rngs=None).bias()}"])
def test_auto_compiles_to_splash_attention_for_tpu_on_every_devices_own_rows_and_heads(settings: str) -> None:
    result = tpu_compiler.run(PROGRAM.replace("SETTINGS", settings))
    assert result["kernels"] == 3  # forward, gradient of q, gradient of k and v
    assert result["collectives"] == []
    # one matrix of weights would be 2 rows x 4 heads x 2048^2 x 4 bytes = 134 MB a device
    assert result["temporary"] < 32e6
