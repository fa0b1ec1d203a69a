"""A sweep's results as Markdown."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from llmlab.study.report import markdown as md
from llmlab.study.report import words
from llmlab.study.report.numbers import fixed, time
from llmlab.study.report.page import plain
from llmlab.study.report.sweep_axes import placed
from llmlab.study.report.sweep_page import IN_THE_FILE, NUM_BEST, metric_decimals, shown
from llmlab.study.report.sweep_results import ranked

_IMAGES = {
    "axes.png": "The metric against each axis",
    "importance.png": "Importance of the axes",
    "parallel.png": "Parallel coordinates of the trials",
    "curves.png": "Learning curves of the trials",
}


def markdown(results: dict[str, Any], figures: Sequence[str]) -> str:
    """The report as GitHub renders it; `figures` are the names of images beside it."""
    counts = Counter(trial["status"] for trial in results["trials"])
    statuses = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    parts = [
        f"# Sweep {md.escape(results['name'])}",
        _best(results),
        f"{len(results['trials'])} trials: {md.escape(statuses)}. {md.escape(words.metric(results))}; "
        f"{results['direction']} is better.",
        _table(results),
        *(f"![{title}]({name})" for name, title in _IMAGES.items() if name in figures),
        _importance(results),
        _failures(results),
        _problems(results),
        "## Reproduce",
        md.block(results["command"]),
        f"Study file {md.code(results['file'])}, {md.escape(results['date'])}. The page `report.html` has every trial.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _best(results: dict[str, Any]) -> str:
    best = results["best"]
    if best is None:
        return "**No trial has finished.**"
    command = md.block(best["command"]) if best["command"] else ""
    if best.get("told"):
        command += f"\n\n{IN_THE_FILE} {'; '.join(map(md.escape, best['told']))}."
    value = md.escape(fixed(best["value"], metric_decimals(results)))
    point = ", ".join(f"{md.code(path)} = {md.code(shown(setting))}" for path, setting in best["point"].items())
    return f"**Best: {value}** (trial {best['number']}), with {point}.\n\n{command}"


def _table(results: dict[str, Any]) -> str | None:
    valued = ranked(results)[:NUM_BEST]
    if not valued:
        return None
    axes, decimals = placed(results), metric_decimals(results)
    heads = [("Trial", False), (results["metric"], True), *((axis.path, axis.scale is not None) for axis in axes)]
    rows = [
        [
            str(trial["number"]),
            md.escape(fixed(trial["value"], decimals)),
            *(md.escape(shown(trial["point"][a.path])) if a.path in trial["point"] else "" for a in axes),
            md.escape(time(trial["seconds"])),
            md.code(trial["directory"]),
        ]
        for trial in valued
    ]
    return md.table([*heads, ("Time", True), ("Directory", False)], rows)


def _importance(results: dict[str, Any]) -> str | None:
    if not results["importance"]:
        return None
    order = sorted(results["importance"].items(), key=lambda item: -item[1])
    rows = [[md.code(path), md.escape(f"{100 * value:.3g}%")] for path, value in order]
    return f"## Importance\n\n{md.table([('Axis', False), ('Importance', True)], rows)}"


def _failures(results: dict[str, Any]) -> str | None:
    failed = [trial for trial in results["trials"] if trial["problem"]]
    if not failed:
        return None
    rows = [[str(trial["number"]), md.escape(trial["status"]), md.escape(trial["problem"])] for trial in failed]
    heads = [("Trial", False), ("Status", False), ("What happened", False)]
    return f"## Failed trials\n\n{md.table(heads, rows)}"


def _problems(results: dict[str, Any]) -> str | None:
    if not results["problems"]:
        return None
    return "## Problems\n\n" + "\n".join(f"- {md.escape(plain(problem))}" for problem in results["problems"])
