"""The kernels of a decoding step against NumPy: those for GPUs, elsewhere interpreted, and attention on CPUs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.cache import Stored
from llmlab.nn.kernels import cpu, decoding
from llmlab.nn.kernels.decoding import attend_one_lacks, rms_norm
from tests.selection import at_scale_but

# Sums of a thousand float32 numbers in another order; in bfloat16 a weight and a result are rounded by 2^-9 each.
TOLERANCE = {"float32": 2e-6, "int8": 2e-6, "bfloat16": 1e-2}


def exact(q: Any, k: Any, v: Any, positions: Any, scale: float, softcap: float | None) -> np.ndarray:
    """Row by row and head by head in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    o = np.zeros_like(q)
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        seen = slice(0, positions[b] + 1)
        if positions[b] < 0:
            continue
        logits = scale * k[b, seen, n // group] @ q[b, 0, n]
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        o[b, 0, n] = weights / weights.sum() @ v[b, seen, n // group]
    return o


SHAPES = [(2, 2, 70, None), (8, 2, 64, 5.0), (3, 1, 1, None), (20, 1, 130, None), (4, 2, 1100, None)]


@pytest.fixture
def attend_one_on_cpu() -> Any:
    if jax.default_backend() != "cpu" or cpu.lacks() is not None:
        pytest.skip(cpu.lacks() or "the default device is no CPU")
    return cpu.attend_one


@pytest.fixture(params=["gpu", "cpu"])
def attend_one(request: pytest.FixtureRequest) -> Any:
    """That of a GPU and that of a CPU."""
    return decoding.attend_one if request.param == "gpu" else request.getfixturevalue("attend_one_on_cpu")


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "slots", "softcap"),
    at_scale_but(SHAPES[:2], SHAPES),
)
def test_one_query_sees_the_slots_up_to_its_position(
    heads: int, kv_heads: int, slots: int, softcap: float | None, storage: str, attend_one: Any
) -> None:
    """On a GPU 1,100 slots are read in two parts."""
    random = np.random.default_rng(0)
    dtype = jnp.bfloat16 if storage == "bfloat16" else jnp.float32
    q = jnp.asarray(2 * random.normal(size=(4, 1, heads, 16)), dtype)
    k, v = (Stored.of(jnp.asarray(random.normal(size=(4, slots, kv_heads, 16)), dtype), storage) for _ in range(2))
    positions = np.array([slots - 1, slots // 2, 0, -1])

    @jax.jit
    def attended(q: jax.Array, k: Stored, v: Stored, at: jax.Array) -> jax.Array:
        keys, values = ((x.data_BKTH, x.scale_BKT) for x in (k, v))
        return attend_one(q, keys, values, at, scale=0.3, softcap=softcap)

    with jax.default_matmul_precision("highest"):  # float32 products on GPU would round to TF32
        got = attended(q, k, v, jnp.asarray(positions))

    assert got.dtype == dtype
    want = exact(q, k.read(jnp.float32), v.read(jnp.float32), positions, 0.3, softcap)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=TOLERANCE[storage] * np.abs(want).max())
    assert not np.asarray(got[3], np.float32).any(), "a query at position -1 sees nothing"


def test_what_lies_beyond_a_position_is_not_seen_even_where_it_is_no_number(attend_one: Any) -> None:
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.normal(size=(1, n, 2, 16)), jnp.float32) for n in (1, 80, 80))
    k, v = (x.swapaxes(1, 2) for x in (k, v))
    want = attend_one(q, (k, None), (v, None), jnp.array([9]), scale=1.0)
    k, v = k.at[:, :, 64:].set(jnp.nan), v.at[:, :, 64:].set(jnp.nan)
    np.testing.assert_array_equal(attend_one(q, (k, None), (v, None), jnp.array([9]), scale=1.0), want)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", [1, 7, 24, 80, 128, 200])
def test_on_a_cpu_a_head_may_be_of_any_width(head_dim: int, storage: str, attend_one_on_cpu: Any) -> None:
    random = np.random.default_rng(0)
    q = jnp.asarray(random.normal(size=(2, 1, 6, head_dim)), jnp.float32)
    k, v = (Stored.of(jnp.asarray(random.normal(size=(2, 50, 2, head_dim)), jnp.float32), storage) for _ in range(2))
    at = np.array([49, 20])
    got = attend_one_on_cpu(q, (k.data_BKTH, k.scale_BKT), (v.data_BKTH, v.scale_BKT), jnp.asarray(at), scale=0.3)
    want = exact(q, k.read(jnp.float32), v.read(jnp.float32), at, 0.3, None)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE["float32"] * np.abs(want).max())


@pytest.mark.parametrize("spread", [1.0, 30.0, 3000.0])
def test_on_a_cpu_weights_are_those_of_numpy_over_the_whole_range(spread: float, attend_one_on_cpu: Any) -> None:
    """Logits from 0 to far below what float32 can tell from none, one head dimension."""
    logits = -spread * np.arange(100, dtype=np.float64) / 100
    k = jnp.asarray(logits, jnp.float32)[None, None, :, None]
    v = jnp.eye(100, dtype=jnp.float32)[None, None]  # the weights themselves come out
    q = jnp.ones((1, 1, 1, 1))
    for slots in (1, 16, 17, 100):
        weights = np.concatenate(
            [
                attend_one_on_cpu(q, (k, None), (v[..., i : i + 1], None), jnp.array([slots - 1]), scale=1.0)[0, 0, 0]
                for i in range(100)
            ]
        )
        want = np.exp(np.asarray(k[0, 0, :slots, 0], np.float64))
        # an exponential is good to 2 units in the last place, their sum to a few, and below 2^-126 there is none
        np.testing.assert_allclose(weights[:slots], want / want.sum(), rtol=1e-6, atol=2e-38)
        assert not weights[slots:].any()


@pytest.mark.parametrize(("head_dim", "lacks"), [(16, False), (64, False), (8, True), (80, True)])
def test_widths_that_it_cannot_take_are_told(head_dim: int, lacks: bool) -> None:
    assert (attend_one_lacks(head_dim) is not None) == lacks


@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 3, 64)])
def test_rms_norm_of_rows(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    x, gain = random.normal(size=shape), random.normal(size=shape[-1])
    got = jax.jit(rms_norm, static_argnums=(2, 3))(
        jnp.asarray(x, jnp.float32), jnp.asarray(gain, jnp.float32), 1e-3, 1.0
    )
    # of a dozen roundings of float32
    want = (1 + gain) * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max())
