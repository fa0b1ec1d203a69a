"""Attention on a mesh equals attention on one device."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.kernels import Scoring
from llmlab.nn.kernels.blockwise import blockwise
from llmlab.nn.kernels.reference import reference
from llmlab.nn.kernels.relative import relative
from llmlab.nn.kernels.splash import splash
from llmlab.nn.kernels.unrolled import unrolled
from llmlab.nn.masks import Causal, Full, Segments
from llmlab.nn.positions import T5Bias
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

KERNELS = {
    "blockwise": partial(blockwise, block=64),
    "unrolled": unrolled,
    "splash": partial(splash, interpret=True),
    "relative": partial(relative, interpret=True),
}


@pytest.mark.scale
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads split", "groups split"])
def test_a_kernel_on_a_mesh_equals_the_reference_on_one_device(kernel: str, kv_heads: int) -> None:
    """Rows over 2 devices, heads over 4: with 2 key/value heads it is their groups of queries that are split."""
    random = np.random.default_rng(0)
    shapes = [(4, 128, 8, 16), (4, 128, kv_heads, 16), (4, 128, kv_heads, 16)]
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    ids = jnp.asarray(np.sort(random.integers(0, 3, (4, 128)), axis=1))

    def solve(
        run: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array
    ) -> tuple[jax.Array, ...]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            o = run(q, k, v, Scoring(mask=Causal() & Segments(ids, ids), scale=0.25))
            return jnp.sum(jnp.sin(o)), o

        gradients, o = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return o, *gradients

    want = jax.jit(partial(solve, reference))(*arrays, ids)
    with activate(Mesh(data=2, tensor=4).build(jax.devices())):
        names = [("batch", None, "heads", None), *[("batch", None, "kv_heads", None)] * 2]
        shardings = [active_sharding(x.shape, *n) for x, n in zip(arrays, names, strict=True)]
        placed = [jax.device_put(x, s) for x, s in zip(arrays, shardings, strict=True)]
        got = jax.jit(partial(solve, KERNELS[kernel]))(
            *placed, jax.device_put(ids, active_sharding(ids.shape, "batch", None))
        )
    assert len(got[1].sharding.device_set) == 8
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)  # float32 sums in another order


def test_the_gradient_of_a_bias_is_summed_over_the_devices_that_share_its_head() -> None:
    """Rows over 2 devices, heads over 4, of which two read one key/value head."""
    random = np.random.default_rng(0)
    shapes = [(4, 128, 8, 16), (4, 128, 2, 16), (4, 128, 2, 16)]
    arrays = [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]
    table_NR = jnp.asarray(random.normal(size=(8, 41)), jnp.float32)

    def gradient(run: Callable[..., jax.Array], table_NR: jax.Array) -> jax.Array:
        def loss(table_NR: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(run(*arrays, Scoring(mask=Full(), bias=T5Bias(table_NR), scale=0.25))))

        return jax.grad(loss)(table_NR)

    want = jax.jit(partial(gradient, reference))(table_NR)
    with activate(Mesh(data=2, tensor=4).build(jax.devices())):
        got = jax.jit(partial(gradient, partial(relative, interpret=True)))(table_NR)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)  # float32 sums in another order
