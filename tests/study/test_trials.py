"""A trial's directory is believed as far as its files agree; what is damaged is told and has no value."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmlab import runs
from llmlab.config import config_hash
from llmlab.experiment import Experiment
from llmlab.study.trials import FAILURE, Status, directory_of, forgive, read_trial, run_trial
from llmlab.training.directory import RunDirectory
from llmlab.training.faults import Pruned
from llmlab.training.report import NullReport

ROOT = Path("trials")


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(runs, "train", fail)


@pytest.fixture
def written(tiny: Experiment) -> Path:
    """Directory of a finished trial, as training writes it; test_a_trial_is_trained_once shows that it does."""
    directory = directory_of(ROOT, tiny)
    directory.mkdir(parents=True)
    from llmlab.config import save

    save(tiny, directory)
    records = [
        {"step": 5, "tokens": 320, "train/loss": 3.0},
        {"step": 6, "tokens": 384, "train/loss": 2.5},
        {"step": 6, "tokens": 384, "validation/loss": 2.75},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {"step": 6, "tokens": 384, "train/loss": 2.5, "validation/loss": 2.75, "validation/perplexity": 15.6}
    (directory / "summary.json").write_text(json.dumps(summary))
    (directory / "provenance.json").write_text(json.dumps({"sessions": [{"status": "finished"}]}))
    return directory


def edit(name: str, old: str, new: str) -> Callable[[Path], Any]:
    def change(directory: Path) -> None:
        text = (directory / name).read_text()
        assert old in text
        (directory / name).write_text(text.replace(old, new))

    return change


def cut(name: str, keep: int) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:keep])


def put(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(content)


def test_files_that_agree_are_a_result(written: Path, tiny: Experiment) -> None:
    for trial in (read_trial(written), read_trial(written, tiny)):
        assert trial.status is Status.FINISHED, trial.problem
        assert trial.value("validation/loss") == 2.75
        assert trial.value("validation/accuracy") is None
        assert [record["step"] for record in trial.metrics] == [5, 6, 6]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cut("summary.json", 20), "summary.json is not JSON"),
        (put("summary.json", b""), "summary.json is not JSON"),
        (put("summary.json", b"[1]"), "summary.json holds no JSON object"),
        (put("summary.json", b"\xff\xfe{}"), "summary.json is not JSON"),
        (put("summary.json", b"{}"), "summary.json is of step None"),
        (edit("summary.json", "2.75", "2.70"), "validation/loss=2.7, and the end of metrics.jsonl has 2.75"),
        (edit("summary.json", "2.75", '"2.75"'), "validation/loss='2.75', which is no number"),
        (edit("summary.json", "384", "385"), "tokens=385"),
        (cut("metrics.jsonl", 100), "and the end of metrics.jsonl has"),
        (lambda directory: (directory / "metrics.jsonl").unlink(), "has None"),
        (edit("metrics.jsonl", '{"step": 6, "tokens": 384, "t', '{"step: 6, "tokens": 384, "t'), "line 2"),
        (edit("config.json", '"peak_lr": 0.01', '"peak_lr": 0.02'), "config of another experiment"),
        (cut("config.json", 30), "config.json is not JSON"),
        (put("provenance.json", b"{"), "provenance.json is not JSON"),
        (lambda directory: (directory / "provenance.json").unlink(), "no provenance.json"),
        (put(FAILURE, b'{"status": "tired"}'), "status 'tired'"),
    ],
)
def test_files_that_do_not_are_told_and_have_no_value(
    damage: Callable[[Path], Any], problem: str, written: Path, tiny: Experiment, no_training: None
) -> None:
    damage(written)
    trial = read_trial(written)
    assert trial.status is Status.CORRUPT
    assert problem in str(trial.problem)
    assert trial.value("validation/loss") is None
    assert run_trial(tiny, ROOT, name="tiny").status is Status.CORRUPT  # nor is it touched
    assert forgive(trial)
    assert read_trial(written).status is Status.ABSENT
    assert len(list((ROOT / "damaged").iterdir())) == 1


def test_another_experiments_directory_is_no_result_of_this_one(written: Path, tiny: Experiment) -> None:
    other = replace(tiny, train=replace(tiny.train, seed=1))
    shutil.copytree(written, directory_of(ROOT, other))
    trial = read_trial(directory_of(ROOT, other), other)
    assert trial.status is Status.CORRUPT
    assert config_hash(tiny) in str(trial.problem)


def test_what_is_not_finished_says_how_it_stands(written: Path) -> None:
    assert read_trial(ROOT / "nothing").status is Status.ABSENT
    (written / "summary.json").unlink()
    with (written / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')  # a killed writer's
    assert read_trial(written).status is Status.UNFINISHED
    with RunDirectory(written).held():
        assert read_trial(written).status is Status.RUNNING
    (written / "provenance.json").write_text(json.dumps({"sessions": [{"status": "pruned"}]}))
    pruned = read_trial(written)
    assert pruned.status is Status.PRUNED
    assert pruned.value("validation/loss") is None
    (written / FAILURE).write_text(json.dumps({"status": "diverged", "error": "loss=nan"}))
    assert (read_trial(written).status, read_trial(written).problem) == (Status.DIVERGED, "loss=nan")


@pytest.mark.scale
def test_a_trial_is_trained_once_and_equal_experiments_meet(tiny: Experiment) -> None:
    trial = run_trial(tiny, ROOT, name="first", experiment_file=Path("tiny.py"))
    assert trial.status is Status.FINISHED, trial.problem
    assert trial.directory == ROOT / config_hash(tiny)
    assert trial.value("validation/loss") == trial.metrics[-1]["validation/loss"]
    again = run_trial(replace(tiny), ROOT, name="second")
    assert again.metrics == trial.metrics
    assert [session["status"] for session in again.provenance["sessions"]] == ["finished"]
    assert again.provenance["name"] == "first"


@pytest.mark.scale
def test_a_pruned_trial_is_never_taken_for_finished_and_another_study_finishes_it(tiny: Experiment) -> None:
    class Impatient(NullReport):
        def evaluation(self, metrics: Any) -> None:
            if metrics["step"] == 4:
                raise Pruned(4)

    pruned = run_trial(tiny, ROOT, name="pruned", report=Impatient())
    assert pruned.status is Status.PRUNED
    assert pruned.summary == {}
    assert pruned.value("validation/loss") is None
    assert pruned.provenance["sessions"][-1]["status"] == "pruned"
    assert pruned.provenance["sessions"][-1]["last_step"] == 4
    finished = run_trial(tiny, ROOT, name="patient")
    assert finished.status is Status.FINISHED
    alone = run_trial(tiny, Path("elsewhere"), name="alone")
    assert finished.value("validation/loss") == alone.value("validation/loss")


@pytest.mark.scale
def test_errors_are_kept_with_their_traceback_and_not_met_again_unless_asked(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = replace(tiny, optimizer=replace(tiny.optimizer, peak_lr=1e38))
    trial = run_trial(diverging, ROOT, name="diverging")
    assert trial.status is Status.DIVERGED
    assert "at step" in str(trial.problem)
    kept = json.loads((trial.directory / FAILURE).read_text())
    assert kept["status"] == "diverged"
    assert isinstance(kept["step"], int)

    attempts = []

    def fail(*_: Any, **__: Any) -> None:
        attempts.append(1)
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(runs, "train", fail)
        assert run_trial(diverging, ROOT, name="diverging").status is Status.DIVERGED
        for _ in range(2):
            trial = run_trial(tiny, ROOT, name="failing")
            assert (trial.status, trial.problem) == (Status.FAILED, "RuntimeError: the disk is full")
    assert len(attempts) == 1
    assert "in fail" in json.loads((trial.directory / FAILURE).read_text())["traceback"]
    assert forgive(trial)
    assert not forgive(read_trial(trial.directory))
    assert run_trial(tiny, ROOT, name="recovered").status is Status.FINISHED


def test_a_directory_in_use_is_waited_for(written: Path, tiny: Experiment, no_training: None) -> None:
    summary = (written / "summary.json").read_bytes()
    (written / "summary.json").unlink()
    began = threading.Event()

    def other() -> None:
        with RunDirectory(written).held():
            began.set()
            time.sleep(1)
            (written / "summary.json").write_bytes(summary)

    thread = threading.Thread(target=other)
    thread.start()
    began.wait()
    trial = run_trial(tiny, ROOT, name="late")
    thread.join()
    assert trial.status is Status.FINISHED
