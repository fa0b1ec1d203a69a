"""Files of a run are replaced whole or not at all."""

import json
from pathlib import Path

import pytest

from llmlab.training.directory import RunDirectory, write_json, write_text


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"step": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert json.loads(path.read_text(encoding="utf-8")) == {"step": 1}
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert [entry.name for entry in tmp_path.iterdir() if not entry.name.startswith(".")] == ["summary.json"]


def test_a_directory_can_be_held_again_after_it_was_released(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "new" / "run")
    for _ in range(2):
        with directory.held():
            assert directory.path.is_dir()


def test_a_file_in_the_place_of_a_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a run", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file"), RunDirectory(tmp_path / "run").held():
        pass
    assert (tmp_path / "run").read_text(encoding="utf-8") == "not a run"
