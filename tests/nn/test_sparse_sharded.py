"""Attention over lists of keys on a mesh equals that on one device, and every device keeps to its rows and heads."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.kernels import Scoring
from llmlab.nn.kernels.sparse import Grid, Shared, grid, sparse
from llmlab.nn.masks import Full, Segments, SlidingWindow
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

LENGTH, HEADS = 80, 8


def gradient(scattered: bool, q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
    """With shared keys, and near ones or near and scattered ones."""
    index = jnp.broadcast_to(jnp.arange(8), (q.shape[0], 8))
    blocks = np.random.default_rng(1).integers(0, 10, (10, HEADS, 2)).astype(np.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        o_BSNH = sparse(
            q,
            k,
            v,
            Scoring(mask=Segments(ids, ids), scale=0.25),
            cut=Grid(LENGTH, 8, 1) if scattered else grid(LENGTH, 16, 20),
            near=Full() if scattered else SlidingWindow(left=20, right=20),
            shared=Shared(k_BGKH=k[:, :8], v_BGKH=v[:, :8], index_BG=index, real_BG=index >= 0),
            scattered_CKR=jnp.asarray(blocks) if scattered else None,
        )
        return jnp.sum(jnp.sin(o_BSNH))

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
    return value, *gradients


@pytest.mark.parametrize("scattered", [False, True], ids=["near", "near and scattered"])
def test_a_mesh_computes_what_one_device_does_without_exchanging_keys(scattered: bool) -> None:
    random = np.random.default_rng(0)
    arrays = [jnp.asarray(random.normal(size=(4, LENGTH, HEADS, 16)), jnp.float32) for _ in range(3)]
    ids = jnp.asarray(np.sort(random.integers(0, 3, (4, LENGTH)), axis=1))

    def solve(*args: jax.Array) -> tuple[jax.Array, ...]:
        return gradient(scattered, *args)

    want = jax.jit(solve)(*arrays, ids)
    with activate(Mesh(data=2, tensor=4).build(jax.devices())):
        placed: list[Any] = [jax.device_put(x, active_sharding(x.shape, "batch", None, "heads", None)) for x in arrays]
        placed.append(jax.device_put(ids, active_sharding(ids.shape, "batch", None)))
        compiled = jax.jit(solve).lower(*placed).compile()
        got = compiled(*placed)
    text = compiled.as_text()
    assert text is not None
    assert [name for name in ("all-gather", "all-to-all", "collective-permute") if name in text] == []
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # float32 sums in another order
