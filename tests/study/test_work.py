"""Real trainings by real workers: each experiment once, whoever is stopped or killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmlab.config import config_hash
from llmlab.experiment import Experiment, read_experiment
from llmlab.study import crew, work
from llmlab.study.sweep import prepare
from llmlab.study.sweep_results import opened
from llmlab.study.trials import Status, directory_of, read_trial, run_trial
from llmlab.training.checkpoint import saved_steps

LONG = """
from tiny import config as tiny
from dataclasses import replace
from llmlab.study.space import axis, grid

def config():
    experiment = tiny()
    train = replace(experiment.train, steps=300, evaluate_every=100, checkpoint_every=20, log_every=10)
    return replace(experiment, train=train)

def sweep():
    return grid(axis("optimizer.peak_lr", 1e-2, 3e-3, 1e-3), axis("train.seed", 0, 1))
"""


SEARCH = """
from llmlab.study.space import log_uniform, sample

def sweep():
    return sample("optimizer.peak_lr", log_uniform(1e-3, 1e-1))
"""


def rates(experiment: Experiment, *values: float) -> dict[str, Experiment]:
    return {f"{value}": replace(experiment, optimizer=replace(experiment.optimizer, peak_lr=value)) for value in values}


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmlab", "sweep", "long.py", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Any, seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def sessions(directory: Path) -> list[dict[str, Any]]:
    return read_trial(directory).provenance["sessions"]


@pytest.mark.scale
def test_all_trials_come_back_by_their_labels_and_equal_ones_are_one(tiny: Experiment) -> None:
    jobs = rates(tiny, 1e-2, 1e-3)
    jobs["the same"] = replace(tiny)
    jobs["diverging"] = rates(tiny, 1e38)["1e+38"]
    seen: list[work.Progress] = []
    trials = work.execute(jobs, folder=Path("studies/s"), root=Path("trials"), progress=seen.append)
    assert {name: trial.status for name, trial in trials.items()} == {
        "0.01": Status.FINISHED,
        "0.001": Status.FINISHED,
        "the same": Status.FINISHED,
        "diverging": Status.DIVERGED,
    }
    assert trials["the same"].directory == trials["0.01"].directory
    assert seen[0].done == 0
    assert seen[-1].done == len(seen[-1].jobs) == 3
    assert [job.name for job in seen[-1].jobs] == ["0.01", "0.001", "diverging"]
    before = {name: trial.provenance for name, trial in trials.items()}
    # Again: nothing is run; with one more: only that; with a directory gone: only that.
    again = work.execute(jobs, folder=Path("studies/s"), root=Path("trials"))
    assert {name: trial.provenance for name, trial in again.items()} == before
    (trials["0.001"].directory / "summary.json").unlink()
    more = jobs | rates(tiny, 3e-3)
    after = work.execute(more, folder=Path("studies/s"), root=Path("trials"))
    assert after["0.003"].status is Status.FINISHED
    assert len(after["0.001"].provenance["sessions"]) == 2
    assert after["0.01"].provenance == before["0.01"]


def test_experiments_that_cannot_run_are_named_before_anything_does(tiny: Experiment) -> None:
    bad = replace(tiny, train=replace(tiny.train, batch_size=7, accumulation=2))
    with pytest.raises(ValueError, match="nothing was started") as caught:
        work.execute({"good": tiny, "bad": bad, "worse": bad}, folder=Path("studies/s"))
    assert "bad: " in str(caught.value)
    assert "worse: " in str(caught.value)
    assert not Path("studies").exists()


def test_an_edited_job_is_not_run_as_another(tiny: Experiment, directory: Path) -> None:
    hash_ = config_hash(tiny)
    work.save_job(directory, hash_, tiny)
    assert work.load_job(directory, hash_, None) == tiny
    path = directory / work.JOBS / f"{hash_}.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ValueError, match="it was edited"):
        work.load_job(directory, hash_, None)


def test_workers_share_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    shares = [crew.devices(index, 2, ["0", "1", "2", "3"]) for index in range(2)]
    assert shares == [{"CUDA_VISIBLE_DEVICES": "0,2"}, {"CUDA_VISIBLE_DEVICES": "1,3"}]
    crowded = [crew.devices(index, 3, ["4", "5"]) for index in range(3)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in crowded] == ["4", "5", "4"]
    assert {share["XLA_PYTHON_CLIENT_MEM_FRACTION"] for share in crowded} == {"0.450"}
    assert crew.devices(0, 1, ["0", "1"]) == crew.devices(0, 2, []) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,8")
    assert crew.devices(1, 2) == {"CUDA_VISIBLE_DEVICES": "8"}


@pytest.mark.scale
def test_the_overhead_of_a_trial_is_below_three_seconds(tiny: Experiment) -> None:
    jobs = rates(tiny, 1e-2, 2e-2, 3e-2, 4e-2)
    began = time.perf_counter()
    trials = work.execute(jobs, folder=Path("studies/s"), root=Path("trials"))
    seconds = time.perf_counter() - began
    training = sum(trial.seconds or 0 for trial in trials.values())
    assert all(trial.status is Status.FINISHED for trial in trials.values())
    assert (seconds - training) / len(jobs) < 3.0


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.scale
def test_ctrl_c_saves_and_the_same_command_goes_on(workers: int, directory: Path) -> None:
    (directory / "long.py").write_text(LONG, encoding="utf-8")
    arguments = ["--workers", str(workers), "--train.steps", "100000", "--trials", "2"]
    process = start(*arguments)
    trials = prepare(Path("long.py"), flags=["--train.steps", "100000"], trials=2).experiments
    places = [directory_of(Path("runs/trials"), experiment) for experiment in trials]
    wait_until(lambda: len([place for place in places if saved_steps(place / "checkpoints")]) >= workers)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "To go on:\n  llmlab sweep long.py --workers" in errors
    begun = [place for place in places if saved_steps(place / "checkpoints")]
    for place in begun:
        (session,) = sessions(place)
        assert session["status"] == "interrupted"
        assert session["last_step"] == saved_steps(place / "checkpoints")[-1]
    with opened(Path("studies/long-sweep")) as (_, queue):
        assert [entry.state for entry in queue.entries()] == ["waiting", "waiting"]
    again = start(*arguments)
    wait_until(lambda: all(len(sessions(place)) == 2 for place in begun))
    assert all(sessions(place)[1]["first_step"] == sessions(place)[0]["last_step"] for place in begun)
    again.send_signal(signal.SIGTERM)
    assert again.wait(timeout=120) == 42
    again.communicate()


@pytest.mark.scale
def test_two_terminals_with_the_same_search_share_its_trials(directory: Path) -> None:
    (directory / "long.py").write_text(LONG + SEARCH, encoding="utf-8")
    arguments = ["--trials", "6", "--train.steps", "20", "--train.evaluate-every", "5", "--pruner", "median"]
    first = start(*arguments, "--workers", "2")  # one that has workers of its own
    second = start(*arguments)
    told = [process.communicate(timeout=300) for process in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], told
    results = json.loads(Path("studies/long-sweep/results.json").read_text())
    assert [trial["number"] for trial in results["trials"]] == list(range(6))
    assert {trial["status"] for trial in results["trials"]} <= {"finished", "pruned"}
    hashes = [trial["hash"] for trial in results["trials"]]
    assert len(set(hashes)) == 6
    assert all(len(sessions(Path(trial["directory"]))) == 1 for trial in results["trials"])
    with opened(Path("studies/long-sweep")) as (_, queue):
        workers = {entry.attributes["worker"]["pid"] for entry in queue.entries()}
    assert len(workers) >= 2
    assert first.pid not in workers


@pytest.mark.scale
def test_workers_leave_with_the_one_who_started_them(directory: Path) -> None:
    (directory / "long.py").write_text(LONG, encoding="utf-8")
    process = start("--workers", "2", "--train.steps", "100000", "--trials", "2")
    wait_until(lambda: Path("studies/long-sweep/study.json").exists())
    pids = wait_until(lambda: running("studies/long-sweep", 2))
    wait_until(lambda: len([path for path in Path("runs/trials").glob("*/checkpoints/*") if path.name.isdigit()]) > 1)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in pids.values()))
    with opened(Path("studies/long-sweep")) as (_, queue):
        assert [entry.state for entry in queue.entries()] == ["waiting", "waiting"]


def running(folder: str, count: int, storage: str | None = None) -> dict[str, int]:
    """Process by hash of what is worked on, once there are so many."""
    with opened(Path(folder), storage) as (_, queue):
        found = {entry.hash: entry.worker["pid"] for entry in queue.entries() if entry.worker is not None}
    return found if len(found) >= count else {}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
@pytest.mark.scale
def test_of_four_workers_one_is_killed_in_a_trial_and_one_while_it_writes_and_each_point_is_done_once(
    database: str, directory: Path, request: pytest.FixtureRequest
) -> None:
    (directory / "long.py").write_text(LONG, encoding="utf-8")
    storage = None if database == "sqlite" else request.getfixturevalue("postgres")
    prepared = prepare(Path("long.py"), storage=storage)
    root, folder = Path("runs/trials"), f"studies/long-{database}"
    process = start("--workers", "4", "--out", folder, *([] if storage is None else ["--storage", storage]))
    try:
        wait_until(lambda: Path(folder, "study.json").exists())
        workers = wait_until(lambda: running(folder, 4, storage))
        in_a_trial, pid = next(iter(workers.items()))
        wait_until(lambda: saved_steps(root / in_a_trial / "checkpoints"))
        os.kill(pid, signal.SIGKILL)
        assert not (root / in_a_trial / "summary.json").exists()
        # The other one when its summary is there, so before its outcome is in the storage, or while that is written.
        writing = next(hash_ for hash_ in workers if hash_ != in_a_trial)
        while not (root / writing / "summary.json").exists():
            assert process.poll() is None
            time.sleep(0.001)
        os.kill(workers[writing], signal.SIGKILL)
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors + output
    hashes = [config_hash(experiment) for experiment in prepared.experiments]
    assert len(hashes) == 6
    for hash_, experiment in zip(hashes, prepared.experiments, strict=True):
        trial = read_trial(root / hash_, experiment)
        assert trial.status is Status.FINISHED, trial.problem
        steps = [record["step"] for record in trial.metrics if "train/loss" in record]
        assert steps == sorted(set(steps))
        assert len(trial.provenance["sessions"]) == (2 if hash_ == in_a_trial else 1)
    begun, resumed = sessions(root / in_a_trial)
    assert begun["status"] == "running"  # it could not say that it ended
    assert resumed["first_step"] > 0
    with opened(Path(folder), storage) as (_, queue):
        trials = queue.store.study.get_trials(deepcopy=False)
    complete = [trial.user_attrs["hash"] for trial in trials if trial.state.name == "COMPLETE"]
    assert sorted(complete) == sorted(hashes)
    lost = [trial.user_attrs["hash"] for trial in trials if trial.state.name == "FAIL"]
    assert in_a_trial in lost
    assert set(lost) <= {in_a_trial, writing}
    # What was killed and resumed ends with the bits of what was left alone.
    alone = run_trial(prepared.experiments[hashes.index(in_a_trial)], Path("elsewhere"), name="alone")
    assert alone.value("validation/loss") == read_trial(root / in_a_trial).value("validation/loss")
    results = json.loads(Path(folder, "results.json").read_text())
    assert re.match(r"llmlab train long\.py", results["best"]["command"])
    assert read_experiment(Path("long.py")) == prepared.original
