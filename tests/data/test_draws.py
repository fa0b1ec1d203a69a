"""The distributions of draws, with bounds computed from their number: five standard deviations, missed once in 10^6."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.data.draws import Draws

N = 40_000


def assert_frequencies(values: np.ndarray, probabilities: dict[int, float]) -> None:
    """Every value as often as binomial counts of its probability allow."""
    for value, p in probabilities.items():
        count = np.count_nonzero(values == value)
        assert abs(count - N * p) <= 5 * math.sqrt(N * p * (1 - p)) + 1, (value, count / N, p)


@given(key=st.lists(st.integers(0, 2**63), min_size=1, max_size=3))
def test_draws_depend_on_their_key_alone(key: list[int]) -> None:
    np.testing.assert_array_equal(Draws(*key).uniform(8), Draws(*key).uniform(8))
    assert not np.array_equal(Draws(*key, 1).uniform(8), Draws(*key, 2).uniform(8))


def test_uniform_numbers_are_uniform() -> None:
    u = Draws(1).uniform(N)
    assert 0 <= u.min() < u.max() < 1
    assert_frequencies((10 * u).astype(int), dict.fromkeys(range(10), 0.1))
    assert_frequencies(Draws(2).below(7, N), dict.fromkeys(range(7), 1 / 7))


@pytest.mark.parametrize("p", [0.2, 0.9, 1.0])
def test_geometric_numbers_are_trials_to_the_first_success(p: float) -> None:
    values = Draws(3).geometric(p, N)
    assert values.min() >= 1
    assert_frequencies(values, {k: p * (1 - p) ** (k - 1) for k in range(1, 9)})


@pytest.mark.parametrize("mean", [0.5, 3.0, 20.0])
def test_poisson_numbers_have_the_poisson_distribution(mean: float) -> None:
    values = Draws(4).poisson(mean, N)
    assert_frequencies(values, {k: mean**k * math.exp(-mean) / math.factorial(k) for k in range(30)})


def test_every_permutation_is_equally_likely() -> None:
    draws = Draws(5)
    codes = np.array([int("".join(map(str, draws.permutation(3)))) for _ in range(N // 8)])
    for code in (12, 21, 102, 120, 201, 210):
        share, p = np.mean(codes == code), 1 / 6
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / len(codes))
