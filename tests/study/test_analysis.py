"""Results: every number from the right seeds; what diverged counts, what cannot be read is left out everywhere."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from llmlab.experiment import Experiment
from llmlab.nn.attention import Attention
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.optim import Constant
from llmlab.study.ablation import Ablation, swap, unchanged, with_values
from llmlab.study.analysis import decide
from llmlab.study.conduct import Conduct
from llmlab.study.outcomes import comparison_jobs, table
from llmlab.study.record import PeekingError, read_record
from llmlab.study.trials import Status
from tests.study.fakes import FakeExecutor, Value, finished, trial

Carry = Callable[..., dict[str, Any]]
BASE = (3.10, 3.00, 3.20, 3.05, 3.15)
BETTER = (2.90, 2.84, 2.97, 2.86, 2.96)


def norm(tiny: Experiment, **fields: Any) -> Ablation:
    if not {"variants", "factors", "leave_one_out"} & fields.keys():
        fields["variants"] = {"layernorm": swap(RMSNorm, LayerNorm())}
    return Ablation(**{"hypothesis": "LayerNorm is no worse than RMSNorm", "baseline": tiny} | fields)


@pytest.fixture
def carry(tmp_path: Path) -> Carry:
    """Function (ablation, value) -> results.json, checked to be strict JSON and the same as what is returned."""

    def carried(ablation: Ablation, value: Value | FakeExecutor, **how: Any) -> dict[str, Any]:
        execute = value if isinstance(value, FakeExecutor) else FakeExecutor(value)
        results = Conduct(name="norm", folder=tmp_path / "study", execute=execute, **how).run(ablation)
        text = (tmp_path / "study" / "results.json").read_text(encoding="utf-8")

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} in results.json")

        assert json.loads(text, parse_constant=refuse) == results
        return results

    return carried


def by_arm(**values: tuple[float, ...]) -> Value:
    return lambda arm, seed, experiment: values[arm][seed]


def test_the_comparison_has_the_numbers_of_the_pairs(carry: Carry, tiny: Experiment) -> None:
    results = carry(norm(tiny, claim="better", margin=0.05), by_arm(baseline=BASE, layernorm=BETTER))
    (row,) = results["comparisons"]
    d = np.subtract(BETTER, BASE)
    assert row["differences"] == pytest.approx(d.tolist())
    assert row["difference"] == pytest.approx(d.mean())
    assert row["p_t"] == pytest.approx(scipy.stats.ttest_rel(BETTER, BASE)[1])
    assert row["p_claim"] == pytest.approx(scipy.stats.ttest_1samp(d, -0.05, alternative="less")[1])
    assert row["p_sign_flip"] == pytest.approx(2 / 32)
    interval = scipy.stats.ttest_1samp(d, 0).confidence_interval(0.95)
    assert row["t_interval"] == pytest.approx([interval.low, interval.high])
    assert row["interval"][0] < d.mean() < row["interval"][1]
    assert (row["verdict"], results["verdict"]) == ("supported", "supported")
    assert results["arms"][0]["mean"] == pytest.approx(np.mean(BASE))
    assert results["arms"][1]["std"] == pytest.approx(np.std(BETTER, ddof=1))
    assert results["unit"] == "nats per token"


def test_a_higher_metric_may_be_better(carry: Carry, tiny: Experiment) -> None:
    ablation = norm(tiny, claim="better", direction="higher", metric="validation/accuracy")

    def value(arm: str, seed: int, experiment: Experiment) -> Any:
        accuracy = 0.4 + 0.01 * seed + (0.1 + 0.001 * seed if arm == "layernorm" else 0.0)
        return finished(experiment, 3.0, **{"validation/accuracy": accuracy})

    assert carry(ablation, value)["verdict"] == "supported"
    assert carry(replace(ablation, claim="worse"), value, exploratory=True)["verdict"] == "refuted"


def test_curves_and_speed_up(carry: Carry, tiny: Experiment) -> None:
    results = carry(norm(tiny, seeds=3), by_arm(baseline=BASE, layernorm=BETTER))
    curve = results["arms"][0]["curve"]
    assert curve["step"] == [2, 4, 6]
    assert curve["tokens"] == [100, 200, 300]
    assert curve["mean"] == pytest.approx([np.mean(BASE[:3]) + offset for offset in (1.0, 0.5, 0.0)])
    (row,) = results["comparisons"]
    assert row["steps_to_target"]["target"] == max(BASE[:3])
    # straight lines of 0.25 a step: a run that ends x below the target is there 4 x earlier
    steps = [6 - 4 * (3.20 - value) for value in BETTER[:3]]
    assert row["steps_to_target"]["variant"]["steps"] == pytest.approx(steps)
    assert row["speed_up"]["bound"] == "exact"
    assert row["speed_up"]["ratio"] > 1


# --- seeds that did not go well --------------------------------------------------------------------------------------


def test_a_diverged_seed_counts_as_the_worst_there_is(carry: Carry, tiny: Experiment) -> None:
    def value(arm: str, seed: int, experiment: Experiment) -> Any:
        if (arm, seed) == ("layernorm", 2):
            return trial(experiment, Status.DIVERGED, problem="train/loss=nan at step 4")
        return 7.5 if (arm, seed) == ("baseline", 4) else BASE[seed]

    results = carry(norm(tiny, claim="better"), value)
    guess = math.log(tiny.tokenizer.build().vocab_size)
    assert guess < 7.5
    assert results["arms"][1]["values"][2] == 7.5
    assert results["arms"][1]["diverged"] == [2]
    assert results["arms"][1]["runs"][2]["value"] is None
    assert results["diverged_value"] == {"value": 7.5, "source": "the worst value of the study"}
    assert "layernorm/seed=2 diverged and count as 7.5000" in results["remarks"][0]
    assert results["verdict"] == "inconclusive"


def test_a_diverged_loss_is_at_least_that_of_a_guess(carry: Carry, tiny: Experiment) -> None:
    results = carry(
        norm(tiny),
        lambda arm, seed, e: trial(e, Status.DIVERGED) if (arm, seed) == ("baseline", 0) else 3.0,
    )
    assert results["arms"][0]["values"][0] == pytest.approx(math.log(tiny.tokenizer.build().vocab_size))
    assert results["diverged_value"]["source"] == "the loss of a uniform guess, ln V"


def test_a_loss_of_nan_at_the_end_is_diverged_and_not_missing(carry: Carry, tiny: Experiment) -> None:
    results = carry(norm(tiny), lambda arm, seed, e: math.nan if (arm, seed) == ("baseline", 1) else 3.0)
    assert results["arms"][0]["diverged"] == [1]
    assert results["problems"] == []


@pytest.mark.parametrize("status", [Status.CORRUPT, Status.FAILED, Status.UNFINISHED])
def test_a_run_without_a_result_takes_its_seed_out_of_every_arm(carry: Carry, tiny: Experiment, status: Status) -> None:
    def value(arm: str, seed: int, experiment: Experiment) -> Any:
        if (arm, seed) == ("layernorm", 1):
            return trial(experiment, status, problem="summary.json is not JSON", summary={"validation/loss": -99.0})
        return {"baseline": BASE, "layernorm": BETTER}[arm][seed]

    results = carry(norm(tiny, claim="better"), value)
    kept = [0, 2, 3, 4]
    assert results["paired_seeds"] == kept
    assert [arm["values"][1] for arm in results["arms"]] == [None, None]
    assert results["arms"][0]["mean"] == pytest.approx(np.mean([BASE[i] for i in kept]))
    assert results["comparisons"][0]["difference"] == pytest.approx(np.mean([BETTER[i] - BASE[i] for i in kept]))
    (problem,) = results["problems"]
    assert (problem["arm"], problem["seed"], problem["problem"]) == ("layernorm", 1, "summary.json is not JSON")
    assert "seed 1 left out of every arm" in results["reason"]


def test_no_pair_is_no_verdict(carry: Carry, tiny: Experiment) -> None:
    def value(arm: str, seed: int, experiment: Experiment) -> Any:
        return trial(experiment, Status.FAILED, problem="out of memory") if arm == "layernorm" else 3.0

    results = carry(norm(tiny), value)
    assert (results["verdict"], results["reason"]) == ("inconclusive", "no seed has a result in every arm")
    assert results["comparisons"][0]["difference"] is None


def test_a_metric_that_is_not_there_is_told_with_those_that_are(carry: Carry, tiny: Experiment) -> None:
    results = carry(norm(tiny, metric="validation/acuracy"), by_arm(baseline=BASE, layernorm=BETTER))
    assert "no validation/acuracy; it has" in results["problems"][0]["problem"]
    assert "validation/loss" in results["problems"][0]["problem"]
    # nobody has seen anything: the name may be put right
    results = carry(norm(tiny), by_arm(baseline=BASE, layernorm=BETTER), allow_change=True)
    assert (results["mode"], results["problems"]) == ("fixed", [])


# --- arms that do not match ------------------------------------------------------------------------------------------


def test_a_mismatch_found_afterwards_withholds_the_verdict(carry: Carry, tiny: Experiment) -> None:
    def value(arm: str, seed: int, experiment: Experiment) -> Any:
        loss = {"baseline": BASE, "layernorm": BETTER}[arm][seed]
        return finished(experiment, loss, tokens_per_second=50.0 if arm == "layernorm" else 100.0)

    ablation = norm(tiny, claim="better", match="seconds", tolerance=0.5)
    results = carry(ablation, value)
    assert results["withheld"]
    assert results["verdict"] == results["comparisons"][0]["verdict"] == "inconclusive"
    assert results["reason"].startswith("withheld: layernorm has 6 seconds, the baseline 3 (+100.00%)")
    (mismatch,) = results["mismatches"]
    assert mismatch == {"arm": "layernorm", "quantity": "seconds", "baseline": 3, "variant": 6, "relative": 1}
    why = replace(ablation, acknowledge_mismatch="the kernel is not optimised yet")
    results = carry(why, value)  # the report shows it, so it may come afterwards
    assert (results["verdict"], results["withheld"], results["mode"]) == ("supported", False, "fixed")
    assert results["acknowledged"] == "the kernel is not optimised yet"
    assert len(results["mismatches"]) == 1


def test_achieved_is_what_the_runs_recorded(carry: Carry, tiny: Experiment) -> None:
    results = carry(norm(tiny), by_arm(baseline=BASE, layernorm=BETTER))
    # 300 tokens at 100 a second, 600 FLOP/s
    assert results["arms"][0]["achieved"] == {"tokens": 300, "parameters": 1000, "flops": 1800, "seconds": 3}


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_a_factorial_separates_what_adds_up_from_what_does_not(carry: Carry, tiny: Experiment) -> None:
    factors = {
        "norm": {"layer": swap(RMSNorm, LayerNorm()), "rms": unchanged},
        "heads": {"2": unchanged, "1": swap(Attention, lambda a: replace(a, num_heads=1))},
    }
    noise = np.random.default_rng(0).normal(0, 0.001, (4, 5))
    cells = {"baseline": 3.0, "norm=layer,heads=2": 3.1, "norm=rms,heads=1": 3.2, "norm=layer,heads=1": 3.7}
    rows = {arm: value + noise[i] for i, (arm, value) in enumerate(cells.items())}
    results = carry(norm(tiny, factors=factors, claim="worse"), lambda arm, seed, e: float(rows[arm][seed]))
    effects = {effect["term"]: effect for effect in results["factorial"]["effects"]}
    assert effects["norm=layer"]["estimate"] == pytest.approx((0.1 + 0.5) / 2, abs=0.003)
    assert effects["heads=1"]["estimate"] == pytest.approx((0.2 + 0.6) / 2, abs=0.003)
    assert effects["norm=layer x heads=1"]["estimate"] == pytest.approx(0.4, abs=0.005)
    assert effects["norm=layer x heads=1"]["p_holm"] < 0.001
    assert results["factorial"]["factors"]["norm"] == ["rms", "layer"]  # the baseline's level first
    assert results["verdict"] == "supported"


def test_each_arm_is_compared_at_its_own_best_rate_on_seeds_that_did_not_choose_it(
    carry: Carry, tiny: Experiment
) -> None:
    best = {"baseline": 1e-2, "layernorm": 1e-3}

    def value(arm: str, seed: int, experiment: Experiment) -> Any:
        rate = experiment.optimizer.peak_lr
        if rate == 1.0:
            return trial(experiment, Status.DIVERGED)
        return 3.0 + abs(math.log10(rate / best[arm])) + 0.01 * (seed % 7)

    execute = FakeExecutor(value)
    results = carry(norm(tiny, learning_rates=(1.0, 1e-2, 1e-3), tuning_seeds=2, seeds=3, margin=0.01), execute)
    assert [arm["learning_rate"] for arm in results["arms"]] == [1e-2, 1e-3]
    assert [run["learning_rate"] for run in results["arms"][1]["runs"]] == [1e-3] * 3
    assert [row["rate"] for row in results["arms"][0]["learning_rates"]] == [1e-3, 1e-2, 1.0]
    assert results["arms"][0]["learning_rates"][2]["values"] == [None, None]
    tuning = {label for label in execute.asked if "learning_rate" in label}
    assert len(tuning) == 2 * 3 * 2
    assert len(execute.asked) == len(tuning) + 2 * 3
    compared = {run["seed"] for arm in results["arms"] for run in arm["runs"]}
    assert compared == {0, 1, 2}
    assert not any(label.endswith(f"seed={seed}") for label in tuning for seed in compared)
    # at equal rates the difference would be 1: both arms at their own best are alike
    assert results["comparisons"][0]["difference"] == pytest.approx(0.0)
    assert results["verdict"] == "supported"
    assert any("best learning rate of layernorm is 0.001, at the edge of the grid" in r for r in results["remarks"])
    sensitivity = results["arms"][0]["learning_rate_sensitivity"]
    guess = math.log(tiny.tokenizer.build().vocab_size)
    losses = [4.0, 3.0, guess]
    assert sensitivity["value"] == pytest.approx(np.mean(losses) - 3.0, abs=0.02)


def test_an_arm_that_trains_at_no_rate_is_told(carry: Carry, tiny: Experiment) -> None:
    ablation = norm(tiny, learning_rates=(1e-3, 1e-2))
    with pytest.raises(ValueError, match="layernorm has no learning rate that trains"):
        carry(ablation, lambda arm, seed, e: 3.0 if arm == "baseline" else trial(e, Status.DIVERGED))


# --- A/A studies -----------------------------------------------------------------------------------------------------


@pytest.mark.scale
def test_equal_arms_are_seldom_called_different(tiny: Experiment) -> None:
    """60 studies, arms alike: at level 0.05 more than 10 false verdicts come once in 10,000 times."""
    rng = np.random.default_rng(0)
    ablation = norm(tiny, claim="better")
    arms = ablation.arms()
    jobs = comparison_jobs(arms, ablation.first_seeds, {})
    wrong = 0
    for _ in range(60):
        losses = 3.0 + rng.normal(0.0, 1.0, (5, 1)) + rng.normal(0.0, 0.1, (5, 2))
        names = [arm.name for arm in arms]
        trials = {job.label: finished(job.experiment, float(losses[job.seed, names.index(job.arm)])) for job in jobs}
        wrong += decide(ablation, arms, table(ablation, arms, jobs, trials))["layernorm"].verdict == "supported"
    assert wrong <= 10


def test_identical_arms_are_no_better(carry: Carry, tiny: Experiment) -> None:
    results = carry(norm(tiny, claim="better"), by_arm(baseline=BASE, layernorm=BASE))
    assert results["verdict"] == "refuted"
    assert results["comparisons"][0]["difference"] == 0


# --- how many seeds --------------------------------------------------------------------------------------------------


def test_seeds_are_added_to_all_arms_until_the_verdict_is_settled(carry: Carry, tiny: Experiment) -> None:
    execute = FakeExecutor(
        lambda arm, seed, e: 3.0 + 0.01 * ((seed * 7) % 5) + (0.5 + 0.02 * (seed % 3)) * (arm != "baseline")
    )
    results = carry(norm(tiny, seeds="until settled", claim="worse"), execute)
    assert results["mode"] == "sequential"
    assert results["verdict"] == "supported"
    assert 3 <= len(results["seeds"]) < 20
    assert len(execute.asked) == 2 * len(results["seeds"])
    assert results["comparisons"][0]["interval_method"] == "confidence sequence"


@pytest.mark.scale
def test_a_study_that_does_not_settle_ends_at_its_maximum_or_its_budget(carry: Carry, tiny: Experiment) -> None:
    def value(arm: str, seed: int, experiment: Experiment) -> float:
        return 3.0 + (0.1 if arm == "baseline" else -0.1) * (-1) ** seed

    ablation = norm(tiny, seeds="until settled", claim="better", max_seeds=6)
    assert len(carry(ablation, value)["seeds"]) == 6
    # it may go on: its intervals hold at any number of seeds
    results = carry(replace(ablation, max_seeds=20, budget=17), value)
    assert (len(results["seeds"]), results["mode"], results["verdict"]) == (8, "sequential", "inconclusive")
    with pytest.raises(PeekingError):  # a fixed number may not be chosen now
        carry(replace(ablation, seeds=8), value)


def test_seeds_added_after_a_look_are_refused_or_exploratory(carry: Carry, tiny: Experiment, tmp_path: Path) -> None:
    values = by_arm(baseline=BASE * 2, layernorm=BETTER * 2)
    carry(norm(tiny), values)
    before = (tmp_path / "study" / "results.json").read_bytes()
    with pytest.raises(PeekingError, match=r"results of .* over 5 seeds are known") as refused:
        carry(norm(tiny, seeds=8), values)
    assert "seeds.count: 5 -> 8" in str(refused.value)
    assert "--exploratory" in str(refused.value)
    assert (tmp_path / "study" / "results.json").read_bytes() == before
    with pytest.raises(PeekingError):  # fewer is a choice as well
        carry(norm(tiny, seeds=4), values)
    results = carry(norm(tiny, seeds=8), values, exploratory=True)
    assert results["mode"] == "exploratory"
    assert "over 5 seeds were known: seeds.count: 5 -> 8" in results["exploratory"]
    # and it stays so
    assert carry(norm(tiny, seeds=8), values)["mode"] == "exploratory"


def test_a_question_changed_after_the_answer_is_exploratory(carry: Carry, tiny: Experiment) -> None:
    values = by_arm(baseline=BASE, layernorm=BETTER)
    carry(norm(tiny), values)
    with pytest.raises(PeekingError, match="a question that is chosen after the answer"):
        carry(norm(tiny, margin=0.5), values, allow_change=True)
    assert "margin: 0.0 -> 0.5" in carry(norm(tiny, margin=0.5), values, exploratory=True)["exploratory"]


def test_seeds_may_change_while_no_result_is_known(carry: Carry, tiny: Experiment) -> None:
    def stop(jobs: Any) -> Any:
        raise KeyboardInterrupt

    values = by_arm(baseline=BASE, layernorm=BETTER)
    with pytest.raises(KeyboardInterrupt):
        carry(norm(tiny), FakeExecutor(lambda *_: stop(None)))
    assert carry(norm(tiny, seeds=4), values)["mode"] == "fixed"


def test_a_folder_of_another_definition_is_refused_with_what_differs(
    carry: Carry, tiny: Experiment, tmp_path: Path
) -> None:
    def stop(*_: Any) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry(norm(tiny), stop)
    values = by_arm(baseline=BASE, layernorm=BETTER)
    changed = norm(with_values({"optimizer.schedule": Constant(warmup_steps=1)})(tiny))
    with pytest.raises(ValueError, match="was begun by another definition") as refused:
        carry(changed, values)
    assert "arms.baseline.config.optimizer.schedule" in str(refused.value)
    assert "--allow-config-change" in str(refused.value)
    assert carry(changed, values, allow_change=True)["mode"] == "fixed"
    record = read_record(tmp_path / "study")
    assert record is not None
    assert record.reported is not None
    assert record.reported["seeds"] == 5


def test_a_folder_that_is_no_study_is_left_alone(carry: Carry, tiny: Experiment, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "thesis.tex").write_text("precious", encoding="utf-8")
    with pytest.raises(ValueError, match="exists and is no study"):
        carry(norm(tiny), by_arm(baseline=BASE, layernorm=BETTER))
    (tmp_path / "study" / "study.json").write_text('{"kind": "sweep"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds a sweep"):
        carry(norm(tiny), by_arm(baseline=BASE, layernorm=BETTER))
