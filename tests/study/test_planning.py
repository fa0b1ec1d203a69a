"""The plan and what is matched: amounts by hand, what is there by hash, times from runs that were made."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmlab.config import config_hash, save
from llmlab.experiment import Experiment
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.study import planning
from llmlab.study.ablation import Ablation, swap, with_values
from llmlab.study.matching import MismatchError, check, expected, mismatches, of_run
from llmlab.study.trials import Status
from llmlab.tokenizers import SentencePiece

There = Callable[..., Path]


def norm(tiny: Experiment, **fields: Any) -> Ablation:
    fields = {"variants": {"layernorm": swap(RMSNorm, LayerNorm())}, "seeds": 2} | fields
    return Ablation(**{"hypothesis": "LayerNorm is no worse than RMSNorm", "baseline": tiny} | fields)


@pytest.fixture
def there(tmp_path: Path) -> There:
    """Function (experiment, ...) -> the directory of a finished run of it: a config, metrics, a summary."""

    def make(experiment: Experiment, **summary: Any) -> Path:
        directory = tmp_path / "trials" / config_hash(experiment)
        directory.mkdir(parents=True)
        save(experiment, directory)
        content = {"step": experiment.train.steps, "tokens": 384, "validation/loss": 3.0}
        (directory / "metrics.jsonl").write_text(json.dumps(content) + "\n", encoding="utf-8")
        (directory / "provenance.json").write_text('{"sessions": []}', encoding="utf-8")
        (directory / "summary.json").write_text(json.dumps(content | summary), encoding="utf-8")
        return directory

    return make


# --- amounts ---------------------------------------------------------------------------------------------------------


def test_amounts_of_a_config_are_those_of_the_model_and_the_batch(tiny: Experiment) -> None:
    model = tiny.model.with_vocabulary(tiny.tokenizer.build().vocab_size)
    tokens = 6 * 8 * 8
    assert expected(tiny) == {
        "tokens": tokens,
        "parameters": model.num_parameters(),
        "flops": tokens * model.flops_per_token(8),  # type: ignore[attr-defined]  # of the decoders
        "seconds": None,
    }


def test_what_the_config_does_not_tell_is_unknown(tiny: Experiment) -> None:
    opened = replace(tiny, tokenizer=SentencePiece(path="somewhere"))
    assert expected(opened) == {"tokens": 384, "parameters": None, "flops": None, "seconds": None}


def test_amounts_of_a_run_are_what_it_recorded() -> None:
    speed = {"tokens_per_second": 50.0, "flops_per_token": 8.0, "seconds": {"train": 99.0}}
    found = of_run({"tokens": 100, "num_parameters": 7} | speed)
    assert found == {"tokens": 100, "parameters": 7, "flops": 800, "seconds": 2}
    assert of_run({"tokens": 100, "seconds": {"train": 3.0}})["seconds"] == 3.0


@pytest.mark.parametrize(
    ("match", "values", "found"),
    [
        ("tokens", {"train.steps": 12}, "x has 768 tokens, the baseline 384 (+100.00%)"),
        ("flops", {"train.sequence_length": 16}, "x has"),
        ("parameters", {"model.pattern.0.ffn.hidden_dim": 32}, "x has"),
        ("parameters", {"train.steps": 12}, None),
        ("seconds", {"train.steps": 12}, None),  # known only afterwards
    ],
)
def test_a_mismatch_is_refused_before_anything_runs(
    tiny: Experiment, match: Any, values: dict[str, Any], found: str | None
) -> None:
    ablation = norm(tiny, variants={"x": with_values(values)}, match=match)
    arms = ablation.arms()
    if found is None:
        assert check(ablation, arms) == []
        return
    with pytest.raises(MismatchError, match="acknowledge_mismatch") as refused:
        check(ablation, arms)
    assert found in str(refused.value)
    assert len(check(replace(ablation, acknowledge_mismatch="a demonstration"), arms)) == 1


def test_a_mismatch_is_relative_and_beyond_the_tolerance(tiny: Experiment) -> None:
    ablation = norm(tiny, tolerance=0.1)
    achieved = {"baseline": {"tokens": 100.0}, "less": {"tokens": 90.0}, "more": {"tokens": 111.0}, "none": {}}
    (found,) = mismatches(ablation, achieved)
    assert (found.arm, found.relative) == ("more", pytest.approx(0.11))


# --- plan ------------------------------------------------------------------------------------------------------------


def test_a_run_that_is_there_is_found_by_its_hash(tiny: Experiment, there: There, tmp_path: Path) -> None:
    baseline, variant = norm(tiny).arms()
    there(baseline.run(1))
    broken = there(variant.run(0))
    (broken / "summary.json").write_text("{", encoding="utf-8")
    plan = planning.plan(norm(tiny), tmp_path / "trials", measure=False)
    status = {run.label: run.status for run in plan.runs}
    assert status == {
        "baseline/seed=0": Status.ABSENT,
        "layernorm/seed=0": Status.CORRUPT,
        "baseline/seed=1": Status.FINISHED,
        "layernorm/seed=1": Status.ABSENT,
    }
    assert [run.label for run in plan.to_do] == ["baseline/seed=0", "layernorm/seed=1"]
    assert plan.tokens(plan.to_do) == 2 * 384


def test_the_nearest_run_says_why_a_run_is_not_there(tiny: Experiment, there: There, tmp_path: Path) -> None:
    slower = with_values({"optimizer.peak_lr": 1e-3})
    near = there(norm(slower(tiny)).arms()[0].run(0))
    there(norm(with_values({"train.steps": 9, "train.batch_size": 16})(tiny)).arms()[0].run(0))
    there(norm(slower(tiny)).arms()[0].run(5))
    plan = planning.plan(norm(tiny), tmp_path / "trials", measure=False)
    (first, second) = plan.nearest
    assert (first.label, first.hash, first.differences) == (
        "baseline/seed=0",
        near.name,
        (("optimizer.peak_lr", 1e-3, 1e-2),),
    )
    assert second.hash == near.name
    paths = [path for path, _, _ in second.differences]
    assert paths == ["model.pattern.0.norm", "optimizer.peak_lr"]


def test_own_runs_explain_nothing(tiny: Experiment, there: There, tmp_path: Path) -> None:
    there(norm(tiny).arms()[0].run(0))
    assert planning.plan(norm(tiny), tmp_path / "trials", measure=False).nearest == ()


def test_time_is_that_of_runs_of_the_same_model(tiny: Experiment, there: There, tmp_path: Path) -> None:
    for seed, speed in ((7, 100.0), (8, 200.0), (9, 300.0)):
        for arm in norm(tiny).arms():
            there(arm.run(seed), tokens_per_second=speed, seconds={"total": 5.0, "train": 2.0})
    estimate = planning.plan(norm(tiny), tmp_path / "trials", measure=False).estimate
    assert estimate.seconds == pytest.approx(4 * (384 / 200.0 + 3.0))
    assert estimate.source == "speed of 6 finished runs of the same models and batches"


def test_time_is_scaled_by_flops_from_other_models(tiny: Experiment, there: There, tmp_path: Path) -> None:
    other = with_values({"model.pattern.0.ffn.hidden_dim": 64})(tiny)
    there(other, tokens_per_second=1.0, model_flops_per_second=1e6, seconds={"total": 5.0, "train": 2.0})
    estimate = planning.plan(norm(tiny), tmp_path / "trials", measure=False).estimate
    flops = [expected(arm.experiment)["flops"] for arm in norm(tiny).arms()]
    assert estimate.seconds == pytest.approx(sum(2 * (f / 1e6 + 3.0) for f in flops if f is not None))
    assert "scaled by FLOPs from 1 finished runs" in estimate.source


def test_time_without_any_run_is_a_guess_and_says_so(tiny: Experiment, tmp_path: Path) -> None:
    assert planning.plan(norm(tiny), tmp_path, measure=False).estimate.seconds is None
    guess = planning.plan(norm(tiny), tmp_path).estimate
    assert guess.seconds is not None
    assert guess.source.startswith("a guess: ")


def test_rates_that_are_not_tuned_yet_leave_the_compared_runs_open(
    tiny: Experiment, there: There, tmp_path: Path
) -> None:
    ablation = norm(tiny, learning_rates=(1e-3, 1e-2))
    plan = planning.plan(ablation, tmp_path / "trials", measure=False)
    assert [run.hash is None for run in plan.runs] == [False] * 4 + [True] * 4
    for arm in ablation.arms():
        for rate in ablation.learning_rates:
            there(arm.run(ablation.seeds_for_tuning[0], rate))
    plan = planning.plan(ablation, tmp_path / "trials", measure=False)
    assert [run.status for run in plan.runs] == [Status.FINISHED] * 4 + [Status.ABSENT] * 4
    assert None not in [run.hash for run in plan.runs]
