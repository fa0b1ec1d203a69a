"""A plan for people: memory as a bar, FLOPs, collectives by mesh axis, the roofline, and what to mind."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmlab.display.numbers import count
from llmlab.plan.chips import Chip
from llmlab.plan.report import Memory, Plan, Times

GIB = 2**30
_BAR = 60

# Part of memory, its character in the bar (blocks, or ASCII), its colour.
_PARTS = (
    ("parameters", "█", "p", "cyan"),
    ("optimizer", "▓", "o", "blue"),
    ("other state", "▒", "s", "magenta"),
    ("batch", "▒", "b", "green"),
    ("padding", "░", "x", "white"),
    ("temporaries", "▒", "t", "yellow"),
    ("program", "░", "c", "white"),
)


def render(plan: Plan, chip: Chip, *, ascii_only: bool = False, title: str = "") -> RenderableType:
    """Everything, from top to bottom."""
    mesh = " x ".join(f"{name}={size}" for name, size in plan.mesh.items()) or "one device"
    head = Text.assemble(
        (f"{title}  " if title else "", "bold"),
        f"{count(plan.num_parameters)} parameters, {count(plan.tokens)} tokens a step, on ",
        (f"{plan.num_chips} x {chip.name}", "bold"),
        f" ({plan.topology}{_slices(plan)}; mesh {mesh})",
    )
    parts: list[RenderableType] = [head, Text(), memory(plan.memory, ascii_only=ascii_only)]
    if plan.flops is not None and plan.times is not None:
        parts += [Text(), _flops(plan)]
        parts += [Text(), _collectives(plan)]
        parts += [Text(), *_roofline(plan, plan.times, chip, ascii_only)]
    if plan.warnings:
        parts += [Text(), *_warnings(plan.warnings)]
    return Group(*parts)


def memory(held: Memory, *, ascii_only: bool = False) -> RenderableType:
    """Bytes of a chip by what they are for, and a bar of its memory."""
    sizes = (
        held.parameters, held.optimizer, held.other, held.batch, held.padding, held.temporaries, held.program
    )  # fmt: skip
    shown = [(part, size) for part, size in zip(_PARTS, sizes, strict=True) if size]
    if held.needed is not None:
        rest = max(0, held.needed - held.arguments)
        shown.append((("temporaries", "▒", "t", "yellow"), rest))
    share = held.total / held.capacity
    verdict = (f"fits, {max(0.0, 1 - share):.0%} free", "green") if held.fits else ("does not fit", "bold red")
    line = Text.assemble(
        ("memory of a chip  ", "bold"),
        f"{gib(held.total)} of {gib(held.capacity)}  ",
        verdict,
        f": needs {share:.2f} times what there is" if not held.fits else "",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("key", no_wrap=True)
    table.add_column("name")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    for (name, block, letter, style), size in shown:
        table.add_row(
            Text(letter if ascii_only else block, style=style), name, gib(size), f"{size / held.capacity:.1%}"
        )
    return Group(line, bar(shown, held.capacity, ascii_only=ascii_only), table)


def bar(shown: Sequence[tuple[tuple[str, str, str, str], int]], capacity: int, *, ascii_only: bool = False) -> Text:
    """Parts of memory side by side; what is beyond the capacity stands behind a mark."""
    text, filled, exact = Text("["), 0, 0.0
    end = False
    for (_, block, letter, style), size in shown:
        exact += size / capacity * _BAR
        for _ in range(min(round(exact), int(1.5 * _BAR)) - filled):
            if filled == _BAR:
                text.append("|" if ascii_only else "┃", style="bold red")
                end = True
            text.append(letter if ascii_only else block, style=style)
            filled += 1
    text.append(("." if ascii_only else "·") * (_BAR - filled), style="dim")
    text.append("" if end else "]")
    return text


def gib(size: float) -> str:
    """Bytes for people: "12.3 GiB", "870 MiB"."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 1024:.1f} KiB" if size >= 1024 else f"{size:.0f} B"


def large(flops: float) -> str:
    """FLOPs for people: "48.3 PFLOP"."""
    unit, name = next(
        (pair for pair in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")) if flops >= pair[0]), (1e6, "M")
    )
    return f"{flops / unit:.4g} {name}FLOP"


def _slices(plan: Plan) -> str:
    chips = 1
    for size in plan.topology.partition(":")[2].split("x"):
        chips *= int(size)
    return f", {plan.num_chips // chips} slices" if plan.num_chips > chips else ""


def _flops(plan: Plan) -> RenderableType:
    flops = plan.flops
    assert flops is not None
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("what")
    table.add_row("model FLOPs", large(flops.model), "a step: 2 for each multiply-add, every key counted, 3 x forward")
    kernels = f", {flops.kernels / flops.compiled:.0%} in kernels" if flops.kernels else ""
    table.add_row("compiled FLOPs", large(flops.compiled), f"matrix products x loop trips{kernels}")
    what = "what rematerialisation, attention's backward kernels and the optimizer's products add"
    table.add_row("ratio", f"{flops.ratio:.3f}", what)
    return table


def _collectives(plan: Plan) -> RenderableType:
    if not plan.traffic:
        return Text("no collectives: nothing travels between chips")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("collective", style="bold", no_wrap=True)
    table.add_column("mesh axes", style="cyan", no_wrap=True)
    table.add_column("runs", justify="right", no_wrap=True)
    table.add_column("leaves a chip", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("network", no_wrap=True)
    for row in plan.traffic:
        network = Text("between slices", style="yellow") if row.crosses_slices else Text("in a slice", style="dim")
        cells = (row.kind, " + ".join(row.axes), f"{row.count:,}", gib(row.sent), milliseconds(row.seconds), network)
        table.add_row(*cells)
    if len(plan.traffic) > 1:
        sent, taken = sum(row.sent for row in plan.traffic), sum(row.seconds for row in plan.traffic)
        table.add_row("all", "", "", gib(sent), milliseconds(taken), "", style="dim")
    return table


def _roofline(plan: Plan, times: Times, chip: Chip, ascii_only: bool) -> list[RenderableType]:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("bar", no_wrap=True)
    table.add_column("formula", style="dim")
    links = f"links x {chip.link_bandwidth / 1e9:.0f} GB/s, 2 links in a ring's dimension and 1 in a line's"
    formulas = {
        "compute": f"compiled FLOPs / chips / {chip.peak_flops / 1e12:.0f} TFLOP/s",
        "memory": f"bytes moved / {chip.memory_bandwidth / 1e9:,.0f} GB/s",
        "interconnect": f"bytes that leave a chip / ({links})",
        "between slices": f"bytes that leave a slice's chip / {chip.slow_bandwidth / 1e9:.2f} GB/s",
    }
    for name, seconds in times.parts.items():
        if name == "between slices" and not seconds:
            continue
        length = round(20 * seconds / times.seconds)
        style = "bold yellow" if name == times.bound else ""
        drawn = Text(("#" if ascii_only else "━") * length, style=style)
        table.add_row(Text(name, style=style), milliseconds(seconds), drawn, formulas[name])
    tokens = plan.tokens / times.seconds / plan.num_chips
    verdict = Text.assemble(
        ("bound by ", ""),
        (times.bound, "bold yellow"),
        f": at best {milliseconds(times.seconds)} a step, {count(tokens)} tokens/s a chip, ",
        (f"MFU {times.mfu:.1%}", "bold"),
        f" if everything overlaps, {times.mfu_without_overlap:.1%} if nothing does",
    )
    note = (
        "bytes that leave a chip, of an array of B bytes and n chips: all-gather and reduce-scatter (n-1)/n B, "
        "all-reduce 2(n-1)/n B, all-to-all (n-1)/n B, permute B"
    )
    return [table, verdict, Text(note, style="dim")]


def _warnings(warnings: Sequence[str]) -> list[RenderableType]:
    lines: list[RenderableType] = []
    for warning in warnings:
        lines.append(Text.assemble(("warning: ", "bold yellow"), warning))
    return lines


def milliseconds(seconds: float) -> str:
    """A short time: "12.3 ms", "1.20 s"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    value = 1e3 * seconds
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms" if value >= 1e-3 else "0 ms"
