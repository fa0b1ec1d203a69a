"""Scaling studies: what their points cost, what their results say of runs of a known law, and the command."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmlab.cli import main
from llmlab.experiment import Experiment
from llmlab.models.config import Tied, Transformer, Untied
from llmlab.study import scaling_results, work
from llmlab.study.laws import Cost, Law
from llmlab.study.report import scaling as report
from llmlab.study.scaling import Scaling, for_steps, held_out, points, read_scaling
from llmlab.study.trials import Status, Trial

LAW = Law(E=0.9, A=30.0, B=60.0, alpha=0.4, beta=0.35)


def member(tiny: Experiment, width: int) -> Experiment:
    assert isinstance(tiny.model, Transformer)
    (block,) = tiny.model.pattern
    mixer = dataclasses.replace(block.mixer, num_heads=width // 8)
    ffn = dataclasses.replace(block.ffn, hidden_dim=2 * width)
    block = dataclasses.replace(block, mixer=mixer, ffn=ffn)
    model = dataclasses.replace(tiny.model, embed_dim=width, pattern=(block,), vocab_size=384)
    return dataclasses.replace(tiny, model=model)


def study(tiny: Experiment, **changes: Any) -> Scaling:
    return Scaling(
        **{
            "question": "How large?",
            "family": [member(tiny, width) for width in (8, 16, 24, 32, 48, 64)],
            "budgets": (2e9, 4e9, 8e9, 16e9),
            "resamples": 60,
            "delta": 0.01,
            **changes,
        }
    )


def trials(scaling: Scaling, *, noise: float = 0.0, law: Law = LAW, seed: int = 0) -> dict[str, Trial]:
    """Finished runs whose losses follow the law."""
    random = np.random.default_rng(seed)
    made = {}
    for point in points(scaling):
        loss = float(law.loss(point.parameters, point.tokens)) * math.exp(noise * random.normal())
        made[point.name] = Trial(
            directory=Path("runs/trials/00000000"),
            hash="00000000",
            status=Status.FINISHED,
            summary={"validation/loss": loss, "unit": "token", "seconds": {"total": 3.0}},
        )
    return made


def analysed(scaling: Scaling, runs: Mapping[str, Trial]) -> dict[str, Any]:
    return scaling_results.analyse(
        scaling, points(scaling), runs, name="tiny-scaling", command="llmlab scaling tiny.py", file=Path("tiny.py")
    )


def test_n_leaves_out_what_is_looked_up_and_c_is_the_models_own_count(tiny: Experiment) -> None:
    tied = member(tiny, 16)
    untied = dataclasses.replace(tied, model=dataclasses.replace(tied.model, head=Untied()))
    assert isinstance(tied.model, Transformer)
    assert isinstance(tied.model.head, Tied)
    # attention 4 D^2, feed-forward 2 D F with biases, two norms in the block; there is no final norm
    body = 4 * 16**2 + 2 * 16 * 32 + (32 + 16) + 2 * 16
    for experiment in (tied, untied):
        scaling = study(tiny, family=[experiment, *(member(tiny, width) for width in (24, 32))])
        mine = [point for point in points(scaling) if point.parameters == body]
        assert len(mine) == 4
        for point in mine:
            steps = point.experiment.train.steps
            assert point.tokens == steps * 8 * 8
            shapes = experiment.model.batch_shapes(8, 8)
            assert point.flops == steps * experiment.model.flops(shapes)
            assert point.budget is not None
            assert abs(point.flops / point.budget - 1) <= 0.5 / steps * 1.01
    every = study(tiny, family=[tied, member(tiny, 24), member(tiny, 32)], parameters="all")
    assert body + 384 * 16 in {point.parameters for point in points(every)}


def test_a_grid_has_its_tokens_and_seeds_are_runs_of_their_own(tiny: Experiment) -> None:
    found = points(study(tiny, budgets=(), tokens=(64 * 30, 64 * 60), seeds=2))
    assert len(found) == 6 * 2 * 2
    assert {point.tokens for point in found} == {64 * 30, 64 * 60}
    assert {point.experiment.train.seed for point in found} == {0, 1}
    assert len({point.name for point in found}) == len(found)
    assert all(point.experiment.train.evaluate_every == 0 for point in found)
    few = points(study(tiny, tokens_per_parameter=(5.0, 400.0)))
    assert few
    assert len(few) < 24
    assert all(5.0 <= point.tokens / point.parameters <= 400.0 for point in few)


def test_the_largest_budgets_are_held_out(tiny: Experiment) -> None:
    scaling = study(tiny, hold_out=2)
    runs = points(scaling)
    assert {point.budget for point in runs if point.name in held_out(scaling, runs)} == {8e9, 16e9}
    assert held_out(study(tiny, hold_out=0), runs) == set()
    grid = study(tiny, budgets=(), tokens=(64 * 30, 64 * 60), hold_out=3)
    largest = sorted(points(grid), key=lambda point: point.flops)[-3:]
    assert held_out(grid, points(grid)) == {point.name for point in largest}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": ()}, r"give budgets=\(...\) in FLOPs, or tokens"),
        ({"budgets": (1e9, -1.0)}, "must be positive numbers"),
        ({"level": 1.0}, "level=1.0 must lie between 0 and 1"),
        ({"seeds": 0}, "seeds=0"),
    ],
)
def test_a_definition_that_cannot_be_is_refused(tiny: Experiment, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study(tiny, **changes)


def test_every_point_that_cannot_run_is_named(tiny: Experiment) -> None:
    with pytest.raises(ValueError, match=r"family\[5\] of [\d,]+ parameters would be trained for \d+ steps"):
        points(study(tiny, budgets=(2e8, 4e9)))
    with pytest.raises(ValueError, match=r"family\[1\] has the \d+ parameters of family\[0\]"):
        points(study(tiny, family=[member(tiny, width) for width in (8, 8, 16)]))
    with pytest.raises(ValueError, match="has 2 sizes; a law in N needs at least 3"):
        study(tiny, family=[member(tiny, width) for width in (8, 16)])


def test_results_of_runs_that_follow_a_law_are_the_law(tiny: Experiment) -> None:
    scaling = study(tiny)
    results = analysed(scaling, trials(scaling))
    law = results["law"]
    assert (law["alpha"]["value"], law["beta"]["value"]) == (
        pytest.approx(0.4, abs=0.01),
        pytest.approx(0.35, abs=0.01),
    )
    cost = Cost(**results["cost"])
    assert law["exponents"]["parameters"]["value"] == pytest.approx(LAW.exponents(cost)[0], abs=0.01)
    assert [row["flops"] for row in results["frontier"]] == [2e9, 4e9, 8e9, 16e9, 16e10, 16e11]
    for row in results["frontier"]:
        n, d, loss = LAW.optimum(row["flops"], cost)
        assert row["loss"]["value"] == pytest.approx(loss, rel=0.01)
        assert (row["parameters"]["value"], row["tokens"]["value"]) == (
            pytest.approx(n, rel=0.1),
            pytest.approx(d, rel=0.1),
        )
    checked = results["held_out"]
    assert checked["runs"] == 18
    assert len(checked["predictions"]) == 6
    assert checked["error"] < 0.01
    assert results["problems"] == [text for text in results["problems"] if "minimum" in text or "power laws" in text]


@pytest.mark.scale
def test_noisy_runs_have_intervals_and_a_law_that_breaks_is_not_covered(tiny: Experiment) -> None:
    scaling = study(tiny, seeds=2, resamples=40)
    covered = 0
    for seed in (1, 2, 3):
        runs = trials(scaling, noise=0.005, seed=seed)
        results = analysed(scaling, runs)
        low, high = results["law"]["alpha"]["interval"]
        assert low < results["law"]["alpha"]["value"] < high
        covered += results["held_out"]["covered"]
    assert covered >= 26  # of 36 at level 0.9; those of one study depend on each other
    broken = dict(runs)
    for point in points(scaling):
        if point.budget == 16e9:  # the largest runs are worse than the smaller ones promise
            summary = runs[point.name].summary | {"validation/loss": runs[point.name].summary["validation/loss"] + 0.3}
            broken[point.name] = dataclasses.replace(runs[point.name], summary=summary)
    worse = analysed(scaling, broken)["held_out"]
    assert worse["covered"] == 0
    assert worse["error"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.scale
def test_runs_without_a_loss_are_told_and_left_out(tiny: Experiment) -> None:
    scaling = study(tiny)
    runs = trials(scaling)
    name = points(scaling)[3].name
    runs[name] = dataclasses.replace(runs[name], status=Status.DIVERGED, summary={}, problem="the loss is nan")
    results = analysed(scaling, runs)
    assert f"{name}: diverged: the loss is nan" in results["problems"]
    assert results["law"]["runs"] == 23
    none = analysed(scaling, {key: dataclasses.replace(t, status=Status.ABSENT, summary={}) for key, t in runs.items()})
    assert (none["law"], none["held_out"], none["frontier"]) == (None, None, [])
    assert any("no law could be fitted" in problem for problem in none["problems"])
    json.dumps(none, allow_nan=False)


@pytest.mark.scale
def test_the_report_is_whole_and_made_of_the_results_alone(tiny: Experiment, tmp_path: Path) -> None:
    scaling = study(tiny, question="<b>How</b> large?")
    results = analysed(scaling, trials(scaling, noise=0.003))
    (tmp_path / "results.json").write_text(json.dumps(results, allow_nan=False), encoding="utf-8")
    written = {path.name for path in report.write(tmp_path)}
    assert written == {"report.html", "report.md", "isoflop.png", "frontier.png", "contours.png", "held_out.png"}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;How&lt;/b&gt; large?" in page
    assert "<b>How" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name in written - {"report.html", "report.md"}:
        assert f"({name})" in text
    results["held_out"]["predictions"][0]["covered"] ^= True
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(ValueError, match="covered does not follow from its interval"):
        report.write(tmp_path)


FILE = """
import dataclasses

from llmlab.study.scaling import Scaling
from tiny import config


def member(width):
    base = config()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, embed_dim=width, vocab_size=384))


def scaling():
    return Scaling(question="How large?", family=[member(8), member(16), member(24)], tokens=(1280, 2560, 5120),
                   resamples=20)
"""


@pytest.mark.scale
def test_the_command_plans_runs_and_reports(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an executor that trains nothing; tests/study/test_transfer.py has the real one."""

    def execute(jobs: Mapping[str, Experiment], **where: Any) -> dict[str, Trial]:
        assert (where["workers"], where["root"]) == (2, Path("elsewhere"))
        study = read_scaling(Path("study.py"))
        assert isinstance(study, Scaling)
        return trials(study)

    monkeypatch.setattr(work, "execute", execute)
    monkeypatch.syspath_prepend(directory)
    (directory / "study.py").write_text(FILE, encoding="utf-8")
    assert main(["scaling", "study.py", "--dry-run", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["runs"]
    assert [row["status"] for row in rows] == ["absent"] * 9
    assert {row["tokens"] for row in rows} == {1280, 2560, 5120}
    assert not (directory / "studies").exists()
    assert main(["scaling", "study.py", "--json", "--workers", "2", "--runs", "elsewhere"]) == 0
    results = json.loads(capsys.readouterr().out)
    folder = directory / "studies" / "study-scaling"
    assert results == json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in results["runs"]] == ["finished"] * 9
    assert (folder / "report.html").exists()
    assert main(["scaling", "study.py", "--workers", "2", "--runs", "elsewhere"]) == 0
    assert "parameters growing as" in capsys.readouterr().out


def test_files_without_a_study_are_told_how_to_get_one(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scaling", "tiny.py"]) == 2
    assert "tiny.py has no function scaling(); add one" in capsys.readouterr().err
    assert main(["scaling"]) == 2
    assert main(["scaling", "--help"]) == 0


def test_for_steps_evaluates_once(tiny: Experiment) -> None:
    train = for_steps(tiny, 33).train
    assert (train.steps, train.evaluate_every, train.keep_best) == (33, 0, 0)
    assert train.checkpoint_every == tiny.train.checkpoint_every  # a run that is killed goes on
