"""Writing a report's texts beside its figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llmlab.training.directory import write_text


def written(folder: Path, texts: Mapping[str, str], figures: Sequence[Path]) -> list[Path]:
    """Writes texts by name, each whole or not at all; returns all files of the report, texts first."""
    for name, text in texts.items():
        write_text(folder / name, text)
    return [*(folder / name for name in texts), *figures]
