"""Data: where rows come from, and how they become batches.

    source -> documents -> split -> tokens on disk -> rows (-> corruption) -> batch(step)

Importing this package costs nothing: tokenizing, packing and reading are imported when a config is built, and the names
that need numpy when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from llmlab.data.config import Data, Mixture, Packed, Weighted
from llmlab.data.corruption import Corruption
from llmlab.data.json_lines import JSONLines
from llmlab.data.sources import Document, Skipped, Source, TextFiles
from llmlab.data.standard_library import INDENTATION, StandardLibrary
from llmlab.data.tfds import TFDS

if TYPE_CHECKING:
    from llmlab.data.blanks import Blanks as Blanks
    from llmlab.data.denoising import Denoising as Denoising
    from llmlab.data.docstrings import Docstrings as Docstrings
    from llmlab.data.factorization import FactorizationOrder as FactorizationOrder
    from llmlab.data.images import Digits as Digits
    from llmlab.data.images import Images as Images
    from llmlab.data.labelled import LabelledTexts as LabelledTexts
    from llmlab.data.labelled import LabelledWords as LabelledWords
    from llmlab.data.masking import SpanMasking as SpanMasking
    from llmlab.data.masking import TokenMasking as TokenMasking
    from llmlab.data.pairs import Pairs as Pairs
    from llmlab.data.prefixes import RandomPrefix as RandomPrefix
    from llmlab.data.questions import Questions as Questions
    from llmlab.data.sentence_pairs import NextSentence as NextSentence
    from llmlab.data.sentence_pairs import SentenceOrder as SentenceOrder
    from llmlab.data.sentences import Sentences as Sentences
    from llmlab.data.span_corruption import SpanCorruption as SpanCorruption
    from llmlab.data.span_corruption import sentinels as sentinels

# Public name -> the module that defines it.
_EXPORTS = {
    "Sentences": "llmlab.data.sentences",
    "Questions": "llmlab.data.questions",
    "Pairs": "llmlab.data.pairs",
    "LabelledWords": "llmlab.data.labelled",
    "LabelledTexts": "llmlab.data.labelled",
    "Images": "llmlab.data.images",
    "Digits": "llmlab.data.images",
    "Blanks": "llmlab.data.blanks",
    "Denoising": "llmlab.data.denoising",
    "Docstrings": "llmlab.data.docstrings",
    "FactorizationOrder": "llmlab.data.factorization",
    "NextSentence": "llmlab.data.sentence_pairs",
    "RandomPrefix": "llmlab.data.prefixes",
    "SentenceOrder": "llmlab.data.sentence_pairs",
    "SpanCorruption": "llmlab.data.span_corruption",
    "SpanMasking": "llmlab.data.masking",
    "TokenMasking": "llmlab.data.masking",
    "sentinels": "llmlab.data.span_corruption",
}

__all__ = [
    "INDENTATION",
    "TFDS",
    "Blanks",
    "Corruption",
    "Data",
    "Denoising",
    "Digits",
    "Docstrings",
    "Document",
    "FactorizationOrder",
    "Images",
    "JSONLines",
    "LabelledTexts",
    "LabelledWords",
    "Mixture",
    "NextSentence",
    "Packed",
    "Pairs",
    "Questions",
    "RandomPrefix",
    "SentenceOrder",
    "Sentences",
    "Skipped",
    "Source",
    "SpanCorruption",
    "SpanMasking",
    "StandardLibrary",
    "TextFiles",
    "TokenMasking",
    "Weighted",
    "sentinels",
]


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'llmlab.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
