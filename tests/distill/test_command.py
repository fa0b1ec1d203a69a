"""`llmlab distill` as a user meets it: a table at the end, caches, and what it says to mistakes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmlab import cli
from llmlab.commands import distill_tables
from llmlab.data import Pairs
from llmlab.distill import CosineStates, Distill, TeacherTexts
from llmlab.distill.gains import gap_closed, without_teacher
from llmlab.objectives import NextToken
from tests.distill.conftest import LENGTH

FILE = """
from llmlab.data import Packed, TextFiles
from llmlab.distill import Distill, Predictions
from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.llama import llama
from llmlab.optim import SGD, Constant
from llmlab.tokenizers import {tokenizer}
from llmlab.training.config import Train


def config():
    return Experiment(
        model=llama(embed_dim=8, num_layers=1, num_heads=2, hidden_dim=16, head=Tied()),
        tokenizer={build},
        data=Packed(TextFiles({corpus!r}, separator="\\n"), validation_fraction=0.2),
        objective=Distill(teacher={teacher!r}, terms=(Predictions(temperature=2.0, labels=0.5),)),
        optimizer=SGD(peak_lr=0.5, schedule=Constant()),
        train=Train(steps=2, batch_size=8, sequence_length={length}, evaluate_batches=1, keep_best=0),
    )
"""


@pytest.fixture
def file_of(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Function (teacher, tokenizer) -> an experiment file."""

    def make(teacher: str, tokenizer: str = "Bytes", build: str = "Bytes()") -> Path:
        path = tmp_path / "student.py"
        path.write_text(
            FILE.format(corpus=str(corpus), teacher=teacher, length=LENGTH, tokenizer=tokenizer, build=build)
        )
        return path

    return make


@pytest.mark.scale
def test_it_ends_with_a_table_of_what_the_teacher_was_worth(
    teacher: str, file_of: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert cli.main(["distill", str(file_of(teacher)), "--out", str(out), "--quiet"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    entrants = results["entrants"]
    assert set(entrants) == {"teacher", "student", "scratch"}
    for name in ("teacher", "student from scratch", "gap closed", "FLOPs a token", "tokens/s"):
        assert name in shown
    assert entrants["student"]["num_parameters"] == entrants["scratch"]["num_parameters"]
    assert entrants["teacher"]["flops_per_token"] > entrants["student"]["flops_per_token"]
    for name, run in (("student", "student"), ("scratch", "scratch")):
        summary = json.loads((out / run / "summary.json").read_text())
        # One device splits the batch otherwise than eight do: float32 sums in another order.
        assert entrants[name]["loss"] == pytest.approx(summary["validation/loss"], rel=1e-5)
    assert "# student: what the teacher was worth" in (out / "report.md").read_text()
    # The same command finds both runs done.
    assert cli.main(["distill", str(file_of(teacher)), "--out", str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["gap_closed"] == pytest.approx(results["gap_closed"], rel=1e-4)


@pytest.mark.scale
def test_a_cache_is_written_and_trained_from(
    teacher: str, file_of: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    path, cache = str(file_of(teacher)), str(tmp_path / "cache")
    assert cli.main(["distill", "cache", path, "--out", cache, "--entries", "4", "--json", "--quiet"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["rows"], about["places"]) == (16, 16 * LENGTH)
    command = ["train", path, "--objective.cache", cache, "--quiet", "--out"]
    assert cli.main([*command, str(tmp_path / "run")]) == 0
    assert cli.main([*command, str(tmp_path / "other"), "--train.seed", "3"]) == 2
    assert "seed: made for 0, asked for 3" in capsys.readouterr().err


def test_a_full_disk_is_told_with_the_way_on(
    teacher: str, file_of: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    import errno
    import os

    path, cache = str(file_of(teacher)), tmp_path / "cache"
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 2:  # the manifest and a shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    command = ["distill", "cache", path, "--out", str(cache), "--entries", "4", "--rows-per-shard", "8", "--quiet"]
    assert cli.main(command) == 1
    assert "8 of 16 rows are there and whole; free some space" in capsys.readouterr().err
    monkeypatch.setattr(os, "fsync", real)
    assert cli.main(command) == 0
    assert len(list(cache.glob("rows-*.zst"))) == 2


@pytest.mark.scale
def test_another_tokenizer_is_an_error_that_explains(
    teacher: str, file_of: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    path = file_of(teacher, "Bytes, SpecialTokens", 'Bytes(special=SpecialTokens(bos="<other>"))')
    assert cli.main(["distill", str(path), "--out", str(tmp_path / "out"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "reads other tokens than the student" in said
    assert 'tokenizer=Opened(path="' in said
    opened = file_of(teacher, "Opened", f"Opened(path={teacher!r})")
    assert cli.main(["train", str(opened), "--out", str(tmp_path / "run"), "--quiet"]) == 0


def test_mistakes_are_answered(teacher: str, file_of: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    path = str(file_of(teacher))
    assert cli.main(["distill", path, "--objective.teacher", "nowhere"]) == 2
    assert "teacher=nowhere is not a directory" in capsys.readouterr().err
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["distill", path, "--objective.teacher", str(empty)]) == 2
    assert "has no config.json" in capsys.readouterr().err
    assert cli.main(["distill", "cache", path, "--out", str(tmp_path / "c"), "--entries", "1000"]) == 2
    assert "--entries 1000 is not between 1 and the vocabulary's 384" in capsys.readouterr().err
    assert cli.main(["distill"]) == 2


def test_the_gap_and_the_baseline_are_what_they_are_called(teacher: str, experiment_of: Callable[..., Any]) -> None:
    assert gap_closed(teacher=1.0, student=1.5, scratch=2.0) == 0.5
    assert gap_closed(teacher=2.0, student=1.5, scratch=2.0) is None
    with pytest.raises(ValueError, match="objective=NextToken has no teacher"):
        without_teacher(experiment_of(NextToken()))
    with pytest.raises(ValueError, match=r"objective\.base is None"):
        without_teacher(experiment_of(Distill(teacher=teacher, base=None, terms=(CosineStates(),))))
    pairs = Pairs(source="a", target="b", validation_fraction=0.25, prefix="say: ")
    texts = TeacherTexts(source="a", target="b", validation_fraction=0.25, prefix="say: ", teacher=teacher)
    assert without_teacher(replace(experiment_of(NextToken()), data=texts)) == replace(
        experiment_of(NextToken()), data=pairs
    )
    entrant = {"loss": 1.0, "num_parameters": 1, "flops_per_token": 1.0, "tokens_per_second": 1.0}
    results = {
        "unit": "token",
        "entrants": dict.fromkeys(("teacher", "student", "scratch"), entrant),
        "gap_closed": None,
        "training": {"student": {"tokens_per_second": 1000.0}, "scratch": {"tokens_per_second": 1500.0}},
    }
    text = distill_tables.markdown(results, title="a|b")
    assert "no gap to close" in text
    assert "at 1,000 tokens/s with the teacher and at 1,500 without" in text
    assert "a\\|b" in text
