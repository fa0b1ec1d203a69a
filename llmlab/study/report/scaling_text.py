"""A scaling study's results as Markdown."""

from collections.abc import Sequence
from typing import Any

from llmlab.study.report import markdown as md
from llmlab.study.report import scaling_words as said
from llmlab.study.report import words
from llmlab.study.report.page import plain

_IMAGES = {
    "isoflop.png": "IsoFLOP profiles",
    "contours.png": "Lines of equal loss of the fitted law",
    "frontier.png": "Compute-optimal parameters and tokens",
    "held_out.png": "Held-out check",
}


def markdown(results: dict[str, Any], figures: Sequence[str]) -> str:
    """The report as GitHub renders it; `figures` are the names of images beside it."""
    parts = [
        f"# {md.escape(results['question'])}",
        md.escape("".join(said.answer(results))),
        f"Scaling study {md.escape(results['name'])}; {md.escape(words.metric(results))}.",
        *(f"![{title}]({name})" for name, title in _IMAGES.items() if name in figures),
        _part("The law", said.law_table(results)) if results["law"] else None,
        _part("Compute-optimal frontier", said.frontier_table(results)) if results["frontier"] else None,
        _part("Held-out check", said.held_out_table(results)) if results["held_out"] else None,
        _part("Runs", said.runs_table(results)),
        "## Conventions\n\n" + "\n".join(f"- {md.escape(text)}." for text in said.conventions(results)),
        listed_problems(results),
        "## Reproduce",
        md.block(results["command"]),
        f"Study file {md.code(results['file'])}, {md.escape(results['date'])}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def listed_problems(results: dict[str, Any]) -> str | None:
    """What is wrong with the runs; None where nothing is."""
    if not results["problems"]:
        return None
    return "## Problems\n\n" + "\n".join(f"- {md.escape(plain(problem))}" for problem in results["problems"])


def _part(title: str, parts: said.Table) -> str:
    heads, rows = parts
    return f"## {title}\n\n" + md.table(heads, [[md.escape(str(cell)) for cell in row] for row in rows])
