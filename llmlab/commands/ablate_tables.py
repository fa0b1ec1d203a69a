"""What `llmlab ablate` prints: the plan of a study before it runs, and its answer at the end."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmlab.display.numbers import count, duration

if TYPE_CHECKING:
    from llmlab.study.ablation import Ablation
    from llmlab.study.planning import Plan

_STYLES = {"supported": "bold green", "refuted": "bold red", "inconclusive": "bold yellow", "withheld": "bold red"}
_FILES = {"report": "report.html", "text": "report.md", "LaTeX": "table.tex", "data": "results.json"}
_SHOWN = 6  # differences to the nearest run


def _console() -> Console:
    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 160  # in a pipe lines are not cut to a terminal's width
    return console


def _table() -> Table:
    return Table(box=None, padding=(0, 2, 0, 0), header_style="dim")


# --- plan ------------------------------------------------------------------------------------------------------------


def print_plan(plan: "Plan", ablation: "Ablation", root: Path) -> None:
    """The dry run."""
    from llmlab.study.changes import shown

    console = _console()
    console.print(Text(ablation.hypothesis, style="bold"))
    console.print(_question(ablation))
    console.print()
    table = _table()
    for name in ("arm", "changes"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "tokens a run", "FLOPs a run"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in plan.arms:
        changes = [f"{path}: {shown(old)} → {shown(new)}" for path, old, new in arm.changes]
        amounts = [plan.amounts[arm.name].get(name) for name in ("parameters", "tokens", "flops")]
        table.add_row(Text(arm.name, style="bold"), Text("\n".join(changes) or "-"), *map(_count, amounts))
    console.print(table)
    console.print()
    console.print(Text(_runs(plan, ablation, root)))
    for near in plan.nearest:
        _print_nearest(console, near, root)
    for remark in plan.remarks:
        console.print(Text(remark, style="yellow"))
    for mismatch in plan.mismatches:
        console.print(Text(f"{mismatch}: {ablation.acknowledge_mismatch or 'not acknowledged'}", style="yellow"))


def _question(ablation: "Ablation") -> Text:
    margin = f" by more than {ablation.margin:g}" if ablation.margin else ""
    claims = {"no worse": f"no worse{margin}", "equal": f"equal within {ablation.margin:g}"}
    claim = claims.get(ablation.claim, f"{ablation.claim}{margin}")
    return Text(f"claim: {claim}, in {ablation.metric} ({ablation.direction} is better), at equal {ablation.match}")


def _runs(plan: "Plan", ablation: "Ablation", root: Path) -> str:
    todo, seeds = plan.to_do, len(ablation.first_seeds)
    there = len(plan.runs) - len(todo)
    shape = f"{len(plan.arms)} arms x {seeds} seeds"
    if ablation.sequential:
        shape += f" to begin with, at most {plan.most_seeds}"
    if ablation.learning_rates:
        shape += f", after {len(ablation.learning_rates)} learning rates x {ablation.tuning_seeds} seeds an arm"
    lines = [f"{shape}: {len(plan.runs)} runs, {there} of them in {root} already, {len(todo)} to do"]
    partly = [run for run in todo if run.status == "unfinished"]
    if partly:
        lines.append(f"{len(partly)} were cut short and go on: {', '.join(run.label for run in partly[:4])}")
    if todo:
        tokens, estimate = plan.tokens(todo), plan.estimate
        lines.append(f"tokens to do: {'unknown' if tokens is None else count(tokens)}")
        seconds = "" if estimate.seconds is None else f"{duration(estimate.seconds)} in one worker, "
        lines.append(f"time: {seconds}{estimate.source}")
    return "\n".join(lines)


def _print_nearest(console: Console, near: Any, root: Path) -> None:
    from llmlab.study.changes import shown

    differences = [entry for entry in near.differences if entry[0] != "train.seed"]
    if not differences:  # another seed of a run that there is needs no explanation
        return
    if len(differences) > _SHOWN:
        where = f"differs in {len(differences)} places"
        console.print(Text(f"{near.label} is new: the nearest run, {root / near.hash}, {where}"))
        return
    console.print(Text(f"{near.label} is new: the nearest run, {root / near.hash}, has"))
    for path, there, here in differences:
        console.print(Text(f"    {path}: {_value(there, shown)}, here {_value(here, shown)}"))


def _value(value: Any, shown: Any) -> str:
    """A value from a config's JSON: a component by its class."""
    if isinstance(value, dict):
        return str(value.get("class", "{...}")).rpartition(".")[2]
    return "absent" if value is None else shown(value)


def _count(value: float | None) -> Text:
    return Text("unknown", style="dim") if value is None else Text(count(value))


# --- results ---------------------------------------------------------------------------------------------------------


def print_results(results: Mapping[str, Any], folder: Path) -> None:
    """The answer, the comparisons that it rests on, and where the report is."""
    console = _console()
    console.print()
    console.print(Text(results["hypothesis"], style="bold"))
    answer = "withheld" if results["withheld"] else results["verdict"]
    verdict = Text(answer, style=_STYLES[answer])
    if results["mode"] == "exploratory":
        verdict.append(" (exploratory)", style="bold yellow")
    console.print(verdict.append(f": {results['reason'].removeprefix('withheld: ')}", style="default"))
    console.print()
    console.print(_comparisons(results))
    console.print(Text(_legend(results), style="dim"))
    if len(results["comparisons"]) > 1 and not results["withheld"]:
        console.print()
        for row in results["comparisons"]:
            console.print(Text.assemble((row["arm"], "bold"), ": ", row["verdict"], ": ", row["reason"]))
    _print_effects(console, results)
    _print_remarks(console, results)
    console.print()
    for name, file in _FILES.items():
        if (folder / file).exists():
            console.print(Text(f"  {name:<8} {folder / file}"))


def _comparisons(results: Mapping[str, Any]) -> Table:
    level = 1 - results["alpha"]
    table = _table()
    table.add_column("arm", style="bold", overflow="fold")
    table.add_column("claim")
    table.add_column(results["metric"], justify="right", no_wrap=True)
    table.add_column("difference", justify="right", no_wrap=True)
    sequential = any(row["interval_method"] == "confidence sequence" for row in results["comparisons"])
    table.add_column(f"{level:.0%} {'' if sequential else 't '}interval", justify="right", no_wrap=True)
    table.add_column("p (Holm)", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    rows = {row["arm"]: row for row in results["comparisons"]}
    for arm in results["arms"]:
        mean = Text(_number(arm["mean"]))
        if arm["diverged"]:
            mean.append(f" ({len(arm['diverged'])} diverged)", style="bold red")
        row = rows.get(arm["name"])
        if row is None:
            table.add_row(arm["name"], "", mean, "", "", "", "")
            continue
        margin = f" by {row['margin']:g}" if row["margin"] else ""
        interval = _shown_interval(row)
        p = row["p_against_holm" if row["verdict"] == "refuted" else "p_holm"]
        table.add_row(
            arm["name"],
            row["claim"] + margin,
            mean,
            _number(row["difference"], sign=True),
            "-" if interval is None else f"[{_number(interval[0], sign=True)}, {_number(interval[1], sign=True)}]",
            "-" if p is None else f"{p:.2g}",
            Text("withheld") if results["withheld"] else Text(row["verdict"], style=_STYLES[row["verdict"]]),
        )
    return table


def _shown_interval(row: Mapping[str, Any]) -> list[float] | None:
    """Student's where the number of seeds was fixed, as the verdict's test is; of few pairs BCa's is too short."""
    return row["interval"] if row["interval_method"] == "confidence sequence" else row["t_interval"]


def _legend(results: Mapping[str, Any]) -> str:
    seeds, paired = len(results["seeds"]), len(results["paired_seeds"])
    pairs = f"{paired} pairs of runs" + ("" if paired == seeds else f" of {seeds}")
    methods = {row["interval_method"] for row in results["comparisons"]}
    sequential = "confidence sequence" in methods
    interval = "interval valid after every seed" if sequential else "Student's interval (BCa's is in the report)"
    if any(row["verdict"] == "refuted" for row in results["comparisons"]):
        interval += "; p of the claim, and of a refuted one against it"
    unit = f"{results['unit']}; " if results["unit"] else ""
    better = f"{results['direction']} is better"
    return f"{unit}difference = variant - baseline, {pairs}, {interval}; {better}"


def _print_effects(console: Console, results: Mapping[str, Any]) -> None:
    if results["factorial"] is None:
        return
    table = _table()
    table.add_column("effect", style="bold")
    for name in ("estimate", f"{1 - results['alpha']:.0%} interval", "p (Holm)"):
        table.add_column(name, justify="right", no_wrap=True)
    for effect in results["factorial"]["effects"]:
        low_high = effect["interval"]
        table.add_row(
            effect["term"],
            _number(effect["estimate"], sign=True),
            "-" if low_high is None else f"[{_number(low_high[0], sign=True)}, {_number(low_high[1], sign=True)}]",
            "-" if effect["p_holm"] is None else f"{effect['p_holm']:.2g}",
        )
    console.print()
    console.print(table)


def _print_remarks(console: Console, results: Mapping[str, Any]) -> None:
    lines = [(f"exploratory: {results['exploratory']}", "yellow")] if results["exploratory"] else []
    for m in results["mismatches"]:
        why = results["acknowledged"] or "not acknowledged, so there is no verdict"
        amounts = f"{m['variant']:,.6g} {m['quantity']}, the baseline {m['baseline']:,.6g} ({m['relative']:+.2%})"
        lines.append((f"{m['arm']} has {amounts}: {why}", "yellow"))
    lines += [
        (f"{p['arm']}/seed={p['seed']} has no result ({p['status']}): {p['problem']}", "red")
        for p in results["problems"]
    ]
    if results["problems"]:
        lines.append(("--retry-failed runs again what failed or is damaged", "red"))
    lines += [(remark, "yellow") for remark in results["remarks"]]
    if lines:
        console.print()
    for text, style in lines:
        console.print(Text(text, style=style))


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.4f}" if sign else f"{value:.4f}"
