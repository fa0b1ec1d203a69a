"""A study that runs, shown: a table that stays in place on a terminal, and a line per event anywhere else.

studies/tiny-sweep   5/12 done   2 running   1:32, about 3:10 to go
peak_lr=0.001 num_layers=4    ━━━━━━━━━━╺━━━━━━━━━   120/200   loss 2.3142
peak_lr=0.003 num_layers=4    ━━━╺━━━━━━━━━━━━━━━━    40/200   loss 2.9120
peak_lr=0.01  num_layers=4    finished                          2.1034
"""

import math
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmlab.display.numbers import duration, nats
from llmlab.study.trials import Status
from llmlab.study.work import JobProgress, Progress

STYLES = {
    Status.ABSENT: "dim",
    Status.UNFINISHED: "yellow",
    Status.RUNNING: "cyan",
    Status.FINISHED: "green",
    Status.FAILED: "red",
    Status.DIVERGED: "red",
    Status.PRUNED: "magenta",
    Status.CORRUPT: "bold red",
}
# What is shown first where the terminal has no room for all.
_ORDER = (Status.RUNNING, Status.CORRUPT, Status.FAILED, Status.DIVERGED, Status.FINISHED, Status.PRUNED)
_MARGIN = 6  # lines of a terminal that are left to others


class Board:
    """Shows the progress of a study; enter it while the study runs, and call it with every progress.

    Args:
        title: of the study.
        total: number of trials, where more are to come than there are; None for those there are.
        console: another place than standard output.
    """

    def __init__(self, title: str, *, total: int | None = None, console: Console | None = None) -> None:
        self._title = title
        self._total = total
        self._console = console or Console(highlight=False)
        self._shown: dict[tuple[str, str], Status] = {}
        self._began = time.monotonic()
        self._first_done: int | None = None
        live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live = Live(console=self._console, refresh_per_second=2, transient=True) if live else None

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Shows the progress."""
        if self._first_done is None:
            self._first_done = progress.done
        if self._live is not None:
            self._live.update(self.render(progress))
        else:
            self._print_events(progress)

    def render(self, progress: Progress) -> RenderableType:
        """The table, as high as the terminal allows."""
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(overflow="fold")
        table.add_column(width=24, no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        listed = [job for job in progress.jobs if job.status in _ORDER]
        listed.sort(key=lambda job: _ORDER.index(job.status))
        room = max(3, self._console.height - _MARGIN)
        for job in listed[:room]:
            table.add_row(*self._row(job))
        rest = [Text(f"and {len(listed) - room} more", style="dim")] if len(listed) > room else []
        return Group(Text(self._headline(progress), style="bold"), table, *rest)

    def _row(self, job: JobProgress) -> Sequence[RenderableType]:
        name = Text(job.name or "...")
        if job.status is not Status.RUNNING:
            value = "" if job.value is None else nats(job.value)
            note = job.problem.splitlines()[0] if job.problem else ""
            return name, Text(str(job.status), style=STYLES[job.status]), Text(value), Text(note[:80], style="dim")
        bar = ProgressBar(total=max(job.steps, 1), completed=job.step, width=24)
        return name, bar, Text(f"{job.step:,}/{job.steps:,}"), Text(_loss(job), style="dim")

    def _headline(self, progress: Progress) -> str:
        running = sum(job.status is Status.RUNNING for job in progress.jobs)
        total = max(self._total or 0, len(progress.jobs))
        parts = [self._title, f"{progress.done}/{total} done", f"{running} running", duration(progress.seconds)]
        here = progress.done - (self._first_done or 0)
        if here > 0 and progress.done < total:
            parts[-1] += f", about {duration(progress.seconds / here * (total - progress.done))} to go"
        return "   ".join(parts)

    def _print_events(self, progress: Progress) -> None:
        """A line for every trial that changed since the last look."""
        total = max(self._total or 0, len(progress.jobs))
        done = sum(status in _ORDER[1:] for status in self._shown.values())
        for index, job in enumerate(progress.jobs):
            key = (str(index), job.hash)
            waits = job.status in (Status.ABSENT, Status.UNFINISHED) or not job.name  # not drawn yet
            if waits or self._shown.get(key) is job.status:
                continue
            self._shown[key] = job.status
            done += job.status in _ORDER[1:]
            value = "" if job.value is None else f" {nats(job.value)}"
            problem = f": {job.problem.splitlines()[0]}" if job.problem else ""
            self._console.print(
                Text(f"[{duration(progress.seconds):>7}] {done}/{total}  {job.name}  {job.status}{value}{problem}"),
                soft_wrap=True,
            )
        sys.stdout.flush()


def _loss(job: JobProgress) -> str:
    shown = [("loss", "train/loss"), ("validation", "validation/loss")]
    parts = [f"{name} {nats(job.latest[key])}" for name, key in shown if math.isfinite(job.latest.get(key, math.nan))]
    return "  ".join(parts)
