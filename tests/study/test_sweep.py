"""`llmlab sweep` as a user runs it. Training is replaced by a formula here; test_work.py trains for real."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from llmlab import runs
from llmlab.cli import main
from llmlab.config import config_hash, save
from llmlab.experiment import Experiment, read_experiment
from llmlab.study.search import SAMPLERS, Search, Suggestions, make_pruner, make_sampler
from llmlab.study.space import axis, chain, grid, integer, log_uniform, sample, uniform
from llmlab.study.sweep import describe_axes, prepare, read_sweep
from llmlab.study.sweep_results import importance, results
from llmlab.study.trials import Status
from llmlab.training.directory import RunDirectory
from llmlab.training.faults import NonFiniteError, Pruned
from llmlab.training.report import NullReport

HEAD = """
from tiny import config
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.study.space import *
from llmlab.study.sweep import Sweep
"""
GRID = """
def sweep():
    return grid(axis("optimizer.peak_lr", 1e-3, 1e-2, 1e-1), axis("model.pattern.0.norm", RMSNorm(), LayerNorm()))
"""
SAMPLED = """
def sweep():
    return grid(sample("optimizer.peak_lr", log_uniform(1e-5, 1)), axis("train.seed", 0, 1),
                when("train.seed", 1, sample("model.embed_dim", integer(2, 6))))
"""


def loss_of(experiment: Experiment, step: int) -> float:
    """Best at a peak learning rate of 0.01, and better with every step."""
    return 2 + abs(math.log10(experiment.optimizer.peak_lr) + 2) + 1 / step


def formula(experiment: Experiment, out: Path, *, name: str, report: Any = None, **_: Any) -> None:
    """Writes what a training would have, and evaluates as it would."""
    trained.append(config_hash(experiment))
    report = report or NullReport()
    with RunDirectory(out).held():
        save(experiment, out)
        session = {"status": "finished", "first_step": 0}
        provenance = {"name": name, "sessions": [session], "environments": [{"python": "3"}]}
        try:
            if experiment.optimizer.peak_lr > 0.9:
                raise NonFiniteError(1, {"train/loss": math.nan}, None)
            record: dict[str, Any] = {}
            every, steps = experiment.train.evaluate_every, experiment.train.steps
            for step in range(every, steps + 1, every):
                record = {"step": step, "tokens": step, "validation/loss": loss_of(experiment, step)}
                with (out / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(record) + "\n")
                report.evaluation(record)
            summary = record | {"seconds": {"total": 0.5}, "unit": "token"}
            (out / "summary.json").write_text(json.dumps(summary))
        except Pruned as error:
            session |= {"status": "pruned", "last_step": error.step}
            raise
        finally:
            (out / "provenance.json").write_text(json.dumps(provenance))


trained: list[str] = []


@pytest.fixture
def make(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Function (the sweep's text) -> its file; trainings are formulas."""
    trained.clear()
    monkeypatch.setattr(runs, "train", formula)

    def write(text: str) -> Path:
        (directory / "file.py").write_text(HEAD + text, encoding="utf-8")
        return Path("file.py")

    return write


def read(folder: str = "studies/file-sweep") -> dict[str, Any]:
    return json.loads(Path(folder, "results.json").read_text())


@pytest.mark.scale
def test_a_grid_is_planned_run_and_found_again(make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    make(GRID)
    assert main(["sweep", "file.py", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "peak_lr=0.001 norm=LayerNorm()" in told
    assert "6 points: 0 exist already, 6 would run" in told
    assert not Path("studies").exists()
    assert not Path("runs").exists()

    assert main(["sweep", "file.py"]) == 0
    told = capsys.readouterr().out
    assert "6/6  peak_lr=0.1 norm=LayerNorm()  finished 3.1667" in told
    found = read()
    assert [trial["status"] for trial in found["trials"]] == ["finished"] * 6
    base = read_experiment(Path("file.py"))
    for trial in found["trials"]:
        lr = trial["point"]["optimizer.peak_lr"]
        assert trial["value"] == loss_of(replace(base, optimizer=replace(base.optimizer, peak_lr=lr)), 6)
        assert trial["curve"]["step"] == [2, 4, 6]
        assert Path(trial["directory"]).name == trial["hash"]
    assert found["best"]["point"] == {"optimizer.peak_lr": 0.01, "model.pattern.0.norm": "RMSNorm()"}
    assert found["best"]["command"] == "llmlab train file.py"  # the file's own values
    assert found["unit"] == "nats per token"
    assert found["importance"] is None  # six trials

    assert main(["sweep", "file.py", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["to_run"] == []
    assert {row["status"] for row in plan["points"]} == {"finished"}
    before = len(trained)
    # Another sweep that has some of the points runs the others only.
    make(GRID.replace("1e-3, ", "1e-4, "))
    assert main(["sweep", "file.py", "--out", "studies/other", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read("studies/other")
    assert len(trained) == before + 2
    assert len(set(trained)) == len(trained)


def test_the_best_is_named_with_what_its_command_cannot_say(
    make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make(
        'def sweep():\n    return Sweep(grid(axis("optimizer.peak_lr", 1e-3, 3e-1), '
        'axis("model.pattern.0.norm", LayerNorm())), direction="higher")'
    )
    assert main(["sweep", "file.py", "--train.seed", "4"]) == 0
    capsys.readouterr()
    assert main(["sweep", "best", "file.py"]) == 0
    told = capsys.readouterr().out
    assert "llmlab train file.py --optimizer.peak-lr 0.3 --train.seed 4\n" in told
    assert "with, in the file: model.pattern.0.norm=LayerNorm() (instead of RMSNorm())" in told
    assert main(["sweep", "best", "studies/file-sweep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["point"]["optimizer.peak_lr"] == 0.3


@pytest.mark.scale
def test_failures_are_listed_the_rest_goes_on_and_they_are_retried_when_asked(
    make: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make('def sweep():\n    return axis("optimizer.peak_lr", 1e-3, 1e-2, 1.0, 0.1)')

    def failing(experiment: Experiment, *arguments: Any, **options: Any) -> None:
        if experiment.optimizer.peak_lr == 1e-3:
            raise RuntimeError("out of memory")
        formula(experiment, *arguments, **options)

    monkeypatch.setattr(runs, "train", failing)
    assert main(["sweep", "file.py"]) == 1
    told = capsys.readouterr()
    assert "1 trials have no result; llmlab sweep retry-failed studies/file-sweep" in told.err
    statuses = {trial["name"]: trial["status"] for trial in read()["trials"]}
    assert statuses == {
        "peak_lr=0.001": "failed",
        "peak_lr=0.01": "finished",
        "peak_lr=1.0": "diverged",
        "peak_lr=0.1": "finished",
    }
    assert read()["trials"][0]["problem"] == "RuntimeError: out of memory"
    assert main(["sweep", "file.py"]) == 1  # it would only fail again
    monkeypatch.setattr(runs, "train", formula)
    capsys.readouterr()
    assert main(["sweep", "retry-failed", "file.py"]) == 0
    assert "peak_lr=0.001 waits again\npeak_lr=1.0 waits again\nto run them:\n  llmlab sweep file.py" in (
        capsys.readouterr().out
    )
    assert main(["sweep", "status", "file.py", "--json"]) == 0
    waiting = json.loads(capsys.readouterr().out)
    assert [trial["status"] for trial in waiting["trials"]] == ["absent", "finished", "unfinished", "finished"]
    assert main(["sweep", "file.py"]) == 0
    assert [trial["status"] for trial in read()["trials"]] == ["finished", "finished", "diverged", "finished"]


@pytest.mark.scale
def test_a_damaged_result_is_reported_and_never_the_best(
    make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make(GRID)
    assert main(["sweep", "file.py"]) == 0
    best = Path(read()["best"]["directory"])
    summary = json.loads((best / "summary.json").read_text())
    (best / "summary.json").write_text(json.dumps(summary | {"validation/loss": 0.1}))
    capsys.readouterr()
    assert main(["sweep", "report", "file.py"]) == 0
    found = read()
    (damaged,) = [trial for trial in found["trials"] if trial["hash"] == best.name]
    assert (damaged["status"], damaged["value"]) == ("corrupt", None)
    assert found["best"]["directory"] != best.as_posix()
    assert found["best"]["value"] > 2
    assert "validation/loss=0.1, and the end of metrics.jsonl has 2.1666" in found["problems"][0]
    assert main(["sweep", "retry-failed", "file.py"]) == 0
    assert main(["sweep", "file.py"]) == 0
    assert {trial["status"] for trial in read()["trials"]} == {"finished"}
    assert trained.count(best.name) == 2
    assert read()["problems"] == []


@pytest.mark.scale
def test_a_removed_directory_is_told_and_run_again(make: Callable[[str], Path]) -> None:
    import shutil

    make(GRID)
    assert main(["sweep", "file.py"]) == 0
    gone = Path(read()["trials"][3]["directory"])
    shutil.rmtree(gone)
    trial = results(Path("studies/file-sweep"))["trials"][3]
    assert (trial["status"], trial["value"]) == ("absent", None)
    assert "its directory is absent" in str(trial["problem"])
    assert main(["sweep", "file.py"]) == 0
    assert read()["trials"][3]["status"] == "finished"
    assert trained.count(gone.name) == 2


@pytest.mark.scale
def test_drawn_points_are_the_same_for_a_seed_and_go_on_where_they_stopped(make: Callable[[str], Path]) -> None:
    file = make(SAMPLED)
    for out, trials in (("a", (12,)), ("b", (5, 12))):
        for count in trials:
            prepare(file, trials=count, sampler="random", folder=Path(out), root=Path(out)).run()
    drawn = [[trial["point"] for trial in results(Path(out))["trials"]] for out in ("a", "b")]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12
    for point in drawn[0]:
        assert 1e-5 <= point["optimizer.peak_lr"] <= 1
        assert ("model.embed_dim" in point) == (point["train.seed"] == 1)
    failed = [trial for trial in results(Path("a"))["trials"] if trial["status"] == "failed"]
    odd = [point for point in drawn[0] if point.get("model.embed_dim", 2) % 2]
    assert len(failed) == len(odd) > 0  # embed_dim is no multiple of the heads: recorded, and the rest went on
    assert all("embed_dim" in trial["problem"] for trial in failed)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.scale
def test_every_sampler_draws_from_the_whole_space(sampler: str, make: Callable[[str], Path]) -> None:
    file = make(SAMPLED.replace("integer(2, 6)", "categorical(2, 4)"))
    prepare(file, trials=15, sampler=sampler).run()
    rates = [trial["point"]["optimizer.peak_lr"] for trial in results(Path("studies/file-sweep"))["trials"]]
    assert len(set(rates)) == 15
    assert min(rates) < 1e-3 < max(rates)


def test_tpe_comes_closer_to_the_best_than_chance() -> None:
    space = sample("rate", log_uniform(1e-8, 0.5))
    near: dict[str, int] = {}
    for sampler in ("random", "tpe"):
        study, rates = optuna.create_study(), []
        for number in range(40):
            study.sampler = make_sampler(Search(trials=40, sampler=sampler), number)
            trial = study.ask()
            rates.append(space.draw(Suggestions(trial))["rate"])
            study.tell(trial, abs(math.log10(rates[-1]) + 2))
        near[sampler] = sum(abs(math.log10(rate) + 2) < 0.5 for rate in rates[10:])
    assert near["tpe"] > 2 * near["random"]


@pytest.mark.scale
def test_a_finite_space_can_be_searched_and_a_part_of_a_grid_be_run(make: Callable[[str], Path]) -> None:
    file = make(GRID)
    part = prepare(file, trials=4, seed=1)
    assert len(part.points) == 4
    assert part.points == prepare(file, trials=4, seed=1).points
    searched = prepare(file, trials=5, sampler="tpe")
    searched.run()
    found = results(Path("studies/file-sweep"))
    assert len(found["trials"]) == 5
    assert len(trained) == len(set(trained))  # TPE may draw a point twice; it is trained once
    assert {trial["point"]["optimizer.peak_lr"] for trial in found["trials"]} <= {1e-3, 1e-2, 1e-1}


@pytest.mark.parametrize("pruner", ["asha", "hyperband", "median"])
@pytest.mark.scale
def test_bad_trials_are_given_up_and_good_ones_are_not(pruner: str, make: Callable[[str], Path]) -> None:
    file = make(SAMPLED)
    flags = ["--train.steps", "12"]
    prepare(file, flags=flags, trials=16, sampler="random", pruner=pruner).run()
    trials = results(Path("studies/file-sweep"))["trials"]
    pruned = [trial for trial in trials if trial["status"] == "pruned"]
    finished = [trial for trial in trials if trial["status"] == "finished"]
    assert len(pruned) >= 2
    assert finished
    assert all(trial["value"] is None and trial["curve"]["step"][-1] < 12 for trial in pruned)
    assert all(trial["curve"]["step"][-1] == 12 for trial in finished)
    for trial in pruned:
        directory = Path(trial["directory"])
        assert not (directory / "summary.json").exists()
        assert json.loads((directory / "provenance.json").read_text())["sessions"][-1]["status"] == "pruned"
    # Each gave way to others that were better at its last step.
    for trial in pruned:
        step, value = trial["curve"]["step"][-1], trial["curve"]["value"][-1]
        others = [dict(zip(*other["curve"].values(), strict=True)).get(step) for other in trials if other is not trial]
        assert any(other is not None and other < value for other in others)


@pytest.mark.scale
def test_a_pruned_point_of_a_grid_is_done_and_stays_so(make: Callable[[str], Path]) -> None:
    make('def sweep():\n    return axis("optimizer.peak_lr", 1e-2, 2e-2, 3e-2, 1e-5, 1e-4)')
    assert main(["sweep", "file.py", "--pruner", "asha", "--train.steps", "20"]) == 0
    statuses = [trial["status"] for trial in read()["trials"]]
    assert statuses[0] == "finished"
    assert statuses[-1] == "pruned"
    before = len(trained)
    assert main(["sweep", "file.py", "--pruner", "asha", "--train.steps", "20"]) == 0
    assert len(trained) == before


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", [], "file.py has no function sweep(); add one"),
        ("def sweep():\n    return [1]", [], "sweep() returned [1]; return a space"),
        ("def sweep():\n    return axis('optimizer.peek_lr', 1)", [], "did you mean optimizer.peak_lr?"),
        ("def sweep():\n    return sample('train.steps', uniform(1, 9))", [], "train.steps: expected int, got 1.0"),
        ("def sweep():\n    return 1 / 0", [], "ZeroDivisionError"),
        (GRID, ["--sampler", "magic"], "no sampler 'magic'"),
        (SAMPLED, ["--sampler", "grid"], "optimizer.peak_lr, model.embed_dim is sampled"),
        (GRID, ["--pruner", "magic"], "no pruner 'magic'"),
        (GRID, ["--pruner", "asha", "--train.evaluate-every", "0"], "there is none before the last"),
        (GRID, ["--trials", "0"], "--trials 0 runs nothing"),
        (GRID, ["--workers", "0"], "--workers 0 does nothing"),
        (GRID, ["--train.step", "3"], "--train.steps"),
        (GRID, ["--storage", "mysql://a/b"], "postgresql for many"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    text: str, arguments: list[str], message: str, make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    make(text)
    assert main(["sweep", "file.py", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not Path("studies").exists()
    assert not Path("runs").exists()


def test_looking_at_what_is_not_there_says_so(make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    make(GRID)
    for verb in ("status", "report", "best", "retry-failed"):
        assert main(["sweep", verb, "file.py"]) == 2
        assert "studies/file-sweep is no sweep" in capsys.readouterr().err
    assert main(["sweep"]) == 2
    assert main(["sweep", "--help"]) == 0
    assert "retry-failed" in capsys.readouterr().out


def test_a_password_is_written_nowhere(make: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    file = make(GRID)
    address = "postgresql+psycopg://me:secret@127.0.0.1:1/database"
    assert main(["sweep", "file.py", "--storage", address]) == 1
    assert "127.0.0.1" in (error := capsys.readouterr().err)
    assert "secret" not in error
    for path in Path().rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    assert main(["sweep", "status", "file.py"]) == 2
    assert "needs its password" in capsys.readouterr().err
    assert "secret" not in json.dumps(prepare(file, storage=address).definition())


def test_axes_are_described_as_they_were_sampled() -> None:
    described = describe_axes(
        chain(
            grid(axis("a", 1e-3, 1e-2), axis("b", 2, 3), axis("c", "x", None)),
            grid(sample("d", log_uniform(1, 2)), sample("e", integer(1, 9)), sample("f", uniform(0, 1)), axis("a", 1)),
        )
    )
    rows = {row["path"]: [row[key] for key in ("kind", "log", "values", "low", "high")] for row in described}
    assert rows == {
        "a": ["values", True, [1e-3, 1e-2, 1], 1e-3, 1],
        "b": ["values", False, [2, 3], 2, 3],
        "c": ["values", False, ["x", None], None, None],
        "d": ["log_uniform", True, None, 1, 2],
        "e": ["integer", False, None, 1, 9],
        "f": ["uniform", False, None, 0, 1],
    }


def test_importance_finds_the_axis_that_matters_in_either_direction() -> None:
    axes = describe_axes(
        grid(sample("much", uniform(0, 1)), sample("little", log_uniform(1e-3, 1)), axis("kind", 0, 1))
    )
    points = [{"much": (7 * i % 40) / 40, "little": 10 ** -(i % 3), "kind": "ab"[i % 2]} for i in range(40)]
    trials = [{"point": point, "value": point["much"] + 0.001 * point["little"]} for point in points]
    for direction in ("lower", "higher"):
        shares = importance(trials, axes, direction)
        assert shares is not None
        assert shares["much"] > 0.8
        assert sum(shares.values()) == pytest.approx(1)
    assert importance(trials[:9], axes, "lower") is None
    assert importance([{**trial, "value": 1.0} for trial in trials], axes, "lower") is None


def test_samplers_and_pruners_have_names() -> None:
    with pytest.raises(ValueError, match="random, tpe, qmc"):
        make_sampler(Search(trials=1, sampler="magic"), 0)
    with pytest.raises(ValueError, match="none, asha"):
        make_pruner("magic", 1, 2)
    assert {str(status) for status in Status} >= {"pruned", "corrupt"}


def test_a_space_alone_is_a_sweep_of_the_validation_loss(make: Callable[[str], Path]) -> None:
    sweep = read_sweep(make(GRID))
    assert (sweep.metric, sweep.direction) == ("validation/loss", "lower")
