"""What the live display knows about a run, and how that looks at any size of the terminal."""

import math
import time
from collections.abc import Callable, Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from llmlab.display.curve import Series, draw
from llmlab.display.numbers import count, duration, nats
from llmlab.training.throughput import readable_flops

TRAIN_STYLE, VALIDATION_STYLE = "cyan", "yellow"
MAX_WIDTH = 110


class Board:
    """Collects a run's events; `render` draws them.

    Args:
        title: name of the run.
        clock: seconds, monotonic.
        ascii_only: for terminals whose encoding has nothing else.
    """

    def __init__(self, title: str, *, clock: Callable[[], float] = time.monotonic, ascii_only: bool = False) -> None:
        self.title = title
        self.checkpoint: int | None = None
        self._clock = clock
        self._ascii = ascii_only
        self._phase: tuple[str, str, float] | None = None
        self._progress: tuple[int, int | None, str] | None = None
        self._steps: tuple[int, int | None] = (0, None)
        self._latest: dict[str, float] = {}
        self._eta: float | None = None  # by the clock
        self._train, self._validation = Series(), Series()
        self._best = math.inf

    @property
    def training(self) -> bool:
        """Whether a step was reported."""
        return bool(self._latest)

    def begin_phase(self, name: str, detail: str) -> tuple[str, str, float] | None:
        """Notes a new phase; returns the one before (name, detail, seconds) where that deserves a line of its own."""
        done = self.end_phase()
        self._phase = (name, detail, self._clock())
        self._progress = None
        return done

    def end_phase(self) -> tuple[str, str, float] | None:
        """Ends the phase: (name, detail, seconds), or None once training has begun: it goes to and fro from there."""
        phase, self._phase = self._phase, None
        if phase is None or self.training:
            return None
        name, detail, began = phase
        return name, detail, self._clock() - began

    def progress(self, done: int, total: int | None, what: str) -> None:
        """Notes progress; that of "steps" is the whole run's."""
        if what == "steps":
            self._steps = (done, total)
        else:
            self._progress = (done, total, what)

    def step(self, metrics: Mapping[str, float]) -> None:
        """Notes the metrics of a step."""
        self._latest |= metrics
        step = int(metrics.get("step", 0))
        self._steps = (step, self._steps[1])
        if (loss := metrics.get("train/loss")) is not None:
            self._train.add(step, loss)
        if (eta := metrics.get("eta_seconds")) is not None:
            self._eta = self._clock() + eta

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Notes the metrics of an evaluation."""
        self._progress = None
        self._latest |= {key: value for key, value in metrics.items() if key.startswith("validation/")}
        if (loss := metrics.get("validation/loss")) is not None:
            self._validation.add(int(metrics.get("step", self._steps[0])), loss)
            self._best = min(self._best, loss)

    def render(self, width: int, height: int, *, closed: bool = False) -> RenderableType:
        """The panel at this size of the terminal; `closed` for its last state, which stays."""
        width = min(width, MAX_WIDTH)
        inner = width - 4
        if not self.training:
            return self._activity(min(width, 100))
        columns = 4 if inner >= 68 else 2
        cells = self._cells()
        num_rows = math.ceil(len(cells) / columns)
        # Border, bar, blank line, two lines a row of numbers, activity, and two lines of air below the panel.
        room = height - (2 + 1 + 1 + 2 * num_rows + 1 + 2)
        parts: list[RenderableType] = [self._bar(inner)]
        if room >= 3:
            parts += [*self._curve(inner, min(room, 8)), Text("")]
        parts.append(_grid(cells, columns, inner))
        if not closed:
            parts.append(self._activity(inner))
        return Panel(
            Group(*parts),
            title=Text(_shortened(self.title, inner - 4), style="bold"),
            title_align="left",
            box=box.ASCII if self._ascii else box.ROUNDED,
            border_style="dim",
            width=width,
        )

    def _bar(self, width: int) -> RenderableType:
        done, total = self._steps
        label = f"step {done:,}/{total:,}" if total else f"step {done:,}"
        left = "" if self._eta is None else f"{duration(max(0.0, self._eta - self._clock()))} left"
        if total and done >= total:
            left = "done"
        right = f"{done / total:4.0%}  {left}" if total else left
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column()
        row.add_column(no_wrap=True, justify="right")
        space = max(4, width - len(label) - len(right) - 4)
        bar = ProgressBar(total or 1, done if total else 0, width=space, complete_style="cyan", finished_style="green")
        row.add_row(Text(label, style="bold"), bar, Text(right))
        return row

    def _curve(self, width: int, height: int) -> list[RenderableType]:
        margin = 8
        drawing = draw([self._train, self._validation], width - margin, height, ascii_only=self._ascii)
        if drawing is None:
            return [Text("")] * height  # the panel keeps its height when the curve appears
        styles = (TRAIN_STYLE, f"bold {VALIDATION_STYLE}")
        edge = "|" if self._ascii else "┤"
        lines: list[RenderableType] = []
        for number, row in enumerate(drawing.rows):
            value = drawing.top if number == 0 else drawing.bottom if number == height - 1 else None
            line = Text(f"{value:6.3f} {edge}" if value is not None else f"{' ' * 7}{edge}", style="dim", no_wrap=True)
            for cell in row:
                line.append(cell.character, style="" if cell.series is None else f"not dim {styles[cell.series]}")
            lines.append(line)
        return lines

    def _cells(self) -> list[tuple[str, Text]]:
        """Label and value of everything that has one, in a fixed order, so that nothing moves."""
        latest = self._latest

        def shown(key: str, form: Callable[[float], str], style: str = "bold") -> Text:
            value = latest.get(key)
            if value is None:
                return Text("-", style="dim")
            return Text(form(value), style=style if math.isfinite(value) else "bold red")

        validation = shown("validation/loss", nats, f"bold {VALIDATION_STYLE}")
        if latest.get("validation/loss", -math.inf) > self._best:
            validation.append(f" (best {nats(self._best)})", style="dim")
        mfu, flops = latest.get("mfu"), latest.get("model_flops_per_second")
        of_peak = f"MFU of {readable_flops(flops / mfu)}" if mfu and flops else "MFU"
        saved = Text("-", style="dim") if self.checkpoint is None else Text(f"step {self.checkpoint:,}", style="bold")
        return [
            ("loss", shown("train/loss", nats, f"bold {TRAIN_STYLE}")),
            ("validation", validation),
            ("learning rate", shown("learning_rate", "{:.2e}".format)),
            ("gradient norm", shown("gradient_norm", "{:.3f}".format)),
            ("tokens/s", shown("tokens_per_second", "{:,.0f}".format)),
            ("model FLOP/s", shown("model_flops_per_second", readable_flops)),
            (of_peak, shown("mfu", "{:.1%}".format)),
            ("saved", saved),
        ]

    def _activity(self, width: int) -> RenderableType:
        """One line: what is going on besides, with its own progress."""
        if self._phase is None:
            return Text("")
        name, detail, began = self._phase
        elapsed = duration(self._clock() - began)
        done, total, what = self._progress or (0, None, "")
        if self._progress is None or (total is not None and done >= total):  # done with what could be counted
            text = Text.assemble((name, "" if self.training else "bold"), ("" if self.training else f"  {elapsed}", ""))
            if detail and not self.training:
                text.append(f"  {detail}", style="dim")
            text.no_wrap, text.overflow = True, "ellipsis"
            text.stylize("dim" if self.training else "")
            return text
        label = what if what.startswith(name) or self.training else f"{name}: {what}"
        right = f"{done / total:4.0%}  {elapsed}" if total else f"{count(done)}  {elapsed}" if done else elapsed
        row = Table.grid(padding=(0, 2, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column()
        row.add_column(no_wrap=True)
        label = _shortened(label, width - len(right) - 14)
        space = max(4, min(60, width - len(label) - len(right) - 4))
        bar = ProgressBar(
            total or 1, min(done, total) if total else 0, width=space, pulse=not total, complete_style="cyan"
        )
        row.add_row(Text(label, style="dim" if self.training else "bold"), bar, Text(right, style="dim"))
        return row


def _grid(cells: list[tuple[str, Text]], columns: int, width: int) -> Table:
    """Labels above values, in columns of equal width."""
    table = Table.grid(padding=0)
    for _ in range(columns):
        table.add_column(width=width // columns, no_wrap=True, overflow="ellipsis")
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        table.add_row(*(Text(label, style="dim") for label, _ in row))
        table.add_row(*(value for _, value in row))
    return table


def _shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(1, width - 3)] + "..."
