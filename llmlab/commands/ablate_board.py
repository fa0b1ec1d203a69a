"""What `llmlab ablate` shows while runs are under way: who is done, who is running, how long it may take.

No losses: numbers that are seen before a study is complete invite to stop it, or to go on, because of them.
"""

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from llmlab.display.numbers import duration

if TYPE_CHECKING:
    from llmlab.study.work import JobProgress, Progress

_MARKS = {
    "finished": ("✓", "green"),
    "running": ("▸", "cyan"),
    "diverged": ("✗", "bold red"),
    "failed": ("!", "bold red"),
    "corrupt": ("!", "bold red"),
    "unfinished": ("◦", "yellow"),
}
_LEGEND = "✓ finished  ▸ running  · waiting  ◦ cut short  ✗ diverged  ! failed or damaged"


class Board:
    """A live table in a terminal, a line for every change elsewhere; to be used with `with`.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._quiet = quiet
        self._live: Live | None = None
        self._began = time.monotonic()
        self._last: Progress | None = None
        self._told = -1

    def __enter__(self) -> "Board":
        if not self._quiet and sys.stderr.isatty():
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def standing(self) -> str:
        """How far it is, in words."""
        if self._last is None:
            return "nothing was run yet"
        return f"{self._last.done} of {len(self._last.jobs)} runs are done"

    def tell(self, text: str) -> None:
        """Prints a remark, above the table where there is one."""
        if not self._quiet:
            self._console.print(Text(text))

    def update(self, progress: "Progress") -> None:
        """Shows how the runs stand."""
        self._last = progress
        if self._live is not None:
            self._live.update(_picture(progress))
        elif not self._quiet and progress.done != self._told:
            self._told = progress.done
            seconds = duration(time.monotonic() - self._began)
            self._console.print(f"[{seconds:>7}] {progress.done} of {len(progress.jobs)} runs done{_left(progress)}")


def _picture(progress: "Progress") -> Group:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("arm", style="bold")
    table.add_column("seeds", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    arms: dict[str, list[JobProgress]] = {}
    for job in progress.jobs:
        arms.setdefault(job.name.rpartition("/seed=")[0], []).append(job)
    for arm, jobs in arms.items():
        marks = Text()
        for job in jobs:
            marks.append(*_MARKS.get(str(job.status), ("·", "dim")))
        running = [f"{job.step:,}/{job.steps:,}" for job in jobs if str(job.status) == "running"]
        table.add_row(arm, marks, ", ".join(running))
    line = f"{progress.done} of {len(progress.jobs)} runs done in {duration(progress.seconds)}{_left(progress)}"
    return Group(table, Text(line), Text(_LEGEND, style="dim"))


def _left(progress: "Progress") -> str:
    """The time left, from the steps that this call has seen made; nothing before there is something to go by."""
    total = sum(job.steps for job in progress.jobs)
    done = sum(job.steps if job.status.settled else job.step for job in progress.jobs)
    if not 0 < done < total or progress.seconds < 2:
        return ""
    return f", about {duration(progress.seconds * (total - done) / done)} left"
