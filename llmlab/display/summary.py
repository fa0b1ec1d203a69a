"""The last thing a run shows: how good the model is, against what, a sample of its writing, and what to do next."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from llmlab.display.numbers import count, duration, nats
from llmlab.training.throughput import readable_flops

MAX_SAMPLE_LINES = 16


@dataclass(frozen=True, kw_only=True)
class Closing:
    """What the closing summary says about a run besides its numbers."""

    title: str
    """Name of the run."""
    run: Path | None = None
    """The run directory."""
    experiment: Path | None = None
    """The experiment file."""
    flags: tuple[str, ...] = ()
    """The experiment's values that were changed on the command line."""
    steps: int | None = None
    """Steps of the experiment, to suggest more."""
    peak_lr: float | None = None
    """Peak learning rate, to suggest another."""

    def render(self, summary: Mapping[str, Any], options: ConsoleOptions) -> RenderableType:
        """The panel. Keys of `summary` that are shown where present:

        `step`, `tokens`, `num_parameters`, `seconds` (phase -> seconds), `validation/loss`, `validation/perplexity`,
        `validation/bits_per_byte`, other means named `validation/...accuracy`, `unit` (what losses are per, "token"),
        `baselines` (name -> nats per unit), `tokens_per_second`, `model_flops_per_second`, `mfu`, `mfu_convention`, and
        `sample` ({"prompt", "text"}).
        """
        width = min(options.max_width, 110)
        inner = width - 6
        parts: list[RenderableType] = [_size(summary)]
        parts += _section(_comparison(summary, inner, ascii_only=options.ascii_only))
        parts += _section(_quality(summary))
        parts += _section(_speed(summary))
        parts += _section(_sample(summary, options.ascii_only))
        frame = box.ASCII if options.ascii_only else box.ROUNDED
        title = Text(self.title, style="bold", overflow="ellipsis")
        panel = Panel(
            Group(*parts),
            title=title,
            title_align="left",
            border_style="green",
            box=frame,
            padding=(1, 2) if width >= 60 else (0, 1),
            width=width,
        )
        return Group(panel, *self._next(writes="sample" in summary))

    def _next(self, *, writes: bool) -> list[RenderableType]:
        """The run and commands to copy, `generate` where the model writes: outside the frame, never broken by us."""
        if self.run is None:
            return []
        run = shlex.quote(str(self.run))
        commands = [("write", f'llmlab generate {run} --prompt "..."')] if writes else []
        commands.append(("draw", f"llmlab plot {run}"))
        if self.experiment is not None:
            if self.peak_lr is not None:
                commands.append(("change", self._train("--optimizer.peak-lr", f"{self.peak_lr / 2:g}")))
            if self.steps is not None:
                longer = self._train("--train.steps", str(2 * self.steps))
                commands.append(("longer", f"{longer} --out {run} --allow-config-change"))
        commands.append(("compare", f"llmlab runs {shlex.quote(str(self.run.parent))}"))
        lines = [("run", str(self.run), "bold"), *((why, command, "cyan") for why, command in commands)]
        return [
            Text.assemble((f"  {why:<9}", "dim"), (text, style), no_wrap=True, overflow="ignore")
            for why, text, style in lines
        ]

    def _train(self, name: str, value: str) -> str:
        """The command that made this run, with another value."""
        return shlex.join(["llmlab", "train", str(self.experiment), *without(self.flags, name), name, value])


def without(flags: Sequence[str], name: str) -> list[str]:
    """The flags less one and its value: "--train.steps 5", "--train.steps=5"."""
    kept: list[str] = []
    skip = False
    for flag in flags:
        same = flag.partition("=")[0].replace("_", "-") == name
        if not skip and not same:
            kept.append(flag)
        skip = same and "=" not in flag
    return kept


def _section(part: RenderableType | None) -> list[RenderableType]:
    return [] if part is None else [Padding(part, (1, 0, 0, 0))]


def _size(summary: Mapping[str, Any]) -> Text:
    parts = []
    if (step := summary.get("step")) is not None:
        parts.append(f"{step:,} steps")
    if (tokens := summary.get("tokens")) is not None:
        parts.append(f"{count(tokens)} tokens")
    if (parameters := summary.get("num_parameters")) is not None:
        parts.append(f"{count(parameters)} parameters")
    text = Text(", ".join(parts) or "finished", style="bold")
    seconds = {phase: value for phase, value in summary.get("seconds", {}).items() if phase != "total"}
    if seconds:
        phases = ", ".join(f"{phase} {duration(value)}" for phase, value in seconds.items() if value >= 0.05)
        total = summary["seconds"].get("total", math.fsum(seconds.values()))
        text.append(f" in {duration(total)}").append(f"  {phases}", style="dim not bold")
    return text


def _comparison(summary: Mapping[str, Any], width: int, *, ascii_only: bool) -> RenderableType | None:
    """Bars of the losses: what is known without a model, and what the model knows."""
    loss = summary.get("validation/loss")
    if loss is None:
        return None
    baselines: Mapping[str, float] = summary.get("baselines", {})
    rows = [*sorted(baselines.items(), key=lambda row: -row[1]), ("this model", loss)]
    widest = max(len(name) for name, _ in rows)
    longest = max((value for _, value in rows if math.isfinite(value)), default=1.0)
    room = max(8, width - widest - 13)
    unit = summary.get("unit", "token")
    lines = [Text.assemble(("validation loss", "bold"), (f"  nats per {unit}; lower is better", "dim"))]
    for name, value in rows:
        ours = name == "this model"
        share = max(0.0, value / longest) if math.isfinite(value) else 1.0
        best = value <= min(baselines.values(), default=value)
        style = ("green" if best else "yellow") if ours else "bright_black"
        lines.append(
            Text.assemble(
                (name.ljust(widest), "bold" if ours else ""),
                (f" {nats(value):>8}  ", "bold green" if ours else ""),
                (_bar(share * room, ascii_only), style),
            )
        )
    if baselines and math.isfinite(loss):
        name, lowest = min(baselines.items(), key=lambda row: row[1])
        gap = lowest - loss
        verdict = f"{gap:.2f} nats below the {name}" if gap > 0 else f"{-gap:.2f} nats above the {name}"
        lines.append(
            Text(" " * min(widest + 11, width - len(verdict)) + verdict, style="green" if gap > 0 else "yellow")
        )
    return Group(*lines)


def _bar(length: float, ascii_only: bool) -> str:
    """A bar this many characters long, to an eighth of one."""
    if ascii_only:
        return "#" * max(1, round(length))
    eighths = max(1, round(length * 8))
    return "█" * (eighths // 8) + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths % 8]


def _quality(summary: Mapping[str, Any]) -> Text | None:
    """Perplexity and bits per byte, where they make sense, and accuracies."""
    parts: list[Text] = []
    if (perplexity := summary.get("validation/perplexity")) is not None:
        per = f" per {summary.get('unit', 'token')}"
        parts.append(Text.assemble(("perplexity ", "dim"), (f"{perplexity:.2f}", "bold"), (per, "dim")))
    if (bits := summary.get("validation/bits_per_byte")) is not None:
        parts.append(Text.assemble(("bits per byte ", "dim"), (f"{bits:.3f}", "bold")))
    for name, value in summary.items():
        if name.startswith("validation/") and name.endswith("accuracy"):
            what = name.removeprefix("validation/").replace("_", " ")
            parts.append(Text.assemble((f"{what} ", "dim"), (f"{value:.1%}", "bold")))
    return Text("    ").join(parts) if parts else None


def _speed(summary: Mapping[str, Any]) -> Text | None:
    speed = summary.get("tokens_per_second")
    if speed is None:
        return None
    text = Text.assemble((f"{speed:,.0f}", "bold"), (" tokens/s", "dim"))
    if (flops := summary.get("model_flops_per_second")) is not None:
        text.append("    ").append(readable_flops(flops), style="bold")
    if (mfu := summary.get("mfu")) is not None:
        text.append("    ").append("MFU ", style="dim").append(f"{mfu:.1%}", style="bold")
    if (convention := summary.get("mfu_convention")) is not None:
        text.append(f"\n{convention}", style="dim")
    return text


def _sample(summary: Mapping[str, Any], ascii_only: bool) -> RenderableType | None:
    sample = summary.get("sample")
    if not sample:
        return None
    prompt, text = harmless(sample.get("prompt", "")), harmless(sample["text"])
    if not prompt.strip():  # a text from nothing, or from a line break
        prompt, text = "", text.lstrip("\n")
    written = Text.assemble((prompt, "bold"), text, no_wrap=True, overflow="ellipsis")
    lines = list(written.split("\n"))
    if len(lines) > MAX_SAMPLE_LINES:
        lines = [*lines[:MAX_SAMPLE_LINES], Text("..." if ascii_only else "…", style="dim")]
    edge = "| " if ascii_only else "▏ "
    table = Table.grid(padding=0)
    table.add_column(width=2)
    table.add_column(no_wrap=True, overflow="ellipsis")
    for line in lines:
        table.add_row(Text(edge, style="green"), line)
    title = Text.assemble(("sample", "bold"), ("  prompt in bold", "dim") if prompt else "")
    return Group(title, table)


def harmless(text: str) -> str:
    """The text without control characters, which could move the cursor or change colours; tabs become four blanks."""
    shown = text.replace("\r\n", "\n").expandtabs(4)
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
