"""Factorial effects against least squares on a design matrix that the test builds itself."""

import itertools

import numpy as np
import pytest
import scipy.stats

from llmlab.study.factorial import interactions
from llmlab.study.paired import holm


def least_squares(cells: np.ndarray, factors: dict[str, list[str]]) -> dict[str, float]:
    """Coefficients of the saturated linear model: level indicators, less their share of the factor's levels."""
    rows, values = [], []
    names = list(factors)
    columns = [
        dict(zip(chosen, levels, strict=True))
        for order in range(len(names) + 1)
        for chosen in itertools.combinations(names, order)
        for levels in itertools.product(*(range(1, len(factors[name])) for name in chosen))
    ]
    for *place, seed in np.ndindex(*cells.shape):
        at = dict(zip(names, place, strict=True))
        rows.append(
            [
                np.prod([(at[name] == level) - 1 / len(factors[name]) for name, level in column.items()])
                for column in columns
            ]
        )
        values.append(cells[*place, seed])
    coefficients = np.linalg.lstsq(np.array(rows), np.array(values), rcond=None)[0]
    terms = [" x ".join(f"{name}={factors[name][level]}" for name, level in column.items()) for column in columns]
    return dict(zip(terms[1:], coefficients[1:].tolist(), strict=True))


@pytest.mark.parametrize("shape", [(2,), (2, 2), (2, 2, 2), (3,), (3, 2), (2, 3, 4), (2, 2, 2, 2)])
def test_estimates_are_the_coefficients_of_the_saturated_regression(shape: tuple[int, ...]) -> None:
    cells = np.random.default_rng(len(shape)).normal(0, 1, (*shape, 3))
    factors = {name: [f"{name}{i}" for i in range(size)] for name, size in zip("abcd", shape, strict=False)}
    effects = interactions(cells, factors)
    expected = least_squares(cells, factors)
    assert len(effects) == np.prod(shape) - 1
    assert {effect.term for effect in effects} == expected.keys()
    np.testing.assert_allclose([e.estimate for e in effects], [expected[e.term] for e in effects], atol=1e-12)


def test_each_effect_is_tested_over_the_regressions_of_single_seeds() -> None:
    cells = np.random.default_rng(0).normal(0, 1, (2, 3, 5))
    factors = {"norm": ["layer", "rms"], "ffn": ["gelu", "swiglu", "relu"]}
    effects = interactions(cells, factors, level=0.9)
    seeds = [least_squares(cells[..., [seed]], factors) for seed in range(5)]
    for effect in effects:
        test = scipy.stats.ttest_1samp([seed[effect.term] for seed in seeds], 0)
        assert effect.p == pytest.approx(test[1], rel=1e-8)
        assert effect.interval is not None
        np.testing.assert_allclose(effect.interval, test.confidence_interval(0.9), rtol=1e-8)
    np.testing.assert_allclose(
        np.array([e.p_holm for e in effects], float), holm(np.array([e.p for e in effects], float))
    )


def test_an_interaction_is_the_difference_of_the_differences() -> None:
    # b helps by 1; a helps by 2 alone and by 5 beside b; a third of the noise is shared by a seed's cells
    table = np.array([[10.0, 9.0], [8.0, 4.0]])[..., None] + np.array([0.0, 0.3, -0.2])
    effects = {e.term: e for e in interactions(table, {"a": ["off", "on"], "b": ["off", "on"]})}
    assert effects["a=on"].estimate == pytest.approx(-(2 + 5) / 2)
    assert effects["b=on"].estimate == pytest.approx(-(1 + 4) / 2)
    assert effects["a=on x b=on"].estimate == pytest.approx(-3.0)
    assert effects["a=on x b=on"].levels == {"a": "on", "b": "on"}
    assert list(effects) == ["a=on", "b=on", "a=on x b=on"]
    assert effects["a=on"].p == pytest.approx(0.0, abs=1e-12)  # the pairing removes what a seed's cells share


def test_a_single_seed_gives_estimates_without_intervals() -> None:
    (effect,) = interactions(np.array([[1.0], [3.0]]), {"a": ["off", "on"]})
    assert (effect.estimate, effect.interval, effect.p, effect.p_holm) == (2.0, None, None, None)


def test_missing_cells_and_wrong_shapes_are_named() -> None:
    cells = np.zeros((2, 2, 3))
    cells[1, 0, 2] = np.nan
    factors = {"norm": ["layer", "rms"], "ffn": ["gelu", "relu"]}
    with pytest.raises(ValueError, match=r"every cell; not finite: norm=rms, ffn=gelu, seed number 2 \(1 in all\)"):
        interactions(cells, factors)
    with pytest.raises(ValueError, match=r"cells of shape \(2, 2, 3\) for factors"):
        interactions(cells, {"norm": ["layer", "rms"]})
    with pytest.raises(ValueError, match="at least two levels"):
        interactions(np.zeros((1, 3)), {"norm": ["layer"]})
