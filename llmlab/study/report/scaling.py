"""The report of a scaling study: results.json in, a page, Markdown and figures out."""

from pathlib import Path

from llmlab.study.report import scaling_figures, scaling_page, scaling_text
from llmlab.study.report.files import written
from llmlab.study.report.scaling_results import read


def write(folder: Path) -> list[Path]:
    """Writes report.html, report.md and, where there is something to draw, isoflop.png, frontier.png, contours.png and
    held_out.png.

    Args:
        folder: of the study; has its results.json.

    Returns:
        what was written.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged; the message names the file and the keys. Nothing is written then.
    """
    results = read(folder)
    figures = scaling_figures.draw(results, folder)
    texts = {
        "report.html": scaling_page.render(results),
        "report.md": scaling_text.markdown(results, [path.name for path in figures]),
    }
    return written(folder, texts, figures)
