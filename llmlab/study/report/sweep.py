"""The report of a sweep: results.json in, a page, Markdown and figures out."""

from pathlib import Path

from llmlab.study.report import sweep_figures, sweep_page, sweep_text
from llmlab.study.report.files import written
from llmlab.study.report.sweep_results import read


def write(folder: Path) -> list[Path]:
    """Writes report.html, report.md and, where there is something to draw, axes.png, parallel.png, importance.png and
    curves.png.

    Args:
        folder: of the sweep; has its results.json.

    Returns:
        what was written.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged; the message names the file and the keys. Nothing is written then.
    """
    results = read(folder)
    figures = sweep_figures.draw(results, folder)
    texts = {
        "report.html": sweep_page.render(results),
        "report.md": sweep_text.markdown(results, [path.name for path in figures]),
    }
    return written(folder, texts, figures)
