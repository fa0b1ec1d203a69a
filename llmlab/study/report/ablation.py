"""The report of an ablation: results.json in, a page, Markdown, a LaTeX table and figures out.

Everything is made from results.json and nothing else, so a report can be made again years later, and a reader of one
can check it against the other.
"""

from pathlib import Path

from llmlab.study.report import ablation_figures, ablation_page, ablation_text
from llmlab.study.report.ablation_results import read
from llmlab.study.report.files import written


def write(folder: Path) -> list[Path]:
    """Writes report.html, report.md, table.tex, curves.png, effects.png and, for a factorial, interaction.png.

    Args:
        folder: of the study; has its results.json.

    Returns:
        what was written. A figure without data (no arm has a curve) is not.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged; the message names the file and the keys. Nothing is written then.
    """
    results = read(folder)
    figures = ablation_figures.draw(results, folder)
    texts = {
        "report.html": ablation_page.render(results),
        "report.md": ablation_text.markdown(results, [path.name for path in figures]),
        "table.tex": ablation_text.latex(results),
    }
    return written(folder, texts, figures)
