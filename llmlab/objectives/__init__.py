"""Losses as functions of arrays. They know no model, optimizer or mesh."""

from llmlab.objectives.base import Batch, LossParts, Objective
from llmlab.objectives.contrastive import ImageTextContrastive, SentenceContrastive
from llmlab.objectives.labels import Classification, QuestionAnswering, TokenClassification
from llmlab.objectives.tokens import (
    BlankInfilling,
    MaskedToken,
    MaskedTokenAndNextSentence,
    NextToken,
    Permutation,
    PrefixLM,
    SequenceToSequence,
)

__all__ = [
    "Batch",
    "BlankInfilling",
    "Classification",
    "ImageTextContrastive",
    "LossParts",
    "MaskedToken",
    "MaskedTokenAndNextSentence",
    "NextToken",
    "Objective",
    "Permutation",
    "PrefixLM",
    "QuestionAnswering",
    "SentenceContrastive",
    "SequenceToSequence",
    "TokenClassification",
]
