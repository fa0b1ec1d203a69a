"""Positions against literal transcriptions of their papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.positions import ALiBi, Learned, Sinusoidal, T5Relative


def rngs() -> nnx.Rngs:
    return nnx.Rngs(params=0)


def test_learned_positions_are_rows_of_the_table() -> None:
    layer = Learned(10, offset=2).build(4, rngs=rngs())
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    ids = np.array([[0, 1, 2], [7, 8, 9]])
    table = np.asarray(layer.table[...])
    assert table.shape == (12, 4)
    np.testing.assert_array_equal(layer(jnp.asarray(x), jnp.asarray(ids)), x + table[ids + 2])


@pytest.mark.parametrize("config", [Learned(8), Sinusoidal(max_length=8)])
def test_a_sequence_longer_than_the_positions_is_an_error_with_the_numbers(config: Learned | Sinusoidal) -> None:
    layer = config.build(4, rngs=rngs())
    with pytest.raises(ValueError, match="the sequence has 9 positions and the model 8"):
        layer(jnp.zeros((1, 9, 4)), jnp.arange(9)[None])


def test_sinusoidal_positions_are_the_waves_of_the_paper() -> None:
    ids = np.array([[0, 1, 77], [5, 300, 4000]])
    got = Sinusoidal().build(6, rngs=rngs())(jnp.zeros((2, 3, 6)), jnp.asarray(ids))
    for (row, place), position in np.ndenumerate(ids):
        for i in range(3):
            angle = position / 10000 ** (2 * i / 6)
            # float32 angles: 4000 rounds by 2.4e-4 at most
            assert got[row, place, 2 * i] == pytest.approx(math.sin(angle), abs=3e-4)
            assert got[row, place, 2 * i + 1] == pytest.approx(math.cos(angle), abs=3e-4)


def alibi_slopes_of_the_paper(num_heads: int) -> list[float]:
    """Press et al. 2021, section 3 and the footnote on other numbers of heads."""
    if math.log2(num_heads).is_integer():
        start = 2 ** (-8 / num_heads)
        return [start**i for i in range(1, num_heads + 1)]
    closest = 2 ** math.floor(math.log2(num_heads))
    extra = alibi_slopes_of_the_paper(2 * closest)[0::2][: num_heads - closest]
    return alibi_slopes_of_the_paper(closest) + extra


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 16, 20])
def test_alibi_falls_linearly_with_the_slopes_of_the_paper(num_heads: int) -> None:
    bias = ALiBi().build(num_heads, rngs=rngs()).bias().block(np.arange(5), np.arange(7))
    slopes = alibi_slopes_of_the_paper(num_heads)
    want = [[[-slope * abs(query - key) for key in range(7)] for query in range(5)] for slope in slopes]
    np.testing.assert_allclose(bias[0], want, rtol=1e-6)
    if num_heads == 8:
        assert slopes == [1 / 2**i for i in range(1, 9)]  # the paper's own example


def bucket_of_the_paper(distance: int, config: T5Relative) -> int:
    """Raffel et al. 2020, section 2.1, in whole numbers.

    One bucket per distance below e, then bucket e + j from distance e (D/e)^(j/(n-e)) on, D the largest distance and n
    the buckets of a direction: n^(n-e) e^j >= D^j e^(n-e) without roots or logarithms.
    """
    side, first = config.num_buckets, 0
    if config.bidirectional:
        side //= 2
        first = side if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(-distance, 0)
    exact = side // 2
    if distance < exact:
        return first + distance
    bucket = exact
    while bucket + 1 < side:
        j, steps = bucket + 1 - exact, side - exact
        if distance**steps * exact**j < config.max_distance**j * exact**steps:
            break
        bucket += 1
    return first + bucket


T5_CONFIGS = [
    T5Relative(),
    T5Relative(bidirectional=True),
    T5Relative(num_buckets=10, max_distance=50, bidirectional=True),
    T5Relative(num_buckets=64, max_distance=1000),
]


@pytest.mark.parametrize("config", T5_CONFIGS, ids=str)
def test_t5_buckets_are_those_of_the_paper(config: T5Relative) -> None:
    distances = np.arange(-1500, 1500)
    want = [bucket_of_the_paper(int(distance), config) for distance in distances]
    np.testing.assert_array_equal(config.bucket(distances), want)


@pytest.mark.parametrize("config", T5_CONFIGS[:3], ids=str)
def test_t5_bias_is_the_tables_entry_of_the_bucket(config: T5Relative) -> None:
    layer = config.build(3, rngs=rngs())
    table = np.asarray(layer.table[...])
    query, key = np.array([0, 5, 400]), np.array([0, 1, 17, 399, 401])
    got = layer.bias().block(query, key)[0]
    for (n, s, t), number in np.ndenumerate(np.asarray(got)):
        assert number == table[bucket_of_the_paper(int(key[t] - query[s]), config), n]


@pytest.mark.parametrize("config", [ALiBi(), T5Relative()], ids=str)
def test_a_bias_evaluates_any_block_and_rows_of_their_own(config: ALiBi | T5Relative) -> None:
    bias = config.build(4, rngs=rngs()).bias()
    whole = np.asarray(bias.block(np.arange(40), np.arange(50)))
    np.testing.assert_array_equal(jax.jit(bias.block)(jnp.arange(8, 16), jnp.arange(3, 9)), whole[:, :, 8:16, 3:9])
    rows = bias.block(jnp.array([[7], [31]]), np.arange(50))
    np.testing.assert_array_equal(rows[:, :, 0], whole[0, :, [7, 31]])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Learned(0), "max_length=0 is not positive"),
        (lambda: Learned(4, offset=-1), "offset=-1 is negative"),
        (lambda: Sinusoidal().build(5, rngs=rngs()), "embed_dim=5 is odd"),
        (lambda: T5Relative(num_buckets=7), "num_buckets=7 must be even"),
        (lambda: T5Relative(max_distance=16), "max_distance=16 must exceed the 16"),
    ],
)
def test_impossible_positions_are_errors_with_the_value(build: object, message: str) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parity
@pytest.mark.parametrize("bidirectional", [False, True])
def test_t5_buckets_are_those_of_transformers(bidirectional: bool) -> None:
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5", reason="the parity extra is not installed")
    distances = np.arange(-300, 300)
    theirs = t5.T5Attention._relative_position_bucket(torch.tensor(distances), bidirectional=bidirectional)
    np.testing.assert_array_equal(T5Relative(bidirectional=bidirectional).bucket(distances), theirs.numpy())


@pytest.mark.parity
@pytest.mark.parametrize("num_heads", [4, 12])
def test_alibi_is_blooms_up_to_a_constant_per_row(num_heads: int) -> None:
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="the parity extra is not installed")
    theirs = bloom.build_alibi_tensor(torch.ones(1, 9), num_heads, torch.float32).numpy()  # (heads, 1, keys)
    ours = np.asarray(ALiBi().build(num_heads, rngs=rngs()).bias().block(np.array([8]), np.arange(9)))[0]
    difference = ours - theirs
    np.testing.assert_allclose(difference - difference[..., :1], 0.0, atol=1e-5)
