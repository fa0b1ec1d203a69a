"""Losses as functions of arrays. They know no model, optimizer or mesh."""

from llmlab.objectives.base import Batch, LossParts, Objective
from llmlab.objectives.next_token import NextToken

__all__ = ["Batch", "LossParts", "NextToken", "Objective"]
