import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from llmlab.display.board import Board
from llmlab.display.plain import PlainReport
from llmlab.display.summary import Closing, harmless
from llmlab.display.terminal import LiveReport, terminal_report
from llmlab.training.report import NullReport, Report

SUMMARY: dict[str, Any] = {
    "step": 600,
    "tokens": 1_228_800,
    "num_parameters": 1_540_000,
    "validation/loss": 2.3121,
    "validation/perplexity": math.exp(2.3121),
    "validation/bits_per_byte": 1.342,
    "baselines": {"unigram": 5.2144, "bigram": 2.5521},
    "seconds": {"tokenize": 4.2, "train": 171.2, "total": 199.0},
    "tokens_per_second": 10204.0,
    "model_flops_per_second": 92.4e9,
    "mfu": 0.183,
    "mfu_convention": "MFU: matmul FLOPs / peak 506 GFLOP/s, measured",
    "sample": {"prompt": "def main(", "text": "self):\n    return 1\n"},
}
CLOSING = Closing(
    title="quickstart-1a2b3c4d",
    run=Path("runs/quickstart-1a2b3c4d"),
    experiment=Path("experiments/quickstart.py"),
    steps=600,
    peak_lr=3e-3,
)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A console on a pretended terminal, and what was written to it."""

    def __init__(self, width: int = 80, height: int = 40, *, tty: bool = True, encoding: str = "utf-8") -> None:
        self.bytes = io.BytesIO()
        file = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        self.console = Console(
            file=file, force_terminal=tty, width=width, height=height, color_system=None, _environ={}, highlight=False
        )

    @property
    def written(self) -> str:
        return self.bytes.getvalue().decode()


def record(step: int, total: int = 600) -> dict[str, float]:
    return {
        "step": step,
        "tokens": 2048 * step,
        "train/loss": 2.0 + 5.0 / step,
        "learning_rate": 3e-3,
        "gradient_norm": 0.83,
        "tokens_per_second": 10204.0,
        "model_flops_per_second": 92.4e9,
        "mfu": 0.183,
        "eta_seconds": float(total - step),
    }


def run(report: Report, summary: dict[str, Any] | None = SUMMARY) -> None:
    """A short run, all events."""
    report.phase("tokenizer", "SentencePiece unigram, 1,024 pieces")
    report.progress(50, 100, "read corpus")
    report.phase("compile", "train step")
    report.phase("train", "MFU: a convention")
    report.message("resumed from step 0")
    for step in range(10, 101, 10):
        report.progress(step, 600, "steps")
        report.step(record(step))
    report.phase("evaluate")
    report.progress(1, 12, "evaluate")
    report.evaluation({"step": 100, "validation/loss": 2.4321})
    report.checkpoint(100)
    report.message("mind the gap", "warning")
    report.close(summary)
    report.close(None)  # twice does no harm


def drawn(board: Board, width: int, height: int, **options: Any) -> list[str]:
    console = Console(
        file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None, _environ={}
    )
    with console.capture() as capture:
        console.print(board.render(width, height, **options))
    return capture.get().splitlines()


def board_in_training(*, total: int | None = 600, ascii_only: bool = False) -> Board:
    board = Board("quickstart-1a2b3c4d", clock=Clock(), ascii_only=ascii_only)
    board.begin_phase("train", "")
    board.progress(0, total, "steps")
    for step in range(10, 201, 10):
        board.step(record(step))
    board.evaluation({"step": 100, "validation/loss": 2.25})
    board.evaluation({"step": 200, "validation/loss": 2.4321})
    board.checkpoint = 200
    return board


def test_reports_have_every_method_of_the_protocol() -> None:
    for report in (NullReport(), PlainReport(Terminal().console, CLOSING), LiveReport(Terminal().console, CLOSING)):
        assert isinstance(report, Report)


@pytest.mark.parametrize("width", [50, 80, 200])
@pytest.mark.parametrize("height", [10, 24, 60])
def test_the_panel_fits_any_terminal_and_shows_every_number(width: int, height: int) -> None:
    lines = drawn(board_in_training(), width, height)
    assert {cell_len(line) for line in lines} == {min(width, 110)}
    assert len(lines) <= max(height, 16)
    text = "\n".join(lines)
    for shown in ("200/600", "2.0250", "2.4321", "3.00e-03", "0.830", "10,204", "92.4 GFLOP/s", "18.3%", "step 200"):
        assert shown in text, shown
    assert "MFU of 505 GFLOP/s" in text  # 92.4 / 0.183
    assert "6:40 left" in text


def test_the_panel_keeps_its_height_while_a_run_goes_on() -> None:
    board = Board("run", clock=Clock())
    board.begin_phase("train", "")
    heights = set()
    for step in range(1, 14):
        board.step(record(step))
        heights.add(len(drawn(board, 80, 40)))
        board.begin_phase("evaluate", "")
        board.progress(1, 2, "evaluate")
        heights.add(len(drawn(board, 80, 40)))
        board.evaluation({"step": step, "validation/loss": 2.0})
    assert len(heights) == 1


def test_the_best_validation_loss_is_shown_beside_a_worse_one() -> None:
    text = "\n".join(drawn(board_in_training(), 110, 40))
    assert "2.4321 (best 2.2500)" in text


def test_a_run_without_a_known_length_has_no_percentage() -> None:
    text = "\n".join(drawn(board_in_training(total=None), 80, 40))
    assert "step 200 " in text
    assert "/600" not in text


def test_an_ascii_terminal_gets_ascii() -> None:
    assert "".join(drawn(board_in_training(ascii_only=True), 80, 40)[1:2]).startswith("| step")
    terminal = Terminal(encoding="ascii")
    run(LiveReport(terminal.console, CLOSING))
    terminal.bytes.getvalue().decode("ascii")


def test_a_live_run_ends_with_stages_panel_and_summary_and_the_cursor_back() -> None:
    terminal = Terminal()
    run(LiveReport(terminal.console, CLOSING))
    written = terminal.written
    assert re.search(r"✓ tokenizer\s+\S+ s  SentencePiece unigram", written)
    assert re.search(r"✓ compile\s+\S+ s  train step", written)
    assert "MFU: a convention" in written
    assert "warning: mind the gap" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1
    last = written[written.rindex("\x1b[?25h") :]
    assert last.index("step 100/600") < last.index("validation loss") < last.index("llmlab generate")
    assert last.count("quickstart-1a2b3c4d ─") == 2  # the panel's last state and the summary, each once


def test_an_interrupted_run_gives_the_cursor_back_and_shows_no_summary() -> None:
    terminal = Terminal()
    run(LiveReport(terminal.console, CLOSING), summary=None)
    assert "\x1b[?25h" in terminal.written
    assert "validation loss" not in terminal.written


def test_outside_a_terminal_every_event_is_one_plain_line() -> None:
    terminal = Terminal(width=40, tty=False)
    report = terminal_report("quickstart-1a2b3c4d", console=terminal.console)
    run(report, summary=None)
    assert "\x1b" not in terminal.written
    lines = terminal.written.splitlines()
    assert lines[0].endswith("] tokenizer: SentencePiece unigram, 1,024 pieces")
    steps = [line for line in lines if "train" not in line and " loss " in line and "validation" not in line]
    assert len(steps) == 10
    assert len({line.index("tok/s") for line in steps}) == 1  # aligned
    assert re.fullmatch(
        r"\[ *[\d.]+ s\] step 100/600  loss  2\.0500  lr 3\.000e-03  grad  0\.8300    10204 tok/s  92\.4 GFLOP/s  "
        r"mfu 18\.3%  eta 8:20",
        steps[-1],
    )
    assert any(line.endswith("step 100/600  validation loss 2.4321") for line in lines)
    assert any(line.endswith("step 100/600  checkpoint saved") for line in lines)
    assert any(line.endswith("warning: mind the gap") for line in lines)


def test_plain_progress_is_reported_now_and_then_and_when_it_ends() -> None:
    clock, terminal = Clock(), Terminal(tty=False)
    report = PlainReport(terminal.console, CLOSING, clock=clock)
    report.phase("tokenize")
    for second in range(26):
        clock.now = float(second)
        report.progress(second, 25, "tokenize")
    report.progress(25, 25, "tokenize")
    lines = [line.split("] ")[1] for line in terminal.written.splitlines()]
    assert lines == ["tokenize", "tokenize  40%", "tokenize  80%", "tokenize 100%"]


@pytest.mark.parametrize("width", [50, 80, 160])
def test_the_summary_shows_baselines_as_longer_bars_than_the_model(width: int) -> None:
    terminal = Terminal(width, tty=False)
    terminal.console.print(CLOSING.render(SUMMARY, terminal.console.options), crop=False)
    lines = terminal.written.splitlines()
    bars = {
        name: line.count("█")
        for line in lines
        for name in ("unigram", "bigram", "this model")
        if re.match(rf"│ +{name} ", line)
    }
    assert bars["unigram"] > bars["bigram"] > bars["this model"]
    # Lengths are proportional, to the one character that a bar's last part may take.
    assert bars["bigram"] == pytest.approx(bars["unigram"] * 2.5521 / 5.2144, abs=1)
    text = re.sub(r"[\s│]+", " ", terminal.written)
    for shown in (
        "0.24 nats below the bigram",
        "perplexity 10.10",
        "bits per byte 1.342",
        "600 steps",
        "def main(self)",
    ):
        assert shown in text, shown
    for command in (
        'llmlab generate runs/quickstart-1a2b3c4d --prompt "..."',
        "llmlab plot runs/quickstart-1a2b3c4d",
        "llmlab train experiments/quickstart.py --train.steps 1200 "
        "--out runs/quickstart-1a2b3c4d --allow-config-change",
        "llmlab train experiments/quickstart.py --optimizer.peak-lr 0.0015",
    ):
        assert any(line.endswith(command) for line in lines), f"{command} is not on a line of its own, to be copied"


def test_only_a_model_that_writes_is_asked_to_write() -> None:
    terminal = Terminal(tty=False)
    for summary in ({}, {"sample": {"prompt": "", "text": "x = 1"}}):
        terminal.console.print(CLOSING.render(summary, terminal.console.options), crop=False)
        assert ("llmlab generate" in terminal.written) == ("sample" in summary)
        assert "llmlab plot" in terminal.written


FLAGS = ("--train.steps", "5", "--train.seed", "1", "--train.steps=6")


def test_suggested_commands_keep_what_was_changed_on_the_command_line() -> None:
    closing = Closing(title="x", run=Path("runs/a b"), experiment=Path("e.py"), flags=FLAGS, steps=5)
    terminal = Terminal(tty=False)
    terminal.console.print(closing.render({}, terminal.console.options), crop=False)
    longer = "llmlab train e.py --train.seed 1 --train.steps 10 --out 'runs/a b' --allow-config-change"
    assert longer in terminal.written


def test_a_model_worse_than_its_baseline_is_told_so() -> None:
    terminal = Terminal(tty=False)
    terminal.console.print(CLOSING.render(SUMMARY | {"validation/loss": 3.0}, terminal.console.options))
    assert "0.45 nats above the bigram" in terminal.written


@pytest.mark.parametrize("summary", [{}, {"step": 1, "validation/loss": math.nan, "baselines": {"unigram": 5.0}}])
def test_a_summary_shows_what_there_is(summary: dict[str, Any]) -> None:
    terminal = Terminal(tty=False)
    terminal.console.print(Closing(title="x").render(summary, terminal.console.options))
    assert "x" in terminal.written


def test_a_sample_from_a_line_break_begins_with_its_first_line() -> None:
    terminal = Terminal(tty=False)
    sample = {"sample": {"prompt": "\n", "text": "\n    import os\n"}}
    terminal.console.print(Closing(title="x").render(sample, terminal.console.options))
    lines = terminal.written.splitlines()
    title = next(i for i, line in enumerate(lines) if "sample" in line)
    assert "▏     import os" in lines[title + 1]
    assert "prompt in bold" not in terminal.written


def test_what_a_model_writes_cannot_steer_the_terminal() -> None:
    assert harmless("a\x1b[31m\tb\r\nc\x00\x9b") == "a�[31m  b\nc��"
    terminal = Terminal(tty=False)
    sample = {"sample": {"prompt": "[bold]", "text": "\x1b[2J[/red]\n"}}
    terminal.console.print(Closing(title="x").render(sample, terminal.console.options))
    assert "\x1b" not in terminal.written
    assert "[bold]�[2J[/red]" in terminal.written
