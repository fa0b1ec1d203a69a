"""Attention compiled by the real TPU compiler, which needs no TPU; in its own process, away from the CPU backend."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json
import jax, jax.numpy as jnp
from jax.experimental import topologies

from llmlab.nn.kernels import attention
from llmlab.nn.masks import Causal, Segments, SlidingWindow
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
mesh = Mesh(data=2, tensor=2).build(devices)


def gradient(q, k, v, ids):
    mask = Causal() & SlidingWindow(left=255) & Segments(ids, ids)
    loss = lambda *a: attention(*a, mask=mask, scale=0.125, softcap=50.0).astype(jnp.float32).sum()
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


def test_auto_compiles_to_splash_attention_for_tpu_on_every_devices_own_rows_and_heads() -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install 'llmlab[tpu]' brings it")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",  # nothing runs; the TPU compiler is asked for by topology
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kernels"] == 3  # forward, gradient of q, gradient of k and v
    assert result["collectives"] == []
    # one matrix of weights would be 2 rows x 4 heads x 2048^2 x 4 bytes = 134 MB a device
    assert result["temporary"] < 32e6
