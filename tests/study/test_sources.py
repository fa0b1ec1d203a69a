"""Provenance of a study: what identifies the code and the machine's kind, and nothing that is one machine's own."""

from pathlib import Path
from typing import Any

import pytest

from llmlab.config import config_hash, load_experiment_file, save
from llmlab.experiment import Experiment
from llmlab.nn.norms import RMSNorm
from llmlab.study.changes import swap
from llmlab.study.outcomes import Job, Outcome
from llmlab.study.sources import code, disagreements, outdated, provenance, relative
from llmlab.study.trials import Status
from tests.study.fakes import trial

# Put together here: the tests look for such paths in the project's own files.
CACHE = "/" + "/".join(("home", "someone", "cache", "jax"))


def environment(commit: str = "0123456789abcdef", **changes: Any) -> dict[str, Any]:
    state = {"commit": commit, "branch": "main", "dirty": True, "diff": "+secret", "untracked": ["notes.txt"]}
    content = {"git": {"experiment": state, "llmlab": {"same_as": "experiment"}}, "packages": {"jax": "0.10.2"}}
    return content | {"variables": {"JAX_COMPILATION_CACHE_DIR": CACHE}, "python": "3.11.7"} | changes


def outcome(experiment: Experiment, seed: int, *environments: dict[str, Any]) -> Outcome:
    sessions = [{"environment": i, "started": "t0", "finished": "t1"} for i in range(len(environments))]
    content = {"environments": list(environments), "sessions": sessions, "fingerprints": {"data": "d"}}
    content["experiment_file"] = {"path": CACHE + "/norm.py", "sha256": "5", "text": "..."}
    job = Job(arm="baseline", seed=seed, experiment=experiment)
    return Outcome(job=job, trial=trial(experiment, Status.FINISHED, provenance=content), value=1.0)


def test_environments_are_kept_once_and_runs_point_at_theirs(tiny: Experiment) -> None:
    first, second = environment(), environment("fedcba9876543210")
    outcomes = [outcome(tiny, 0, first), outcome(tiny, 1, first, second), outcome(tiny, 2, second)]
    found = provenance(outcomes)
    assert [run["environments"] for run in found["runs"]] == [[0], [0, 1], [1]]
    assert [run["sessions"] for run in found["runs"]] == [1, 2, 1]
    assert len(found["environments"]) == 2
    assert found["experiment_file"] == {"path": "norm.py", "sha256": "5"}
    assert disagreements(outcomes) == [
        "not all runs were made with the same code (git): the results' provenance has which with which"
    ]
    assert disagreements(outcomes[:1]) == []


def test_changes_and_paths_of_the_machine_stay_behind(tiny: Experiment) -> None:
    text = repr(provenance([outcome(tiny, 0, environment())]))
    assert "someone" not in text
    assert "secret" not in text
    assert "notes.txt" not in text
    assert ".../jax" in text
    assert "diff_sha256" in text


@pytest.mark.parametrize(
    ("git", "said"),
    [
        ({"experiment": {"commit": "a" * 40, "dirty": False}, "llmlab": {"same_as": "experiment"}}, "a" * 12),
        ({"experiment": {"absent": "none"}, "llmlab": {"commit": "b" * 40, "dirty": True}}, "b" * 12 + " with changes"),
        ({"experiment": {"absent": "none"}, "llmlab": {"absent": "installed as a package"}}, None),
    ],
)
def test_the_code_of_a_run_is_that_of_its_last_session(git: dict[str, Any], said: str | None) -> None:
    assert code({"environments": [{}, {"git": git}], "sessions": [{"environment": 0}, {"environment": 1}]}) == said
    assert code({}) is None


def test_directories_below_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert relative(tmp_path / "runs" / "trials" / "a") == "runs/trials/a"
    assert relative(Path("runs/trials/a")) == "runs/trials/a"


OWN = """
from dataclasses import dataclass
from llmlab.nn.norms import LayerNorm

@dataclass(frozen=True, kw_only=True)
class Mine(LayerNorm):
    pass  # VERSION

def config():
    return None
"""


def test_a_run_of_a_class_whose_code_has_changed_is_told(tiny: Experiment, tmp_path: Path) -> None:
    """The config, and so the hash, is the same: only the file tells."""

    def made(version: str) -> Experiment:
        (tmp_path / "own.py").write_text(OWN.replace("VERSION", version), encoding="utf-8")
        return swap(RMSNorm, load_experiment_file(tmp_path / "own.py").Mine())(tiny)

    before, directory = made("1"), tmp_path / "run"
    directory.mkdir()
    save(before, directory)
    assert outdated([("mine/seed=0", before, directory), ("baseline/seed=0", tiny, directory)]) == []
    after = made("2")
    assert config_hash(after) == config_hash(before)
    (said,) = outdated([("mine/seed=0", after, directory), ("baseline/seed=0", tiny, directory)])
    assert said.startswith("mine/seed=0 used a class that the experiment file defines")
