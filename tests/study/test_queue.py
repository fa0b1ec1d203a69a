"""Every point of a queue is done exactly once, whoever dies: on SQLite and on a PostgreSQL server of the test's own."""

import collections
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from llmlab.study import queue as queues
from llmlab.study.queue import Entry, Queue
from llmlab.study.storage import Store, open_study, shown, storage_url
from llmlab.study.trials import Status, Trial

JOBS = {f"{number:08x}": f"job {number}" for number in range(24)}
WORKERS = Path(__file__).with_name("workers.py")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return storage_url(tmp_path, None) if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.fixture
def make_queue(url: str, tmp_path: Path) -> Iterator[Callable[..., Queue]]:
    """Function (jobs, ...) -> queue on the database, each time with connections of its own."""
    opened: list[Store] = []

    def make(jobs: dict[str, str] = JOBS, **options: Any) -> Queue:
        opened.append(open_study(url, tmp_path.name, **options))
        return Queue(opened[-1], named(jobs), metric="validation/loss", direction="lower")

    yield make
    for store in opened:
        store.close()


def named(jobs: dict[str, str]) -> dict[str, dict[str, Any]]:
    return {hash_: {"name": name, "steps": 1} for hash_, name in jobs.items()}


def by_hash(queue: Queue) -> dict[str, Entry]:
    return {entry.hash: entry for entry in queue.entries()}


def finished(hash_: str, loss: float = 1.0) -> Trial:
    return Trial(directory=Path(hash_), hash=hash_, status=Status.FINISHED, summary={"validation/loss": loss})


def states(queue: Queue) -> collections.Counter[str]:
    return collections.Counter(trial.state.name for trial in queue.store.study.get_trials(deepcopy=False))


@pytest.mark.scale
def test_each_experiment_is_enqueued_once_and_taken_once(make_queue: Callable[..., Queue]) -> None:
    first, second = make_queue(), make_queue()
    first.enqueue()
    second.enqueue()
    assert states(first) == {"WAITING": len(JOBS)}
    taken = []
    while (claim := (first if len(taken) % 2 else second).take()) is not None:
        taken.append(claim.hash)
    assert taken == list(JOBS)
    assert not first.settled()


def test_outcomes_are_recorded_with_their_errors(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue({"a": "good", "b": "bad", "c": "lost", "d": "broken", "e": "given up"})
    queue.enqueue()
    outcomes = {"b": Status.FAILED, "c": Status.DIVERGED, "d": Status.CORRUPT, "e": Status.PRUNED}
    while (claim := queue.take()) is not None:
        status = outcomes.get(claim.hash)
        trial = Trial(directory=Path("x"), hash=claim.hash, status=status, problem="why") if status else finished("a")
        queue.finish(claim, trial)
    assert queue.settled()
    entries = by_hash(queue)
    assert {hash_: entry.status for hash_, entry in entries.items()} == {"a": Status.FINISHED} | outcomes
    assert [entries[hash_].problem for hash_ in "abcde"] == [None, "why", "why", "why", "why"]
    assert [entries[hash_].value for hash_ in "abcde"] == [1.0, None, None, None, None]
    # A sampler learns from what diverged, and not from what an error of the program stopped.
    assert [trial.state.name for trial in queue.store.study.trials] == [
        "COMPLETE",
        "FAIL",
        "COMPLETE",
        "FAIL",
        "PRUNED",
    ]


def test_what_ctrl_c_gives_back_is_taken_again_under_its_number(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue({"a": "a"})
    queue.enqueue()
    claim = queue.take()
    assert claim is not None
    assert queue.take() is None
    queue.release(claim)
    again = make_queue({"a": "a"}).take()
    assert again is not None
    assert again.number == claim.number
    queue.finish(again, finished("a"))
    assert states(queue) == {"COMPLETE": 1}


@pytest.mark.scale
def test_a_worker_without_a_sign_of_life_loses_its_trial_and_cannot_record_it_any_more(
    make_queue: Callable[..., Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = make_queue({"a": "a"}, heartbeat=1, grace=1)
    queue.enqueue()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(queues, "this_process", lambda: {"machine": "another", "pid": 1})
        claim = queue.take()
    assert claim is not None
    with queue.alive(claim):
        time.sleep(2.5)
        assert queue.take() is None  # it beats
    time.sleep(2.5)
    retried = queue.take()
    assert retried is not None
    assert retried.number != claim.number
    queue.finish(claim, finished("a", 5.0))  # it was only slow
    queue.finish(retried, finished("a", 1.0))
    assert by_hash(queue)["a"].value == 1.0
    assert states(queue) == {"FAIL": 1, "COMPLETE": 1}


@pytest.mark.parametrize("recorded", [False, True], ids=["training", "recording"])
def test_the_trial_of_a_killed_process_of_this_machine_is_retried_at_once(
    recorded: bool, make_queue: Callable[..., Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    queue = make_queue({"a": "a", "b": "b"})
    queue.enqueue()
    with monkeypatch.context() as dead:
        dead.setattr(queues, "this_process", lambda: queues_this_process() | {"pid": gone.pid})
        claim = queue.take()
    assert claim is not None
    if recorded:  # the last thing it did was half of recording its outcome
        queue.store.rdb.set_trial_user_attr(claim.id, "status", "finished")
    retried = queue.take()
    assert retried is not None
    assert retried.hash == claim.hash == "a"  # before what has not begun


queues_this_process = queues.this_process


def test_a_retry_that_was_cut_short_between_its_two_halves_is_made_up_for(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue({"a": "a"})
    queue.enqueue()
    claim = queue.take()
    assert claim is not None
    # Whoever failed the stale trial was killed before it enqueued the next.
    queue.store.rdb.set_trial_state_values(claim.id, TrialState.FAIL)
    assert not queue.settled()
    retried = queue.take()
    assert retried is not None
    assert queue.take() is None
    assert states(queue) == {"FAIL": 1, "RUNNING": 1}


def test_an_experiment_that_kills_its_workers_fails_in_the_end(
    make_queue: Callable[..., Queue], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    monkeypatch.setattr(queues, "this_process", lambda: queues_this_process() | {"pid": gone.pid})
    queue = make_queue({"a": "a"})
    queue.enqueue()
    takes = 0
    while queue.take() is not None:
        takes += 1
    assert takes == queues.MAX_RETRIES + 1
    assert queue.settled()
    entry = by_hash(queue)["a"]
    assert entry.status is Status.FAILED
    assert entry.problem == f"its worker died, {takes} times in a row"
    queue.enqueue(again=lambda entry: True)  # llmlab ... retry-failed
    assert queue.take() is not None


def test_a_study_keeps_its_direction(make_queue: Callable[..., Queue]) -> None:
    make_queue({"a": "a"})
    with pytest.raises(ValueError, match="was begun to minimize, and now is to maximize"):
        make_queue({"a": "a"}, direction="maximize")


def test_trials_that_nobody_enqueued_are_left_alone(make_queue: Callable[..., Queue]) -> None:
    queue = make_queue({"a": "a"})
    queue.store.study.enqueue_trial({"x": 1.0})
    make_queue({"b": "of another design"}).enqueue()
    queue.enqueue()
    claim = queue.take()
    assert claim is not None
    assert claim.hash == "a"
    assert queue.take() is None
    queue.finish(claim, finished("a"))
    assert queue.settled()


@pytest.mark.scale
def test_workers_in_a_hurry_never_take_the_same_point(url: str, tmp_path: Path) -> None:
    jobs = {f"{number:08x}": f"job {number}" for number in range(60)}
    order = {"url": url, "study": tmp_path.name, "folder": str(tmp_path), "jobs": named(jobs), "seconds": 0.0}
    workers = [subprocess.Popen([sys.executable, str(WORKERS), json.dumps(order)]) for _ in range(4)]
    assert [worker.wait(timeout=180) for worker in workers] == [0] * 4
    begun = [line for path in (tmp_path / "begun").iterdir() for line in path.read_text().split()]
    assert sorted(begun) == sorted(jobs)
    store = open_study(url, tmp_path.name)
    try:
        assert len(store.study.trials) == len(jobs)  # nor was any enqueued twice
    finally:
        store.close()


@pytest.mark.scale
def test_four_workers_of_which_two_are_killed_do_every_point_once(url: str, tmp_path: Path) -> None:
    order = {"url": url, "study": tmp_path.name, "folder": str(tmp_path), "jobs": named(JOBS), "seconds": 0.5}
    command = [sys.executable, str(WORKERS), json.dumps(order)]
    workers = [subprocess.Popen(command) for _ in range(4)]
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    try:
        deadline = time.monotonic() + 120
        while len(list(begun.glob("*"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        victims = workers[:2]
        victims[0].send_signal(signal.SIGKILL)  # mid-trial: half a second of a cycle of little more
        time.sleep(0.3 + random.random())
        victims[1].send_signal(signal.SIGKILL)  # anywhere, also mid-write
        for worker in workers:
            worker.wait(timeout=180)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [worker.returncode for worker in workers] == [-signal.SIGKILL] * 2 + [0, 0]
    done = collections.Counter(line for path in ended.iterdir() for line in path.read_text().split())
    by_the_living = collections.Counter(
        line
        for path in ended.iterdir()
        if int(path.name) not in {victim.pid for victim in victims}
        for line in path.read_text().split()
    )
    assert done.keys() == JOBS.keys()
    assert max(by_the_living.values()) == 1
    assert sum(done.values()) <= len(JOBS) + 1  # the second victim may have ended a point without recording it
    store = open_study(url, tmp_path.name)
    try:
        complete = [trial.user_attrs["hash"] for trial in store.study.trials if trial.state.name == "COMPLETE"]
        assert sorted(complete) == sorted(JOBS)
        lost = [trial for trial in store.study.trials if trial.state.name == "FAIL"]
        assert len(lost) <= 2
        assert len(store.study.trials) == len(JOBS) + len(lost)
    finally:
        store.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("mysql://a/b", "sqlite is, for one machine, and postgresql for many"),
        ("sqlite://", "in memory"),
        ("somewhere", "no database address"),
        ("postgresql+pg8000://u@h/d", "postgresql\\+psycopg"),
    ],
)
def test_addresses_that_cannot_work_are_refused(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        storage_url(tmp_path, address)


def test_passwords_are_not_shown(tmp_path: Path) -> None:
    address = "postgresql+psycopg://user:secret@127.0.0.1:1/database"
    assert "secret" not in shown(address)
    pytest.importorskip("psycopg", reason="the PostgreSQL driver is not installed")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1") as caught:
        open_study(address, "study")
    assert "secret" not in str(caught.value)
