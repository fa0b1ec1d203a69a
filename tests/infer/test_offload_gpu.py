"""Layers in the host's memory of a real GPU; run with JAX_PLATFORMS=cuda."""

import gc
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from llmlab.infer import decoding
from llmlab.infer.offload import offload, offloaded_bytes
from llmlab.infer.steps import prepare
from llmlab.models.llama import llama
from llmlab.nn.module import split
from tests.infer.offloading import decode_call, in_host_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

LAYERS, OFFLOADED = 8, 6
CONFIG = llama(embed_dim=1024, num_layers=LAYERS, num_heads=8, num_kv_heads=2, hidden_dim=2816, vocab_size=1024)


def bytes_in_use() -> int:
    gc.collect()  # modules are in cycles
    return jax.local_devices()[0].memory_stats()["bytes_in_use"]


def test_the_devices_memory_is_free_of_what_is_offloaded_and_the_numbers_are_the_same() -> None:
    model = in_host_memory(CONFIG.build(nnx.Rngs(params=0)))
    steady = []
    scores = []
    for count in (0, OFFLOADED):
        before = bytes_in_use()
        moved = offload(model, count)
        steady.append(bytes_in_use() - before)
        scores.append(logits(moved))
        waiting = sum(offloaded_bytes(moved))
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(split(moved)[1]))
        assert steady[-1] == pytest.approx(weights - waiting, rel=0.02)
        del moved
    assert waiting > 0.6 * weights
    assert steady[0] - steady[1] == pytest.approx(waiting, rel=0.02)
    # the same sums, which another program may take in another order
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-5 * np.abs(scores[0]).max())


def test_a_loop_of_steps_has_one_layer_on_the_device_at_a_time() -> None:
    """If the transfers were done before the loop, or all at once, the program would need room for all layers."""
    moved = offload(in_host_memory(CONFIG.build(nnx.Rngs(params=0))), OFFLOADED)
    call = decode_call(moved)
    compiled: Any = decoding._decode.lower(*call).compile()
    layer = max(offloaded_bytes(moved))
    # one layer of 45 MB and a workspace of 32 MiB for matmuls; six layers would be 270 MB
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * layer
    decoding._decode(*call)[0].token_B.block_until_ready()


def logits(model: Any) -> np.ndarray:
    """Scores after a prompt, and after one more token."""
    steps, params = prepare(model)
    token_BS = jax.numpy.arange(64).reshape(2, 32) % 1000

    @jax.jit
    def run(params: Any) -> jax.Array:
        position_BS = jax.numpy.broadcast_to(jax.numpy.arange(32), (2, 32))
        first_BSD, state = steps.prefill(params, steps.new_state(2, 64), token_BS, position_BS)
        last_BSD, _ = steps.step(params, state, token_BS[:, :1], position_BS[:, -1:] + 1)
        return steps.project(params, jax.numpy.concatenate([first_BSD, last_BSD], axis=1))

    with jax.default_matmul_precision("highest"):  # float32 matmuls on GPU would round to TF32
        return np.asarray(run(params))
