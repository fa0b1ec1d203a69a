"""A run, live in the terminal: finished stages above, and below them a panel that follows the training.

    ✓ tokenizer   2.1 s  SentencePiece unigram, 1,024 pieces
    ╭─ quickstart-1a2b3c4d ─────────────────────────────╮
    │ step 1,200/2,000  ━━━━━━━━━━━━━━━━╺━━━━━━  1:32   │
    │ (the loss as a curve, validation as marks on it)  │
    │ loss    validation    learning rate ...           │
    ╰───────────────────────────────────────────────────╯

The panel redraws itself in place four times a second, in one write, whatever training does; it fits itself to the
terminal's width and height. The cursor is hidden while it lives and comes back however the program ends.
"""

import atexit
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from llmlab.display.board import Board
from llmlab.display.numbers import duration
from llmlab.display.plain import PlainReport
from llmlab.display.summary import Closing
from llmlab.training.report import Level, Report

_STYLES: dict[Level, str] = {"info": "", "warning": "yellow", "error": "bold red"}


def terminal_report(
    title: str,
    *,
    run: Path | None = None,
    experiment: Path | None = None,
    flags: Sequence[str] = (),
    steps: int | None = None,
    peak_lr: float | None = None,
    console: Console | None = None,
) -> Report:
    """The report for this standard output: live on a terminal, plain lines anywhere else.

    Args:
        title: name of the run.
        run: its directory, for the commands that the summary suggests.
        experiment: its file, likewise.
        flags: what was changed on the command line, likewise.
        steps: of the experiment, likewise.
        peak_lr: of the experiment, likewise.
        console: another place than standard output.
    """
    closing = Closing(title=title, run=run, experiment=experiment, flags=tuple(flags), steps=steps, peak_lr=peak_lr)
    console = console or Console(highlight=False)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveReport(console, closing)
    return PlainReport(console, closing)


class LiveReport:
    """Shows a run in place. The methods are those of `Report`.

    Args:
        console: a terminal.
        closing: what the summary says about the run.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console, closing: Closing, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._closing = closing
        self._board = Board(closing.title, clock=clock, ascii_only=console.options.ascii_only)
        self._live = Live(
            get_renderable=lambda: self._board.render(console.width, console.height),
            console=console,
            refresh_per_second=4,
            transient=True,  # what stays is printed at the end
        )
        self._started = self._closed = False

    def phase(self, name: str, detail: str = "") -> None:
        done = self._board.begin_phase(name, detail)
        self._start()
        if done is not None:
            self._print_done(*done)
        if name == "train" and detail:  # it ends with the run, which is late to say it
            self._console.print(Text(f"  {detail}", style="dim"))

    def progress(self, done: int, total: int | None, what: str) -> None:
        self._board.progress(done, total, what)

    def step(self, metrics: Mapping[str, float]) -> None:
        self._board.step(metrics)

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        self._board.evaluation(metrics)

    def checkpoint(self, step: int) -> None:
        self._board.checkpoint = step

    def message(self, text: str, level: Level = "info") -> None:
        shown = text if level == "info" else f"{level}: {text}"
        self._console.print(Text(shown, style=_STYLES[level]))

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        self._stop()
        done = self._board.end_phase()
        if done is not None and summary is not None:
            self._print_done(*done)
        if self._board.training:
            self._console.print(self._board.render(self._console.width, self._console.height, closed=True))
        if summary is not None:
            self._console.print(self._closing.render(summary, self._console.options), crop=False)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            atexit.register(self._live.stop)  # the cursor comes back even where nobody calls close
            self._live.start()

    def _stop(self) -> None:
        self._live.stop()
        atexit.unregister(self._live.stop)

    def _print_done(self, name: str, detail: str, seconds: float) -> None:
        tick = "*" if self._console.options.ascii_only else "✓"
        self._console.print(
            Text.assemble(
                (f"{tick} ", "green"), f"{name:<12}", (f"{duration(seconds):>7}", "bold"), (f"  {detail}", "dim")
            )
        )
