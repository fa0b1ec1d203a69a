"""What a running study shows, on a terminal and in a pipe."""

import io

from rich.console import Console

from llmlab.commands.study_board import Board
from llmlab.study.trials import Status
from llmlab.study.work import JobProgress, Progress


def job(
    name: str, status: Status, step: int = 0, value: float | None = None, problem: str | None = None
) -> JobProgress:
    return JobProgress(
        name=name,
        hash=name,
        status=status,
        step=step,
        steps=100,
        latest={"train/loss": 2.5},
        value=value,
        problem=problem,
    )


def shown(board: Board, console: Console, progress: Progress) -> str:
    with console.capture() as capture:
        console.print(board.render(progress))
    return capture.get()


def test_a_terminal_shows_what_runs_first_and_never_more_than_it_has_room_for() -> None:
    console = Console(width=100, height=12, force_terminal=True, file=io.StringIO(), color_system=None)
    board = Board("studies/s", total=40, console=console)
    jobs = [job(f"done {i}", Status.FINISHED, 100, 2.0 + i) for i in range(20)]
    jobs += [job("bad", Status.FAILED, problem="RuntimeError: no\nmore"), job("now", Status.RUNNING, 50)]
    lines = shown(board, console, Progress(jobs=tuple(jobs), seconds=60)).splitlines()
    assert lines[0].startswith("studies/s   21/40 done   1 running   1:00")
    assert "now" in lines[1]
    assert "50/100" in lines[1]
    assert "loss 2.5000" in lines[1]
    assert "bad" in lines[2]
    assert "RuntimeError: no" in lines[2]
    assert lines[-1] == "and 16 more"
    assert len(lines) <= console.height - 2


def test_a_pipe_gets_one_line_an_event() -> None:
    output = io.StringIO()
    console = Console(width=60, file=output)
    board = Board("studies/s", console=console)
    with board:
        for step, status in ((0, Status.ABSENT), (1, Status.RUNNING), (2, Status.RUNNING), (100, Status.FINISHED)):
            value = 2.0 if status is Status.FINISHED else None
            jobs = (job("a" * 70, status, step, value), job("b", Status.ABSENT))
            board(Progress(jobs=jobs, seconds=float(step)))
        board(Progress(jobs=(jobs[0], job("b", Status.DIVERGED, problem="loss=nan")), seconds=120.0))
    assert output.getvalue().splitlines() == [
        f"[  1.0 s] 0/2  {'a' * 70}  running",
        f"[   1:40] 1/2  {'a' * 70}  finished 2.0000",
        "[   2:00] 2/2  b  diverged: loss=nan",
    ]
