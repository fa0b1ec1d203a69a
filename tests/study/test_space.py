"""Spaces against itertools, and drawn points against listed ones."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.study.space import (
    Distribution,
    Space,
    axis,
    categorical,
    chain,
    check_conditions,
    grid,
    integer,
    log_uniform,
    sample,
    subsample,
    uniform,
    when,
    zipped,
)


class Dice:
    """Chooses at random, and remembers what was asked."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: dict[str, Any] = {}

    def option(self, name: str, labels: Sequence[str]) -> int:
        assert self.asked.setdefault(name, list(labels)) == list(labels)  # as samplers demand
        return self.random.randrange(len(labels))

    def number(self, name: str, distribution: Distribution) -> float | int:
        assert self.asked.setdefault(name, distribution) == distribution
        assert distribution.low is not None
        assert distribution.high is not None
        if distribution.kind == "integer":
            return self.random.randint(int(distribution.low), int(distribution.high))
        return self.random.uniform(distribution.low, distribution.high)


def points(space: Space) -> list[dict[str, Any]]:
    return list(space.points())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_a_grid_is_the_product_of_its_parts_in_order(sizes: list[int]) -> None:
    axes = [axis(f"a.b{i}", *range(size)) for i, size in enumerate(sizes)]
    expected = [
        {f"a.b{i}": value for i, value in enumerate(row)} for row in itertools.product(*(range(size) for size in sizes))
    ]
    assert points(grid(*axes)) == expected


def test_zipped_goes_side_by_side_and_chain_one_after_the_other() -> None:
    pairs = zipped(axis("x", 1, 2), axis("y", "a", "b"))
    assert points(pairs) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]
    both = chain(pairs, axis("z", None))
    assert points(both) == [*points(pairs), {"z": None}]
    assert len(points(grid(both, axis("w", 1, 2, 3)))) == 9
    with pytest.raises(ValueError, match="these have 2, 3 points"):
        zipped(axis("x", 1, 2), axis("y", 1, 2, 3))


def test_a_condition_holds_for_a_value_a_function_of_it_and_never_for_what_was_not_chosen() -> None:
    space = grid(
        axis("norm", RMSNorm(), LayerNorm()),
        axis("layers", 2, 4),
        when("norm", RMSNorm(), axis("norm.epsilon", 1e-5, 1e-6)),
        when("layers", lambda layers: layers > 2, when("norm.epsilon", 1e-5, axis("depth", True))),
    )
    assert points(space) == [
        {"norm": RMSNorm(), "layers": 2, "norm.epsilon": 1e-5},
        {"norm": RMSNorm(), "layers": 2, "norm.epsilon": 1e-6},
        {"norm": RMSNorm(), "layers": 4, "norm.epsilon": 1e-5, "depth": True},
        {"norm": RMSNorm(), "layers": 4, "norm.epsilon": 1e-6},
        {"norm": LayerNorm(), "layers": 2},
        {"norm": LayerNorm(), "layers": 4},
    ]
    check_conditions(space)
    with pytest.raises(ValueError, match="none sets norms"):
        check_conditions(grid(axis("norm", 1), when("norms", 1, axis("x", 1))))


def test_alternatives_under_conditions_may_set_the_same_field_and_no_point_sets_it_twice() -> None:
    space = grid(
        axis("kind", "a", "b"),
        when("kind", "a", axis("rate", 1, 2)),
        when("kind", "b", sample("rate", uniform(3, 4))),
    )
    for seed in range(50):
        drawn = space.draw(Dice(seed))
        assert (drawn["rate"] in (1, 2)) if drawn["kind"] == "a" else (3 <= drawn["rate"] <= 4)
    dice = Dice(0)
    for _ in range(20):
        space.draw(dice)
    assert set(dice.asked) == {"kind", "rate when kind is 'a'", "rate when kind is 'b'"}
    with pytest.raises(ValueError, match="rate is set twice"):
        points(grid(axis("rate", 1), axis("rate", 2)))


def test_whatever_is_drawn_of_a_finite_space_is_one_of_its_points_and_each_can_be_drawn() -> None:
    space = chain(
        grid(axis("x", 1, 2), when("x", 2, zipped(axis("y", 1, 2), axis("z", "a", "b")))),
        subsample(grid(axis("u", *range(4)), axis("v", *range(4))), 3, seed=5),
    )
    dice = Dice(0)
    drawn = [space.draw(dice) for _ in range(200)]
    assert all(point in points(space) for point in drawn)
    assert all(point in drawn for point in points(space))


def test_a_subsample_has_no_repetition_keeps_the_order_and_is_the_same_for_the_same_seed() -> None:
    space = grid(axis("x", *range(10)), axis("y", *range(10)))
    chosen = points(subsample(space, 7, seed=3))
    assert chosen == points(subsample(space, 7, seed=3)) != points(subsample(space, 7, seed=4))
    places = [points(space).index(point) for point in chosen]
    assert places == sorted(set(places))
    assert len(places) == 7
    assert points(subsample(space, 1000)) == points(space)


def test_a_sampled_axis_shows_its_ends_and_is_drawn_within_them() -> None:
    space = grid(
        sample("a", uniform(0, 1)),
        sample("b", log_uniform(1e-4, 1e-1)),
        sample("c", integer(2, 5)),
        sample("d", categorical("x", None)),
    )
    assert not space.finite
    ends = points(space)
    assert len(ends) == 16
    assert ends[0] == {"a": 0, "b": 1e-4, "c": 2, "d": "x"}
    drawn = [space.draw(Dice(seed)) for seed in range(100)]
    assert all(0 <= point["a"] <= 1 and point["c"] in (2, 3, 4, 5) for point in drawn)
    assert {point["d"] for point in drawn} == {"x", None}
    assert [(leaf.path) for leaf in space.leaves()] == ["a", "b", "c", "d"]


half: Any = 2.5
no_space: Any = [1, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: axis("x"), "has no values"),
        (lambda: axis("x", 1, 1), "1 more than once"),
        (lambda: axis("x..y", 1), "no dotted path"),
        (lambda: uniform(2, 1), "low < high"),
        (lambda: uniform(0, math.inf), "both finite"),
        (lambda: log_uniform(0, 1), "begins above 0"),
        (lambda: integer(1, half), "whole numbers"),
        (lambda: categorical(1, 1), "more than once"),
        (lambda: grid(), "nothing to combine"),
        (lambda: grid(no_space), "use axis"),
        (lambda: zipped(axis("x", 1), sample("y", uniform(0, 1))), "a sample has none"),
        (lambda: subsample(sample("y", uniform(0, 1)), 3), "--trials"),
        (lambda: subsample(axis("x", 1), 0), "at least 1"),
    ],
)
def test_spaces_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    # The checks of argument types, which only tests have, would otherwise be faster than the messages for users.
    with pytest.raises(Exception, match=rf"(?i){message}|type-check"):
        make()
