"""The trials of a study as a queue: what waits, who works on what, and what came of it.

    waiting -> running -> complete | pruned | failed with its error
       ^          |
       +----------+      released by Ctrl-C, or taken from a worker that died

A trial of the queue carries the hash of its experiment, so it stands for one run directory. The newest trial of a hash
decides how its experiment stands: a retry, and a point that is run again because its directory was removed, is a newer
one. Everything that reads and then writes happens in `Store.exclusive`, and every step of it can be the last one of a
killed process: what it leaves is put right by whoever takes next.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmlab.study.storage import MAX_RETRIES, Store, is_dead, this_process
from llmlab.study.trials import Status, Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

REPLACES = "replaces"
"""Attribute of a trial: the numbers of those that are done, and that it stands for from now on."""

Direction = Literal["lower", "higher"]
State = Literal["waiting", "running", "done"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that this process works on."""

    number: int
    """In the study."""
    id: int
    """In the storage."""
    name: str
    """For people."""
    hash: str
    """Of the experiment; empty while a sampler has not drawn it."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """How one experiment of a study stands, as far as the storage knows."""

    number: int
    hash: str
    name: str
    state: State
    status: Status | None = None
    """Outcome of what is done."""
    problem: str | None = None
    worker: dict[str, Any] | None = None
    """Process that works on it."""
    value: float | None = None
    attributes: Mapping[str, Any]
    """Everything that the storage keeps about it."""


Job = Mapping[str, Any]
"""What is kept with an experiment: its `name`, its number of `steps`, and whatever else a study wants to find again."""


class Queue:
    """The queue of a study whose experiments are known beforehand.

    Args:
        store: where it is kept.
        jobs: by the hash of their experiment, those that this process knows; trials of others are left alone.
        metric: of the summary, that becomes the trial's value.
        direction: in which the metric is better.
    """

    def __init__(self, store: Store, jobs: Mapping[str, Job], *, metric: str, direction: Direction) -> None:
        self.store = store
        self.jobs = dict(jobs)
        self.metric = metric
        self.worst = math.inf if direction == "lower" else -math.inf

    # --- looking -----------------------------------------------------------------------------------------------------

    def newest(self) -> dict[str, "FrozenTrial"]:
        """The newest trial of every hash, in the order in which the hashes came first."""
        found: dict[str, FrozenTrial] = {}
        for trial in self.store.study.get_trials(deepcopy=False):
            if "hash" in trial.user_attrs:
                found[trial.user_attrs["hash"]] = trial
        return found

    def entries(self) -> list[Entry]:
        """How the known experiments stand; those that nobody enqueued are absent."""
        newest = self.newest()
        return [entry(newest[hash_]) for hash_ in self.jobs if hash_ in newest]

    def settled(self) -> bool:
        """Whether every known experiment is done, for better or worse."""
        entries = self.entries()
        return len(entries) == len(self.jobs) and all(entry.state == "done" for entry in entries)

    # --- changing ----------------------------------------------------------------------------------------------------

    def enqueue(self, again: Callable[[Entry], bool] = lambda entry: False) -> None:
        """Enqueues each known experiment that was not, once; and those that are done, where `again` says so."""
        with self.store.exclusive():
            self._take_from_the_dead()
            known = {entry.hash: entry for entry in self.entries()}
            for hash_, job in self.jobs.items():
                if hash_ not in known:
                    self._add({"hash": hash_, **job})
            for entry in known.values():
                if entry.state == "done" and again(entry):
                    self._run_again(entry.number)

    def take(self, wanted: Callable[[str], bool] | None = None) -> Claim | None:
        """The next experiment, which is this process's from now on; None while there is nothing to take. With `wanted`
        the next whose hash it accepts."""
        with self.store.exclusive():
            self._take_from_the_dead()
            waiting = [trial for trial in self._live() if trial.state.name == "WAITING"]
            # What was begun first: its checkpoint is there, and others may wait for its lock.
            for trial in sorted(waiting, key=lambda trial: "failed_trial" not in trial.system_attrs):
                if wanted is None or wanted(trial.user_attrs.get("hash", "")):
                    return self.begin(trial)
            return self._invent() if wanted is None else None

    def begin(self, trial: "FrozenTrial") -> Claim:
        """Makes a waiting trial this process's. Only in `exclusive`."""
        from optuna.trial import TrialState

        id_ = trial._trial_id
        # In this order: there is no moment at which it runs and nobody would notice that its worker died.
        self.store.rdb.record_heartbeat(id_)
        self.store.rdb.set_trial_user_attr(id_, "worker", this_process())
        self.store.rdb.set_trial_state_values(id_, TrialState.RUNNING)
        attributes = trial.user_attrs
        return Claim(
            number=trial.number,
            id=id_,
            name=attributes.get("name", ""),
            hash=attributes.get("hash", ""),
        )

    def finish(self, claim: Claim, trial: Trial) -> None:
        """Records what came of a claim."""
        value = trial.value(self.metric)
        if trial.status is Status.FINISHED and (value is None or math.isnan(value)):
            problem = f"its summary has no {self.metric}; it has {', '.join(_numbers(trial.summary))}"
        else:
            problem = trial.problem
        self.tell(claim, trial.status, value=value, problem=problem, seconds=trial.seconds)

    def tell(
        self,
        claim: Claim,
        status: Status,
        *,
        value: float | None = None,
        problem: str | None = None,
        seconds: float | None = None,
    ) -> None:
        """Records the outcome of a claim. Where it was taken from this process in the meantime, nothing changes."""
        import optuna
        from optuna.trial import TrialState

        attributes = {"status": str(status), "problem": problem, "seconds": seconds}
        state = {Status.PRUNED: TrialState.PRUNED, Status.FAILED: TrialState.FAIL, Status.CORRUPT: TrialState.FAIL}
        complete = status not in state
        if complete and (value is None or math.isnan(value)):
            value = self.worst  # diverged: a sampler must learn that this is bad
        try:
            for name, content in attributes.items():
                self.store.rdb.set_trial_user_attr(claim.id, name, content)
            self.store.study.tell(
                claim.number,
                value if complete else None,
                state=None if complete else state[status],
                skip_if_finished=True,
            )
        except optuna.exceptions.UpdateFinishedTrialError:
            _log.warning("trial %d was taken from this worker; its successor finds the finished run", claim.number)

    def release(self, claim: Claim) -> None:
        """Gives a claim back: it waits for the next worker, who goes on at its checkpoint."""
        import optuna
        from optuna.trial import TrialState

        with self.store.exclusive(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.store.rdb.set_trial_user_attr(claim.id, "worker", None)
            self.store.rdb.set_trial_state_values(claim.id, TrialState.WAITING)

    @contextlib.contextmanager
    def alive(self, claim: Claim) -> Iterator[None]:
        """Inside, the others see that this process works on the claim."""
        stop = threading.Event()
        every = self.store.rdb.get_heartbeat_interval() or 10

        def beat() -> None:
            while not stop.wait(every):
                try:
                    self.store.rdb.record_heartbeat(claim.id)
                except Exception as error:  # a database that is away for a while: the next beat may reach it
                    _log.warning("no heartbeat for trial %d: %s", claim.number, error)
            self.store.rdb.remove_session()

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(timeout=5)

    # --- within the lock ---------------------------------------------------------------------------------------------

    def _live(self) -> "list[FrozenTrial]":
        """The trials that decide how the study's experiments stand."""
        return [trial for hash_, trial in self.newest().items() if hash_ in self.jobs]

    def _invent(self) -> Claim | None:
        """One more trial, where a study makes them as it goes."""
        return None

    def _add(self, attributes: dict[str, Any]) -> None:
        import optuna
        from optuna.trial import TrialState

        self.store.study.add_trial(optuna.create_trial(state=TrialState.WAITING, user_attrs=attributes))

    def _run_again(self, number: int) -> None:
        """Enqueues a successor of a trial that is done."""
        import optuna
        from optuna.trial import TrialState

        trial = next(trial for trial in self.store.study.get_trials() if trial.number == number)
        outcome = ("status", "problem", "seconds", "worker")
        self.store.study.add_trial(
            optuna.create_trial(
                state=TrialState.WAITING,
                params=trial.params,
                distributions=trial.distributions,
                user_attrs={name: value for name, value in trial.user_attrs.items() if name not in outcome},
                system_attrs={REPLACES: [*trial.system_attrs.get(REPLACES, []), number]},
            )
        )

    def _take_from_the_dead(self) -> None:
        from optuna.trial import TrialState

        self.store.fail_stale()
        for trial in self.store.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_dead(trial.user_attrs.get("worker")):
                self.store.rdb.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        # Failed without an outcome: its worker died, and it was not retried, or the one who was about to died as well.
        retry = self.store.rdb.get_heartbeat_stale_trial_callback()
        assert retry is not None  # given by open_study
        for trial in self.orphans():
            retry(self.store.study, trial)

    def orphans(self) -> list["FrozenTrial"]:
        """Trials whose worker died and that were neither retried yet, nor too often already."""
        trials = self.store.study.get_trials(deepcopy=True)
        retried = replaced(trials)
        return [
            trial
            for trial in trials
            if _is_lost(trial)
            and trial.number not in retried
            and len(trial.system_attrs.get("retry_history", [])) < MAX_RETRIES
        ]


def replaced(trials: Iterable["FrozenTrial"]) -> set[int]:
    """Numbers of the trials that have a successor: retried by Optuna, or run again because somebody asked."""
    return {
        number for trial in trials for key in ("retry_history", REPLACES) for number in trial.system_attrs.get(key, [])
    }


def entry(trial: "FrozenTrial") -> Entry:
    """How a trial of a storage stands."""
    attributes = trial.user_attrs
    status = Status(attributes["status"]) if "status" in attributes else None
    problem = attributes.get("problem")
    state: State = "done"
    if trial.state.name in ("WAITING", "RUNNING"):
        state = "waiting" if trial.state.name == "WAITING" else "running"
    if _is_lost(trial):
        lost = len(trial.system_attrs.get("retry_history", []))
        if lost < MAX_RETRIES:
            state = "waiting"  # the next worker that takes something enqueues it
        else:
            status, problem = Status.FAILED, f"its worker died, {lost + 1} times in a row"
    return Entry(
        number=trial.number,
        hash=attributes.get("hash", ""),
        name=attributes.get("name", ""),
        state=state,
        status=status if state == "done" else None,
        problem=problem,
        worker=attributes.get("worker") if state == "running" else None,
        value=trial.value if trial.state.name == "COMPLETE" and math.isfinite(trial.value or 0.0) else None,
        attributes=attributes,
    )


def _is_lost(trial: "FrozenTrial") -> bool:
    """Whether a trial ended with its worker, who may have been about to record another outcome than a failure."""
    return trial.state.name == "FAIL" and trial.user_attrs.get("status") not in (Status.FAILED, Status.CORRUPT)


def _numbers(summary: Mapping[str, Any]) -> list[str]:
    return [name for name, value in summary.items() if isinstance(value, int | float) and name != "step"]
