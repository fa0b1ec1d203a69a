"""What a study has to say, for people: a page, Markdown, a LaTeX table and figures, all from its results.json.

    results.json -> schema.py, *_results.py      checked whole, or refused with the names of what is wrong
                 -> numbers.py, words.py         as many decimals as are known; sentences
                 -> *_page.py                    one self-contained HTML page, on markup.py, page.py and charts.py
                 -> *_text.py, *_figures.py      Markdown and LaTeX; PNG by matplotlib

Nothing is computed here that decides anything: verdicts, intervals and p-values are read. A kind of study has a module
with `write(folder)`.
"""

from pathlib import Path


def write(folder: Path) -> list[Path]:
    """Writes the report of the study in this folder, whatever its kind, and returns the files.

    Raises:
        FileNotFoundError: there are no results.
        ValueError: they are damaged or of an unknown kind; nothing is written then.
    """
    from llmlab.study.report import ablation, sweep
    from llmlab.study.report.schema import kind_of

    writers = {"ablation": ablation.write, "sweep": sweep.write}
    return writers[kind_of(folder, writers)](folder)
