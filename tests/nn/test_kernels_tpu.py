"""Attention compiled by the real TPU compiler, which needs no TPU."""

import pytest

from tests import tpu_compiler

pytestmark = pytest.mark.scale

PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies

from llmlab.nn.kernels import attention
from llmlab.nn.masks import Causal, Segments, SlidingWindow
from llmlab.nn.positions import ALiBi, T5Bias
from llmlab.plan.hlo import Module
from llmlab.plan.work import work
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = Mesh(data=2, tensor=2).build(devices)


def gradient(q, k, v, ids, table):
    def loss(q, k, v, table):
        mask = Causal() & SlidingWindow(left=255) & Segments(ids, ids)
        return attention(q, k, v, mask=mask, scale=0.125, **SETTINGS).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, table)


with activate(mesh):
    def abstract(shape, dtype, *names):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=active_sharding(shape, *names))

    q = abstract((4, 2048, 8, 64), jnp.bfloat16, "batch", None, "heads", None)
    k = abstract((4, 2048, 2, 64), jnp.bfloat16, "batch", None, "kv_heads", None)
    ids = abstract((4, 2048), jnp.int32, "batch", None)
    table = abstract((8, 257), jnp.float32, "heads", None)
    compiled = jax.jit(gradient).lower(q, k, k, ids, table).compile()
text = compiled.as_text()
print(json.dumps({
    "kernels": text.count("tpu_custom_call"),
    "flops": work(Module.parse(text)).kernel_flops,
    "temporary": compiled.memory_analysis().temp_size_in_bytes,
    "collectives": [name for name in ("all-gather", "all-to-all", "collective-permute") if name in text],
}))
"""


@pytest.mark.parametrize(
    ("settings", "width"),
    [
        ("{'softcap': 50.0}", 64),
        ("{'bias': ALiBi().build(8, rngs=None).bias()}", 64 + 6),
        ("{'bias': T5Bias(table)}", 64),
    ],
    ids=["splash", "splash with slopes", "relative"],
)
def test_auto_compiles_to_a_flash_kernel_for_tpu_on_every_devices_own_rows_and_heads(settings: str, width: int) -> None:
    result = tpu_compiler.run(PROGRAM.replace("SETTINGS", settings))
    assert result["kernels"] == 3  # forward, gradient of q (and bias), gradient of k and v
    assert result["collectives"] == []
    # one matrix of weights would be 2 rows x 4 heads x 2048^2 x 4 bytes = 134 MB a device
    assert result["temporary"] < 32e6
    # Forward 2 products of queries and keys, backward 7: five of them as wide as a key, four as wide as a value.
    assert result["flops"] == 2 * (2 * 4 * 2048 * 2048) * (5 * width + 4 * 64)
