"""Rotary positions against complex rotations in float64, and their scalings against the papers' formulas."""

import cmath
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.positions import NTK, DynamicNTK, Linear, Llama3, Rotary, RotaryScaling, YaRN


def build(config: Rotary, head_dim: int) -> Callable[..., jax.Array]:
    return config.build(head_dim, rngs=nnx.Rngs(params=0))


def rotated_by_the_paper(x: np.ndarray, ids: np.ndarray, config: Rotary, frequencies: list[float]) -> np.ndarray:
    """Su et al. 2021, equation 13: pairs as complex numbers, times exp(i m theta), one at a time."""
    y = x.astype(np.float64)
    pairs = len(frequencies)
    for row, place in np.ndindex(ids.shape):
        for head in range(x.shape[2]):
            for i, frequency in enumerate(frequencies):
                a, b = (2 * i, 2 * i + 1) if config.interleaved else (i, i + pairs)
                turned = complex(*x[row, place, head, [a, b]]) * cmath.exp(1j * int(ids[row, place]) * frequency)
                y[row, place, head, [a, b]] = turned.real, turned.imag
    return y


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotary_turns_pairs_as_complex_numbers(interleaved: bool, fraction: float) -> None:
    config = Rotary(theta=1000.0, fraction=fraction, interleaved=interleaved)
    dim = int(8 * fraction)
    frequencies = [1000.0 ** (-2 * i / dim) for i in range(dim // 2)]
    x = np.random.default_rng(0).normal(size=(2, 3, 2, 8)).astype(np.float32)
    ids = np.array([[0, 1, 2], [3, 50, 600]])
    got = build(config, 8)(jnp.asarray(x), jnp.asarray(ids))
    # float32 angles of up to 600 radians round by 3e-5
    np.testing.assert_allclose(got, rotated_by_the_paper(x, ids, config, frequencies), atol=2e-4)
    np.testing.assert_array_equal(got[..., dim:], x[..., dim:])


@pytest.mark.parametrize("config", [Rotary(), Rotary(interleaved=True), Rotary(scaling=YaRN(4.0, 64))], ids=str)
def test_products_depend_on_the_distance_alone(config: Rotary) -> None:
    layer = build(config, 16)
    random = np.random.default_rng(1)
    q, k = (jnp.asarray(random.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def product(m: int, n: int) -> float:
        return float(jnp.vdot(layer(q, jnp.array([[m]])), layer(k, jnp.array([[n]]))))

    assert product(9, 4) == pytest.approx(product(105, 100), rel=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-2)


def test_angles_are_float32_in_a_bfloat16_model() -> None:
    layer = build(Rotary(), 16)
    x = jnp.ones((1, 2, 1, 16), jnp.bfloat16)
    y = layer(x, jnp.array([[256, 257]]))  # bfloat16 rounds position 257 to 256
    assert y.dtype == jnp.bfloat16
    exact = build(Rotary(), 16)(x.astype(jnp.float32), jnp.array([[256, 257]]))
    np.testing.assert_allclose(np.asarray(y, np.float32), exact, atol=2**-8)
    assert not np.allclose(np.asarray(y[0, 0], np.float32), np.asarray(y[0, 1], np.float32), atol=0.1)


def test_the_gradient_of_a_rotation_is_the_rotation_back() -> None:
    layer = build(Rotary(), 8)
    random = np.random.default_rng(3)
    x, dy = (jnp.asarray(random.normal(size=(2, 5, 3, 8)), jnp.float32) for _ in range(2))
    ids = jnp.tile(jnp.arange(5) * 7, (2, 1))
    (dx,) = jax.vjp(lambda x: layer(x, ids), x)[1](dy)
    np.testing.assert_allclose(dx, layer(dy, -ids), atol=1e-6)


def test_layers_share_one_table_on_cpu() -> None:
    """XLA would compute the cosines anew in every reader, which costs ten rotations each time."""
    layer = build(Rotary(), 8)

    def stack(x: jax.Array, ids: jax.Array) -> jax.Array:
        for _ in range(3):
            x = jnp.tanh(layer(x, ids) * layer(2 * x, ids))
        return x.sum()

    arguments = jnp.ones((2, 16, 3, 8)), jnp.tile(jnp.arange(16), (2, 1))
    program = jax.jit(jax.grad(stack)).lower(*arguments).compile().as_text()
    assert program is not None
    assert len(re.findall(r" cosine\(", program)) == 1


DIM, THETA, LENGTH = 16, 10000.0, 256  # wavelengths from 6 to 20,000 around a training length of 256
PLAIN = [THETA ** (-2 * i / DIM) for i in range(DIM // 2)]


def llama3_released(factor: float, low: float, high: float) -> list[float]:
    """As in the code released with Llama 3.1: by wavelength."""
    frequencies = []
    for frequency in PLAIN:
        wavelength = 2 * math.pi / frequency
        if wavelength < LENGTH / high:
            frequencies.append(frequency)
        elif wavelength > LENGTH / low:
            frequencies.append(frequency / factor)
        else:
            smooth = (LENGTH / wavelength - low) / (high - low)
            frequencies.append((1 - smooth) * frequency / factor + smooth * frequency)
    return frequencies


def yarn_released(factor: float, fast: float, slow: float, truncate: bool) -> list[float]:
    """As in the code released with YaRN: a ramp over the pairs between two numbers of turns."""

    def pair(turns: float) -> float:  # solves LENGTH = turns * wavelength for the pair
        return DIM / 2 * math.log(LENGTH / (2 * math.pi * turns)) / math.log(THETA)

    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, DIM - 1)
    frequencies = []
    for i, frequency in enumerate(PLAIN):
        interpolated = min(max((i - first) / (last - first), 0.0), 1.0)
        frequencies.append(frequency / factor * interpolated + frequency * (1 - interpolated))
    return frequencies


SCALINGS: list[tuple[RotaryScaling, list[float], float]] = [
    (Linear(4.0), [f / 4.0 for f in PLAIN], 1.0),
    (NTK(4.0), [(THETA * 4.0 ** (DIM / (DIM - 2))) ** (-2 * i / DIM) for i in range(DIM // 2)], 1.0),
    (YaRN(4.0, LENGTH), yarn_released(4.0, 32, 1, True), 0.1 * math.log(4.0) + 1),
    (
        YaRN(8.0, LENGTH, beta_fast=20, beta_slow=2, truncate=False),
        yarn_released(8.0, 20, 2, False),
        1.2079441541679836,
    ),
    (YaRN(4.0, LENGTH, attention_factor=1.5), yarn_released(4.0, 32, 1, True), 1.5),
    (Llama3(8.0, 1.0, 4.0, LENGTH), llama3_released(8.0, 1.0, 4.0), 1.0),
]


@pytest.mark.parametrize(("scaling", "frequencies", "amplitude"), SCALINGS, ids=[str(s[0]) for s in SCALINGS])
def test_scalings_follow_their_papers(scaling: RotaryScaling, frequencies: list[float], amplitude: float) -> None:
    config = Rotary(theta=THETA, scaling=scaling)
    np.testing.assert_allclose(config.frequencies(DIM), frequencies, rtol=1e-12)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)
    x = np.random.default_rng(0).normal(size=(1, 2, 1, DIM)).astype(np.float32)
    ids = np.array([[1, 900]])
    want = amplitude * rotated_by_the_paper(x, ids, config, frequencies)
    np.testing.assert_allclose(build(config, DIM)(jnp.asarray(x), jnp.asarray(ids)), want, atol=5e-4)


def test_ntk_keeps_the_fastest_pair_and_slows_the_slowest_by_the_factor() -> None:
    frequencies = NTK(4.0).frequencies(THETA, DIM)
    assert frequencies[0] == PLAIN[0]
    assert frequencies[-1] == pytest.approx(PLAIN[-1] / 4.0, rel=1e-12)


def test_dynamic_ntk_is_ntk_for_the_length_of_each_row() -> None:
    rows = jnp.array([[0, 100], [500, 3 * LENGTH - 1]])
    got = DynamicNTK(2.0, LENGTH).frequencies_at(THETA, DIM, rows)[:, 0]
    np.testing.assert_allclose(got[0], PLAIN, rtol=1e-6)
    np.testing.assert_allclose(got[1], NTK(2.0 * 3 - 1).frequencies(THETA, DIM), rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Rotary(fraction=1.5), r"fraction=1.5 is not in \(0, 1\]"),
        (lambda: Rotary(theta=0.5), "theta=0.5 is not above 1"),
        (lambda: Rotary(fraction=0.3).build(10, rngs=nnx.Rngs(0)), "head_dim=10 with fraction=0.3 gives 3 rotated"),
        (lambda: Linear(0.5), "factor=0.5 of Linear is below 1"),
        (lambda: Llama3(low_frequency_factor=4.0), "low_frequency_factor=4.0 is not below"),
    ],
)
def test_impossible_rotations_are_errors_with_the_value(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "settings", "scaling"),
    [
        ("linear", {"factor": 4.0}, Linear(4.0)),
        ("dynamic", {"factor": 2.0}, DynamicNTK(2.0, LENGTH)),
        ("yarn", {"factor": 4.0}, YaRN(4.0, LENGTH)),
        (
            "yarn",
            {"factor": 8.0, "beta_fast": 20.0, "truncate": False},
            YaRN(8.0, LENGTH, beta_fast=20.0, truncate=False),
        ),
        (
            "yarn",
            {"factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            YaRN(8.0, LENGTH, mscale=1.0, mscale_all_dim=0.5),
        ),
        (
            "llama3",
            {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            Llama3(8.0, 1.0, 4.0, LENGTH),
        ),
    ],
)
def test_scalings_are_those_of_transformers(kind: str, settings: dict[str, object], scaling: RotaryScaling) -> None:
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    rope = {"rope_type": kind, "rope_theta": THETA, "original_max_position_embeddings": LENGTH, **settings}
    config = transformers.LlamaConfig(
        hidden_size=4 * DIM, num_attention_heads=4, max_position_embeddings=LENGTH, rope_parameters=rope
    )
    frequencies, amplitude = functions[kind](config, device="cpu", seq_len=3 * LENGTH)
    ours = scaling.frequencies_at(THETA, DIM, jnp.arange(3 * LENGTH)[None])[0, 0]
    np.testing.assert_allclose(ours, frequencies.numpy(), rtol=2e-6)  # both are float32
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-6)
