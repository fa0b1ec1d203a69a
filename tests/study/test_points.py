"""Points applied to an experiment equal the same change made by hand; what cannot be is told before anything runs."""

from dataclasses import replace

import pytest

from llmlab.experiment import Experiment
from llmlab.flags import parse
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.optim import SGD, Cosine
from llmlab.study.points import PointError, apply, check, command, names, plain, text


def test_values_go_where_their_paths_say(tiny: Experiment) -> None:
    changed = apply(tiny, {"optimizer.peak_lr": 1, "model.pattern.0.norm": LayerNorm(), "train.seed": 3})
    block = replace(tiny.model.pattern[0], norm=LayerNorm())  # type: ignore[attr-defined]  # a Transformer
    assert changed == replace(
        tiny,
        optimizer=replace(tiny.optimizer, peak_lr=1.0),
        model=replace(tiny.model, pattern=(block,)),
        train=replace(tiny.train, seed=3),
    )
    assert apply(tiny, {}) == tiny


def test_fields_that_hang_together_change_together_and_a_component_before_its_fields(tiny: Experiment) -> None:
    # Neither change alone is allowed: 8 rows in 3 parts, 9 rows in 1 part of 2 devices...
    changed = apply(tiny, {"train.batch_size": 9, "train.accumulation": 3})
    assert (changed.train.batch_size, changed.train.accumulation) == (9, 3)
    # Whatever the order of the axes.
    for point in (
        {"optimizer.schedule.warmup_steps": 2, "optimizer.schedule": Cosine(), "optimizer": SGD(peak_lr=0.5)},
        {"optimizer": SGD(peak_lr=0.5), "optimizer.schedule": Cosine(), "optimizer.schedule.warmup_steps": 2},
    ):
        assert apply(tiny, point).optimizer == SGD(peak_lr=0.5, schedule=Cosine(warmup_steps=2))


@pytest.mark.parametrize(
    ("point", "messages"),
    [
        ({"optimizer.peek_lr": 1.0}, ["optimizer.peek_lr: AdamW has no field", "did you mean optimizer.peak_lr?"]),
        ({"peak_lr": 1.0}, ["did you mean optimizer.peak_lr?"]),
        ({"train.nothing_like_it": 1}, ["it has steps, batch_size"]),
        ({"train.steps": "ten"}, ["train.steps: expected int, got 'ten'"]),
        ({"train.steps": 2.5}, ["train.steps: expected int, got 2.5"]),
        ({"train.precision": "float8"}, ["train.precision: expected"]),
        ({"model.pattern.0.norm": RMSNorm}, ["model.pattern.0.norm: expected Norm"]),
        ({"model.pattern.0": 3}, ["model.pattern.0: expected Block, got 3"]),
        ({"model.pattern.1.norm": RMSNorm()}, ["model.pattern.1: model.pattern is a row of 1"]),
        ({"model.position.max_length": 3}, ["model.position.max_length: model.position is None here"]),
        ({"train.steps": 0}, ["train.steps: steps=0 must be at least 1"]),
        ({"train.batch_size": 7, "train.accumulation": 2}, ["train.batch_size=7 is not divisible"]),
        ({"optimizer.peek_lr": 1.0, "train.steps": 0}, ["peek_lr", "steps=0"]),
    ],
)
def test_what_cannot_be_names_the_field(point: dict, messages: list[str], tiny: Experiment) -> None:
    with pytest.raises(PointError) as caught:
        apply(tiny, point)
    for message in messages:
        assert message in str(caught.value)


def test_all_offenders_are_told_at_once_each_problem_with_its_points(tiny: Experiment) -> None:
    points = [{"optimizer.peek_lr": 1.0, "train.steps": steps} for steps in (1, 2, 0, 4, 5)]
    with pytest.raises(ValueError, match="nothing was started") as caught:
        check(tiny, points)
    told = str(caught.value)
    assert told.count("has no field peek_lr") == 1
    assert "in point 1 (optimizer.peek_lr=1.0, train.steps=1); point 2" in told
    assert "and 2 more" in told
    assert "steps=0 must be at least 1\n    in point 3 (" in told
    assert check(tiny, [{"train.steps": 3}]) == [apply(tiny, {"train.steps": 3})]


def test_names_are_as_long_as_needed() -> None:
    points = [{"a.b.rate": 0.1, "a.c.rate": 1, "x.size": None}, {"a.b.rate": 0.2, "a.c.rate": 1}, {}]
    assert names(points) == ["b.rate=0.1 c.rate=1 size=None", "b.rate=0.2 c.rate=1", "baseline"]
    assert text({}) == "the experiment as it is"
    assert plain({"a": 1, "b": RMSNorm(), "c": (1, 2), "d": None}) == {
        "a": 1,
        "b": "RMSNorm()",
        "c": "(1, 2)",
        "d": None,
    }


def test_the_command_of_a_point_gives_its_experiment(tiny: Experiment) -> None:
    wanted = apply(tiny, {"optimizer.peak_lr": 0.5, "train.seed": 3, "model.num_layers": 2, "train.sequence_length": 4})
    line, told = command("tiny.py", tiny, wanted)
    assert told == []
    words = line.split()
    assert words[:3] == ["llmlab", "train", "tiny.py"]
    assert parse(tiny, words[3:], prog="llmlab train") == wanted
    line, told = command("tiny.py", tiny, apply(tiny, {"model.pattern.0.norm": LayerNorm()}))
    assert line == "llmlab train tiny.py"
    assert told == ["model.pattern.0.norm=LayerNorm() (instead of RMSNorm())"]
