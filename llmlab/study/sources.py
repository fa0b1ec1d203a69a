"""Where the runs of a study come from: code, packages and devices, without what belongs to one machine alone.

Each run directory has the whole story (provenance.json: the uncommitted changes, the config, the experiment file). A
study's results are published, so they keep what identifies it: commits, hashes, versions, kinds of devices. Absolute
paths are cut to their last part.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from llmlab.config import defining_file
from llmlab.experiment import Experiment
from llmlab.study.outcomes import Outcome

_ABSOLUTE = re.compile(r"(?<![\w./:])/(?:[^\s/:'\"=,]+/)+")
# Of an environment, what can change the numbers from one run to the next.
_COMPARED = ("git", "packages", "python", "devices", "jax", "variables")
_NAMES = {"git": "code (git)", "python": "Python", "jax": "options of jax", "variables": "environment variables"}


def provenance(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the runs share, and of each run which environments it ran in."""
    environments: list[dict[str, Any]] = []
    runs = []
    for outcome in outcomes:
        content = outcome.trial.provenance
        places = []
        for found in content.get("environments", []):
            environment = _published(found)
            if environment not in environments:
                environments.append(environment)
            places.append(environments.index(environment))
        sessions = content.get("sessions", [])
        runs.append(
            {
                "arm": outcome.job.arm,
                "seed": outcome.job.seed,
                "hash": outcome.trial.hash,
                "environments": places,
                "sessions": len(sessions),
                "started": sessions[0].get("started") if sessions else None,
                "finished": sessions[-1].get("finished") if sessions else None,
                "fingerprints": content.get("fingerprints", {}),
            }
        )
    files = [outcome.trial.provenance.get("experiment_file") for outcome in outcomes]
    file = next((file for file in files if file), None)
    return {
        "experiment_file": None if file is None else {"path": _cut(file["path"]), "sha256": file["sha256"]},
        "environments": environments,
        "runs": runs,
    }


def disagreements(outcomes: Sequence[Outcome]) -> list[str]:
    """What was not the same for all runs, though it may have moved their numbers."""
    seen: dict[str, list[Any]] = {name: [] for name in _COMPARED}
    for outcome in outcomes:
        for found in outcome.trial.provenance.get("environments", []):
            environment = _published(found)
            for name, values in seen.items():
                if environment.get(name) not in values:
                    values.append(environment.get(name))
    names = [name for name, values in seen.items() if len(values) > 1]
    if not names:
        return []
    what = ", ".join(_NAMES.get(name, name) for name in names)
    return [f"not all runs were made with the same {what}: the results' provenance has which with which"]


def outdated(runs: Iterable[tuple[str, Experiment, Path]]) -> list[str]:
    """Runs with a class of the experiment file's own that were made with another text of that file.

    A config names a class and not its code, so that such a run is found by its hash all the same. Runs are given as
    (label, experiment, directory).
    """
    labels = []
    for label, experiment, directory in runs:
        file, copy = defining_file(experiment), directory / "experiment.py"
        if file is not None and copy.exists() and file.exists() and copy.read_bytes() != file.read_bytes():
            labels.append(label)
    if not labels:
        return []
    which = ", ".join(labels[:6]) + (" and others" if len(labels) > 6 else "")
    return [
        f"{which} used a class that the experiment file defines, and that file was another then: if what changed "
        "matters, remove their directories, and they are run again"
    ]


def code(content: Mapping[str, Any]) -> str | None:
    """The commit that a run's last session was made with, and whether it had changes; None where nobody knows."""
    sessions, environments = content.get("sessions", []), content.get("environments", [])
    if not sessions or not environments:
        return None
    git = environments[sessions[-1].get("environment", -1)].get("git", {})
    own = git.get("llmlab", {})
    state = git.get("experiment", {}) if own.get("same_as") == "experiment" else own
    commit = state.get("commit")
    return None if commit is None else commit[:12] + (" with changes" if state.get("dirty") else "")


def relative(directory: Path) -> str:
    """A directory as seen from here, where it is below; else as it was given."""
    try:
        return directory.absolute().relative_to(Path.cwd()).as_posix()
    except ValueError:
        return directory.as_posix()


def _published(environment: Mapping[str, Any]) -> dict[str, Any]:
    """An environment with the diff as its hash, untracked files as their number, and paths cut."""
    content = dict(environment)
    content["git"] = {where: _without_text(state) for where, state in content.get("git", {}).items()}
    return _without_paths(content)


def _without_text(state: Mapping[str, Any]) -> dict[str, Any]:
    diff = state.get("diff")
    kept = {name: value for name, value in state.items() if name not in ("diff", "untracked", "diff_truncated")}
    return kept | ({"diff_sha256": hashlib.sha256(diff.encode()).hexdigest()} if diff else {})


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _ABSOLUTE.sub(".../", value) if isinstance(value, str) else value


def _cut(path: str) -> str:
    return PurePath(path).name if PurePath(path).is_absolute() else path
