import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from llmlab import cli
from llmlab.commands.runs import main
from llmlab.training.directory import RunDirectory


def make_run(
    root: Path,
    name: str,
    *,
    status: str = "finished",
    steps: int = 20,
    loss: float = 2.5,
    age: float = 0.0,
    summary: bool = True,
) -> Path:
    """A run directory as training leaves it, without checkpoints."""
    directory = root / name
    directory.mkdir(parents=True)
    records = [
        {"step": step, "tokens": 64 * step, "train/loss": loss - 0.1, "tokens_per_second": 1000.0 + step}
        for step in range(1, steps + 1)
    ]
    records.append({"step": steps, "tokens": 64 * steps, "validation/loss": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.json").write_text(json.dumps({"train": {"steps": 20}}))
    sessions = [{"status": status}]
    provenance = {"name": "claim", "experiment_file": {"path": "experiments/claim.py"}, "sessions": sessions}
    (directory / "provenance.json").write_text(json.dumps(provenance))
    (directory / "run.lock").touch()
    if summary and status == "finished":
        content = {"step": steps, "num_parameters": 1_540_000, "validation/loss": loss, "tokens_per_second": 1234.0}
        (directory / "summary.json").write_text(json.dumps(content))
    for path in directory.iterdir():
        os.utime(path, (time.time() - age, time.time() - age))
    return directory


def listed(capsys: pytest.CaptureFixture[str], *argv: str) -> list[dict[str, Any]]:
    assert main([*argv, "--json"]) == 0

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    return json.loads(capsys.readouterr().out, parse_constant=refuse)


def hold(directory: Path, ready: Any, done: Any) -> None:
    with RunDirectory(directory).held():
        ready.set()
        done.wait(30)


def test_a_run_is_listed_with_what_its_files_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "claim-1", loss=2.5)
    (row,) = listed(capsys, str(tmp_path))
    assert row.pop("updated").endswith("+00:00")
    assert row == {
        "name": "claim-1",
        "status": "finished",
        "step": 20,
        "steps": 20,
        "num_parameters": 1_540_000,
        "train/loss": 2.4,
        "validation/loss": 2.5,
        "tokens_per_second": 1234.0,
        "experiment": "experiments/claim.py",
        "problem": None,
    }


def test_a_run_is_running_only_while_a_process_holds_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(tmp_path, "claim-1", status="running", steps=7)
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(directory, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        (row,) = listed(capsys, str(tmp_path))
        assert (row["status"], row["step"], row["steps"]) == ("running", 7, 20)
    finally:
        process.kill()  # as a crash would
        process.join()
    (row,) = listed(capsys, str(tmp_path))
    assert row["status"] == "interrupted"


@pytest.mark.parametrize("status", ["interrupted", "preempted", "failed"])
def test_a_session_that_ended_early_says_how(tmp_path: Path, capsys: pytest.CaptureFixture[str], status: str) -> None:
    make_run(tmp_path, "claim-1", status=status, steps=7)
    assert [row["status"] for row in listed(capsys, str(tmp_path))] == [status]


def test_runs_are_found_in_sweeps_and_other_directories_are_not_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, "sweep/trial-1")
    inside = make_run(tmp_path, "claim-1") / "checkpoints" / "20"
    inside.mkdir(parents=True)
    (inside / "config.json").touch()
    (inside / "run.lock").touch()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    assert {row["name"] for row in listed(capsys, str(tmp_path))} == {"sweep/trial-1", "claim-1"}
    assert [row["name"] for row in listed(capsys, str(tmp_path / "claim-1"))] == ["claim-1"]


def test_rows_are_sorted_by_age_or_by_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "a", loss=2.0, age=300)
    make_run(tmp_path, "b", loss=3.0, age=100)
    make_run(tmp_path, "c", loss=float("nan"), age=200)
    (tmp_path / "d").mkdir()
    for name, content in (("config.json", "{}"), ("run.lock", "")):
        (tmp_path / "d" / name).write_text(content)
    assert [row["name"] for row in listed(capsys, str(tmp_path))] == ["d", "b", "c", "a"]
    assert [row["name"] for row in listed(capsys, str(tmp_path), "--sort", "validation/loss")] == ["a", "b", "c", "d"]
    assert [row["name"] for row in listed(capsys, str(tmp_path), "--sort", "name")] == ["a", "b", "c", "d"]


def test_a_long_metrics_file_is_read_from_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = make_run(tmp_path, "long", status="running", steps=5000)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5001, "torn')
    (row,) = listed(capsys, str(tmp_path))
    assert (row["step"], row["validation/loss"]) == (5000, 2.5)


def test_a_damaged_run_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path, "good")
    (make_run(tmp_path, "torn") / "summary.json").write_text('{"step": ')
    (make_run(tmp_path, "odd") / "provenance.json").write_text('{"sessions": [3]}')
    rows = {row["name"]: row for row in listed(capsys, str(tmp_path))}
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "finished",
        "torn": "damaged",
        "odd": "damaged",
    }
    assert rows["torn"]["problem"]
    assert main([str(tmp_path)]) == 0
    assert "torn: " in capsys.readouterr().out


def test_the_table_has_a_line_for_every_run_and_is_not_cut_in_a_pipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a-rather-long-name-of-an-experiment-" * 2
    make_run(tmp_path, name, age=190)
    make_run(tmp_path, "short", status="failed", steps=7)
    assert main([str(tmp_path)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "run status step params loss validation tokens/s age experiment"
    assert re.match(r"short +failed +7/20 +- +2\.4000 +2\.5000 +1,007 +0\.\d s +experiments/claim.py", lines[0])
    assert re.match(rf"{name} +finished +20 +1\.54M +2\.4000 +2\.5000 +1,234 +3:1\d +experiments/claim.py", lines[1])


def test_no_runs_and_no_directory_say_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path)]) == 0
    assert "there are no runs in" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == 2
    error = capsys.readouterr().err
    assert "there is no directory runs" in error
    assert "llmlab train FILE" in error
