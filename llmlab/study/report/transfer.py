"""The report of a transfer study: results.json in, a page, Markdown and figures out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmlab.study.report import markdown as md
from llmlab.study.report import transfer_figures, transfer_page, words
from llmlab.study.report import transfer_words as said
from llmlab.study.report.files import written
from llmlab.study.report.scaling_text import listed_problems
from llmlab.study.report.transfer_results import read

_IMAGES = {"transfer.png": "Loss against learning rate for each width", "coordinates.png": "Coordinate check"}


def write(folder: Path) -> list[Path]:
    """Writes report.html, report.md, transfer.png and, where it was checked, coordinates.png.

    Args:
        folder: of the study; has its results.json.

    Returns:
        what was written.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged; the message names the file and the keys. Nothing is written then.
    """
    results = read(folder)
    figures = transfer_figures.draw(results, folder)
    texts = {
        "report.html": transfer_page.render(results),
        "report.md": markdown(results, [path.name for path in figures]),
    }
    return written(folder, texts, figures)


def markdown(results: dict[str, Any], figures: Sequence[str]) -> str:
    """The report as GitHub renders it; `figures` are the names of images beside it."""
    tables = [("Best learning rates", said.best_table(results)), ("Losses", said.loss_table(results))]
    if any(arm["coordinates"] for arm in results["arms"]):
        tables.append(("Coordinate check: slopes of log change against log width", said.slope_table(results)))
    parts = [
        f"# {md.escape(results['question'])}",
        *(md.escape(text) for text in said.answer(results)),
        f"Transfer study {md.escape(results['name'])}; {md.escape(words.metric(results))}.",
        *(f"![{title}]({name})" for name, title in _IMAGES.items() if name in figures),
        *(
            f"## {title}\n\n" + md.table(heads, [[md.escape(str(cell)) for cell in row] for row in rows])
            for title, (heads, rows) in tables
        ),
        listed_problems(results),
        "## Reproduce",
        md.block(results["command"]),
        f"Study file {md.code(results['file'])}, {md.escape(results['date'])}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
