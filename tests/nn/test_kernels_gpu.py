"""Kernels on a real GPU; run with JAX_PLATFORMS=cuda."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.kernels import Kernel, attention
from llmlab.nn.masks import Causal, Full, Mask, Padding, Segments, SlidingWindow

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="there is no GPU"),
]

IDS = jnp.asarray(np.arange(256)[None] // np.array([[100], [60]]))
PADDING = Padding(jnp.asarray(np.arange(256)[None] >= np.array([[17], [0]])))


@pytest.mark.parametrize("kernel", ["cudnn", "blockwise", "auto"])
@pytest.mark.parametrize(
    "mask", [Full(), Causal(), Causal() & SlidingWindow(40), Causal() & Segments(IDS, IDS), Causal() & PADDING], ids=str
)
def test_bfloat16_on_gpu_equals_the_reference_in_float32(kernel: Kernel, mask: Mask) -> None:
    random = np.random.default_rng(0)
    q, k, v, direction = (jnp.asarray(random.normal(size=(2, 256, n, 64)), jnp.bfloat16) for n in (4, 2, 2, 4))

    def solve(kernel: Kernel, *arrays: jax.Array) -> list[np.ndarray]:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            o = attention(q, k, v, mask=mask, scale=0.125, kernel=kernel)
            return jnp.sum((o * direction.astype(o.dtype)).astype(jnp.float32)), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return [np.asarray(x, np.float32) for x in (o, *gradients)]

    with jax.default_matmul_precision("highest"):  # float32 matmuls on GPU would round to TF32
        want = solve("reference", *(x.astype(jnp.float32) for x in (q, k, v)))
    for got, exact in zip(solve(kernel, q, k, v), want, strict=True):
        assert np.isfinite(got).all()
        # a few roundings of 2^-9 meet in one number
        assert np.abs(got - exact).max() <= 1.5e-2 * max(np.abs(exact).max(), 1.0)
