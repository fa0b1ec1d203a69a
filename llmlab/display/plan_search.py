"""What a search over meshes, remat policies and microbatches found, for people."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llmlab.display.plan import gib, milliseconds
from llmlab.plan.chips import Chip
from llmlab.plan.report import Plan
from llmlab.plan.search import Candidate


def render(rows: Sequence[tuple[Candidate, Plan | None, str]], chip: Chip, command: str | None) -> RenderableType:
    """All that was compiled, best first, and the command to use."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("mesh", no_wrap=True, style="bold")
    table.add_column("remat", no_wrap=True)
    for name in ("microbatches", "memory", "compute", "memory time", "interconnect", "step", "MFU"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("bound", no_wrap=True)
    for candidate, plan, problem in rows:
        label = f"{candidate.label} (as written)" if candidate.written else candidate.label
        first = (label, candidate.remat, str(candidate.accumulation))
        if plan is None:
            table.add_row(*first, "", "", "", "", "", "", Text(problem[:60], style="red"))
        elif plan.times is None or not plan.memory.fits:
            share = Text(f"{gib(plan.memory.total)} {plan.memory.total / plan.memory.capacity:4.0%}", style="red")
            table.add_row(*first, share, "", "", "", "", "", Text("does not fit", style="red"))
        else:
            times = plan.times
            network = times.interconnect + times.between_slices
            each = [milliseconds(value) for value in (times.compute, times.memory, network, times.seconds)]
            share = f"{gib(plan.memory.total)} {plan.memory.total / plan.memory.capacity:4.0%}"
            table.add_row(*first, share, *each, f"{times.mfu:.1%}", times.bound)
    note = (
        f"ranked by the roofline of {chip.name}: the longest of compute, memory and networks; MFU if everything "
        "overlaps perfectly"
    )
    use = Text("nothing that was compiled fits", style="red")
    if command is not None:
        use = Text.assemble(("use  ", "bold"), (command, "cyan"))
    return Group(table, Text(), use, Text(note, style="dim"))
