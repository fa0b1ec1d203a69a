"""Data: where text comes from, and how it becomes batches.

    source -> documents -> split -> tokens on disk -> rows -> batch(step)

The configs below cost nothing to import; tokenizing, packing and reading are imported when a config is built.
"""

from llmlab.data.config import Data, Mixture, Packed, Weighted
from llmlab.data.json_lines import JSONLines
from llmlab.data.sources import Document, Skipped, Source, TextFiles
from llmlab.data.standard_library import StandardLibrary
from llmlab.data.tfds import TFDS

__all__ = [
    "TFDS",
    "Data",
    "Document",
    "JSONLines",
    "Mixture",
    "Packed",
    "Skipped",
    "Source",
    "StandardLibrary",
    "TextFiles",
    "Weighted",
]
