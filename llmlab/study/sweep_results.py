"""From a sweep's folder to results.json: what was tried, what came of it, and which axis mattered.

Read from study.json, the storage and the run directories; neither the experiment file nor a device is needed. A run
whose files are damaged is listed with what is wrong with it, and has no value.

    {"kind": "sweep", "schema": 1, "name", "metric", "direction", "unit", "command", "file", "date",
     "axes": [{"path", "kind", "log", "values", "low", "high"}],
     "trials": [{"number", "name", "hash", "directory", "status", "point", "value", "seconds", "problem",
                 "curve": {"step": [], "value": []}}],
     "importance": {path: share} or null, "best": {"number", "name", "value", "point", "command", "told"} or null,
     "problems": [], "provenance": {}}

Importance is PED-ANOVA's (Watanabe et al. 2023, 2304.10255): how differently the good quarter of the trials is
distributed along each axis from all of them; shares add up to 1. With fewer than ten trials it would say nothing.
"""

import contextlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmlab.study import storage as storages
from llmlab.study.queue import Entry, Queue
from llmlab.study.search import SampledQueue, Search
from llmlab.study.storage import Store
from llmlab.study.sweep import DEFINITION, SCHEMA
from llmlab.study.trials import Status, Trial, forgive, read_trial, unit_of
from llmlab.training.directory import write_json

RESULTS = "results.json"

_MIN_FOR_IMPORTANCE = 10
_GOOD = 0.25  # of the trials


def read_definition(folder: Path) -> dict[str, Any]:
    """The content of a sweep's study.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another kind of study.
    """
    path = folder / DEFINITION
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{folder} is no sweep: it has no {DEFINITION}; llmlab sweep FILE.py begins one (in studies/<file>-sweep, "
            "or where --out says)"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != "sweep":
        raise ValueError(f"{path} is not of a sweep")
    return content


@contextlib.contextmanager
def opened(folder: Path, storage: str | None = None) -> Iterator[tuple[dict[str, Any], Queue]]:
    """A sweep's definition and its queue.

    Args:
        folder: of the sweep.
        storage: its address; None for what the definition says.

    Raises:
        ValueError: the address holds a password, which the definition does not.
    """
    definition = read_definition(folder)
    if storage is None and "***" in (definition["storage"] or ""):
        raise ValueError(
            f"the storage {definition['storage']} needs its password, which is not kept: give --storage, or keep the "
            "password where PostgreSQL looks for it (PGPASSWORD, ~/.pgpass) and leave it out of the address"
        )
    url = storages.storage_url(folder, storage or definition["storage"])
    direction = "minimize" if definition["direction"] == "lower" else "maximize"
    store = storages.open_study(url, definition["study"], direction=direction)
    try:
        yield definition, _queue(store, definition)
    finally:
        store.close()


def _queue(store: Store, definition: dict[str, Any]) -> Queue:
    measured: dict[str, Any] = {"metric": definition["metric"], "direction": definition["direction"]}
    if definition["design"] == "sampled":
        return SampledQueue(store, Search(**definition["search"]).trials, **measured)
    return Queue(store, {hash_: {} for hash_ in definition["hashes"]}, **measured)


def retry_failed(folder: Path, storage: str | None = None) -> list[Entry]:
    """Makes failed, diverged and corrupt trials wait again; returns them. What is damaged is moved aside."""
    with opened(folder, storage) as (definition, queue):
        root = Path(definition["root"])
        retried: list[Entry] = []

        def again(entry: Entry) -> bool:
            trial = read_trial(root / entry.hash)
            bad = entry.status in (Status.FAILED, Status.DIVERGED, Status.CORRUPT)
            if bad or trial.status in (Status.FAILED, Status.DIVERGED, Status.CORRUPT):
                if entry.hash:  # a point that could not be applied has no directory
                    forgive(trial)
                retried.append(entry)
            return bool(retried) and retried[-1] is entry

        queue.enqueue(again)
    return retried


def results(folder: Path, storage: str | None = None) -> dict[str, Any]:
    """The results of a sweep, as results.json has them; also while it runs."""
    with opened(folder, storage) as (definition, queue):
        entries = queue.entries()
    root, metric = Path(definition["root"]), definition["metric"]
    runs = [read_trial(root / entry.hash) if entry.hash else None for entry in entries]
    trials = [_trial(entry, run, metric) for entry, run in zip(entries, runs, strict=True)]
    finished = [run for run in runs if run is not None and run.status is Status.FINISHED]
    return {
        "kind": "sweep",
        "schema": SCHEMA,
        **{key: definition[key] for key in ("name", "metric", "direction")},
        "unit": unit_of(metric, finished),
        **{key: definition[key] for key in ("command", "file")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "axes": definition["axes"],
        "trials": trials,
        "importance": importance(trials, definition["axes"], definition["direction"]),
        "best": _best(entries, trials, definition["direction"]),
        "problems": [
            f"trial {trial['number']} ({trial['name']}): {trial['status']}: {trial['problem']}"
            for trial in trials
            if trial["status"] in (Status.CORRUPT, Status.ABSENT) and trial["problem"]
        ],
        "provenance": provenance_of(finished),
    }


def write_results(folder: Path, storage: str | None = None) -> dict[str, Any]:
    """Writes results.json; returns its content."""
    content = results(folder, storage)
    write_json(folder / RESULTS, content)
    return content


def _trial(entry: Entry, run: Trial | None, metric: str) -> dict[str, Any]:
    status, problem = _status(entry, run)
    value = None if run is None else run.value(metric)
    if status is Status.FINISHED and value is None:
        problem = entry.problem or f"its summary has no {metric}"
    curve = [
        (record["step"], float(record[metric]))
        for record in (run.metrics if run is not None else [])
        if metric in record and math.isfinite(record[metric])
    ]
    return {
        "number": entry.number,
        "name": entry.name or f"trial {entry.number}",
        "hash": entry.hash,  # empty, as the directory is, where the point could not be applied
        "directory": "" if run is None else run.directory.as_posix(),
        "status": str(status),
        "point": dict(entry.attributes.get("point", {})),
        "value": value if status is Status.FINISHED and value is not None and math.isfinite(value) else None,
        "seconds": None if run is None else run.seconds,
        "problem": problem,
        "curve": {"step": [step for step, _ in curve], "value": [value for _, value in curve]},
    }


def _status(entry: Entry, run: Trial | None) -> tuple[Status, str | None]:
    """How a trial stands, by what the storage says of it and what its directory does: the directory has the numbers."""
    if run is None:
        return entry.status or Status.ABSENT, entry.problem
    if run.status is Status.CORRUPT:
        return Status.CORRUPT, run.problem
    if entry.state != "done":
        waits = entry.state == "waiting" and run.status is not Status.RUNNING
        return (run.status if waits else Status.RUNNING), None
    if entry.status in (Status.FINISHED, None) and run.status is not Status.FINISHED:
        return run.status, f"it was finished, and now its directory is {run.status}: the sweep's command runs it again"
    return entry.status or run.status, entry.problem or run.problem


def _best(entries: Sequence[Entry], trials: Sequence[dict[str, Any]], direction: str) -> dict[str, Any] | None:
    finished = [pair for pair in zip(entries, trials, strict=True) if pair[1]["value"] is not None]
    if not finished:
        return None
    sign = 1 if direction == "lower" else -1
    entry, trial = min(finished, key=lambda pair: (sign * pair[1]["value"], pair[1]["number"]))
    return {key: trial[key] for key in ("number", "name", "value", "point", "directory")} | {
        "command": entry.attributes.get("command"),
        "told": list(entry.attributes.get("told", [])),
    }


def importance(
    trials: Sequence[dict[str, Any]], axes: Sequence[dict[str, Any]], direction: str
) -> dict[str, float] | None:
    """The share of each axis, by path; None with too few trials, or where nothing varied.

    Args:
        trials: as in results.json.
        axes: likewise.
        direction: in which values are better.
    """
    import optuna

    finished = [trial for trial in trials if trial["value"] is not None]
    if len(finished) < _MIN_FOR_IMPORTANCE or len({trial["value"] for trial in finished}) < 2:
        return None
    spread = {axis["path"]: _distribution(axis, [trial["point"] for trial in finished]) for axis in axes}
    study = optuna.create_study(direction="minimize" if direction == "lower" else "maximize")
    for trial in finished:
        params, distributions = {}, {}
        for path, value in trial["point"].items():
            distribution = spread.get(path)
            if distribution is not None:
                number = isinstance(distribution, optuna.distributions.FloatDistribution)
                params[path] = float(value) if number else str(value)
                distributions[path] = distribution
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=trial["value"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=_GOOD)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    shares = {path: float(share) for path, share in found.items()}
    return shares if shares and all(map(math.isfinite, shares.values())) else None


def _distribution(axis: dict[str, Any], points: Sequence[dict[str, Any]]) -> Any:
    """What the axis' values in these points come from, as Optuna says it; None where they are all the same."""
    import optuna

    values = [point[axis["path"]] for point in points if axis["path"] in point]
    if len({str(value) for value in values}) < 2:
        return None
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = float(min(values)), float(max(values))
        return optuna.distributions.FloatDistribution(low, high, log=bool(axis["log"]) and low > 0)
    return optuna.distributions.CategoricalDistribution(sorted({str(value) for value in values}))


def provenance_of(finished: Sequence[Trial]) -> dict[str, Any]:
    """What the runs have in common, and which of them were made elsewhere or otherwise."""
    environments = [_environment(run.provenance) for run in finished]
    shared = environments[0] if environments else {}
    return {
        "environment": shared,
        "fingerprints": finished[0].provenance.get("fingerprints", {}) if finished else {},
        "runs": [
            {
                "hash": run.hash,
                "sessions": len(run.provenance.get("sessions", [])),
                "same_environment": environment == shared,
            }
            for run, environment in zip(finished, environments, strict=True)
        ],
    }


def _environment(provenance: dict[str, Any]) -> dict[str, Any]:
    """The environment of a run's last session, without the text of uncommitted changes, which its own file keeps."""
    environments = provenance.get("environments") or [{}]
    environment = dict(environments[-1])
    repositories = environment.get("git")
    if isinstance(repositories, dict):
        environment["git"] = {
            where: {name: value for name, value in state.items() if name != "diff"}
            for where, state in repositories.items()
            if isinstance(state, dict)
        }
    return environment
