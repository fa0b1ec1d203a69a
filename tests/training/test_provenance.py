import hashlib
import json
import os
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from llmlab.training import provenance as module
from llmlab.training.provenance import Provenance, environment_variables, git_state, read_provenance


def git(directory: Path, *arguments: str) -> str:
    identity = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    return subprocess.run(
        ["git", "-C", str(directory), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | identity | plain,
    ).stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one committed experiment, in a directory whose name needs quoting."""
    root = tmp_path / "an experiment's repository"
    root.mkdir()
    git(root, "init", "-q", "-b", "trunk")
    (root / "claim.py").write_text("x = 1\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def begin(directory: Path, experiment_file: Path | None = None, **other: Any) -> Provenance:
    return Provenance.begin(
        directory, name="claim", config={"steps": 3}, config_hash="abc", experiment_file=experiment_file, **other
    )


def test_clean_repository_is_its_commit(repository: Path) -> None:
    state = git_state(repository)
    assert state["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert (state["branch"], state["dirty"], state["diff"], state["untracked"]) == ("trunk", False, "", [])


def test_commit_and_stored_diff_give_the_code_back(repository: Path, tmp_path: Path) -> None:
    (repository / "claim.py").write_text("x = 2\nname = 'ä'\n")
    (repository / "added.py").write_text("y = 1\n")
    git(repository, "add", "added.py")
    state = git_state(repository)
    assert state["dirty"]
    git(tmp_path, "clone", "-q", str(repository), "again")
    git(tmp_path / "again", "checkout", "-q", state["commit"])
    (tmp_path / "diff").write_text(state["diff"])
    git(tmp_path / "again", "apply", str(tmp_path / "diff"))
    for name in ("claim.py", "added.py"):
        assert (tmp_path / "again" / name).read_bytes() == (repository / name).read_bytes()


def test_a_diff_says_the_same_whatever_the_users_settings(repository: Path) -> None:
    (repository / "claim.py").write_text("x = 2\n")
    plain = git_state(repository)["diff"]
    git(repository, "config", "color.ui", "always")
    git(repository, "config", "diff.noprefix", "true")
    git(repository, "config", "diff.external", "false")
    assert git_state(repository)["diff"] == plain != ""


def test_untracked_files_are_named_and_not_copied(repository: Path) -> None:
    (repository / ".env").write_text("PASSWORD=hunter2\n")
    (repository / "runs").mkdir()
    for name in ("a", "b"):
        (repository / "runs" / name).touch()
    state = git_state(repository)
    assert state["untracked"] == [".env", "runs/"]
    assert state["dirty"]
    assert "hunter2" not in json.dumps(state)


def test_a_long_diff_is_cut_to_whole_lines(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "claim.py").write_text("".join(f"x = {i}\n" for i in range(100)))
    whole = git_state(repository)["diff"]
    monkeypatch.setattr(module, "MAX_DIFF_BYTES", 500)
    state = git_state(repository)
    assert state["diff_truncated"]
    assert whole.startswith(state["diff"])
    assert state["diff"].endswith("\n")
    assert 480 < len(state["diff"]) <= 500


def test_a_repository_without_a_commit_stores_everything_staged(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "claim.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    state = git_state(tmp_path)
    assert state["commit"] is None
    assert "+x = 1" in state["diff"]


def test_outside_a_repository_and_without_git_the_reason_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in git_state(tmp_path)["absent"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "git" in git_state(tmp_path)["absent"]


def test_a_session_records_what_the_issue_of_reproduction_needs(repository: Path, tmp_path: Path) -> None:
    experiment = repository / "claim.py"
    provenance = begin(tmp_path / "run", experiment, command=["llmlab", "train", "claim.py"])
    provenance.fingerprints(data="d1")
    provenance.fingerprints(tokenizer="t1")
    provenance.finish("finished", last_step=3)
    content = read_provenance(tmp_path / "run")
    (environment,), (session,) = content["environments"], content["sessions"]
    assert (content["config"], content["config_hash"]) == ({"steps": 3}, "abc")
    assert content["fingerprints"] == {"data": "d1", "tokenizer": "t1"}
    assert content["experiment_file"]["sha256"] == hashlib.sha256(experiment.read_bytes()).hexdigest()
    assert content["experiment_file"]["text"] == "x = 1\n"
    assert environment["git"]["experiment"]["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert environment["packages"]["jax"] == version("jax")
    assert environment["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert environment["variables"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert environment["jax"]["jax_threefry_partitionable"] is True
    assert session["command"] == ["llmlab", "train", "claim.py"]
    assert session["status"] == "finished"
    assert (session["first_step"], session["last_step"]) == (0, 3)
    assert session["started"] <= session["finished"]
    assert session["seconds"] >= 0


def test_sessions_of_a_run_share_an_environment_until_something_changes(repository: Path, tmp_path: Path) -> None:
    experiment = repository / "claim.py"
    begin(tmp_path / "run", experiment)  # killed: never finished
    begin(tmp_path / "run", experiment, first_step=5).finish("interrupted", last_step=7)
    experiment.write_text("x = 2\n")
    begin(tmp_path / "run", experiment, first_step=7).finish("finished", last_step=9)
    content = read_provenance(tmp_path / "run")
    assert [s["environment"] for s in content["sessions"]] == [0, 0, 1]
    assert [s["status"] for s in content["sessions"]] == ["running", "interrupted", "finished"]
    assert [s["seconds"] is None for s in content["sessions"]] == [True, False, False]
    assert "+x = 2" in content["environments"][1]["git"]["experiment"]["diff"]


def test_secrets_of_the_environment_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setenv("LLMLAB_API_KEY", "hunter2")
    monkeypatch.setenv("LLMLAB_CACHE", "elsewhere")
    recorded = environment_variables()
    assert "hunter2" not in str(recorded)
    assert "AWS_SECRET_ACCESS_KEY" not in recorded
    assert recorded["LLMLAB_CACHE"] == "elsewhere"


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('{"sessions": [')
    with pytest.raises(ValueError, match=r"provenance\.json is damaged"):
        read_provenance(tmp_path)


def test_git_is_installed_where_these_tests_run() -> None:
    assert shutil.which("git"), "the tests above would pass for the wrong reason"
