"""What can be trained on the memory there is, for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmlab.display.numbers import count
from llmlab.display.plan import gib

_STATE = ("parameters", "optimizer", "gradients")
_STEP = ("copy", "activations", "layer", "logits")
_NOTE = (
    "parameters, optimizer and gradients are exact; copy: parameters in the type of the arithmetic; activations: what "
    "jax keeps for one microbatch; layer: one layer's backward pass; logits: a chunk of scores. Within a factor of 2 "
    "of what a compiler needs, mostly less."
)


def render(
    size: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    command: str | None,
    *,
    fits: int,
    tried: int,
) -> RenderableType:
    """A headline, the least that each optimizer needs, the best choices, and the command to use."""
    devices = f"{size['devices']} device{'s' if size['devices'] > 1 else ''} of {gib(size['memory'])}"
    head = Text.assemble(
        (f"{count(size['parameters'])} parameters", "bold"), f" on {devices}, of which {size['usable']:.0%} are used: ",
        (f"{fits} of {tried} choices fit", "bold green" if fits else "bold red"),
    )  # fmt: skip
    parts: list[RenderableType] = [head, Text()]
    parts += [Text("the least that each optimizer needs, of a device", style="bold"), _table(states, size["memory"])]
    title = "what fits, fastest first" if fits else "what comes nearest"
    parts += [Text(), Text(title, style="bold"), _table(rows, size["memory"])]
    if command is not None:
        own = rows[0]["own"]
        swap = "" if own else f"  (with optimizer={rows[0]['optimizer']}(...) in the file)"
        parts += [Text(), Text.assemble(("use  ", "bold"), (command, "cyan"), swap)]
    else:
        short = rows[0]["memory"]["total"] / size["memory"]
        needed = (
            f"nothing fits: the least is {short:.1f} times the memory; more devices (--devices), fewer tokens a row"
        )
        parts += [Text(), Text(f"{needed}, or a smaller model", style="red")]
    return Group(*parts, Text(_NOTE, style="dim"))


def _table(rows: Sequence[Mapping[str, Any]], memory: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("optimizer", "precision", "remat"):
        table.add_column(name, no_wrap=True)
    table.add_column("microbatches", justify="right")
    if any(row["mesh"] for row in rows):
        table.add_column("mesh", no_wrap=True, style="cyan")
    for name in (*_STATE, *_STEP, "total"):
        table.add_column(name, justify="right", no_wrap=True, style="bold" if name == "total" else "")
    for row in rows:
        cells = [row["optimizer"], row["precision"], row["remat"], str(row["accumulation"])]
        if any(other["mesh"] for other in rows):
            cells.append(" ".join(f"{axis}={size}" for axis, size in row["mesh"].items()))
        sizes = [f"{row['memory'][name] / 2**30:.2f}" for name in (*_STATE, *_STEP)]
        total = row["memory"]["total"]
        table.add_row(*cells, *sizes, f"{gib(total)} {total / memory:4.0%}")
    return table
