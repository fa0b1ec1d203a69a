"""What is shown while runs are under way: who is where, and no number that could sway anybody."""

import io
import re

import pytest
from rich.console import Console

from llmlab.commands.ablate_board import Board, _picture
from llmlab.study.trials import Status
from llmlab.study.work import JobProgress, Progress


def job(name: str, status: Status, step: int = 0) -> JobProgress:
    latest = {"step": step, "train/loss": 1.2345, "validation/loss": 6.7891}
    return JobProgress(name=name, hash="0", status=status, step=step, steps=100, latest=latest, value=6.7891)


PROGRESS = Progress(
    jobs=(
        job("baseline/seed=0", Status.FINISHED, 100),
        job("norm=layer,heads=1/seed=0", Status.DIVERGED, 30),
        job("baseline/seed=1", Status.RUNNING, 50),
        job("norm=layer,heads=1/seed=1", Status.ABSENT),
    ),
    seconds=50.0,
)


def test_the_table_has_a_row_for_every_arm_and_a_mark_for_every_seed() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(_picture(PROGRESS))
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue()
    rows = [line.split() for line in said.splitlines()]
    assert ["baseline", "✓▸", "50/100"] in rows
    assert ["norm=layer,heads=1", "✗·"] in rows
    assert "2 of 4 runs done in 50 s, about 30 s left" in said  # 250 of 400 steps in 50 s


def test_no_loss_is_shown_before_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(_picture(PROGRESS))
    with Board() as board:
        board.update(PROGRESS)
    assert isinstance(console.file, io.StringIO)
    said = console.file.getvalue() + capsys.readouterr().err
    assert "2 of 4 runs done" in said
    assert not re.search(r"1\.23|6\.78|6\.79", said)


def test_a_quiet_board_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Board(quiet=True) as board:
        board.update(PROGRESS)
        board.tell("something")
    assert capsys.readouterr() == ("", "")
    assert board.standing == "2 of 4 runs are done"
