"""Optimizers, learning-rate schedules and parameter groups. Importing the configs does not import jax."""

from llmlab.optim.config import Group, Optimizer
from llmlab.optim.optimizers import LAMB, SGD, Adafactor, Adam, AdamW, Lion, Momentum, Muon, Nesterov
from llmlab.optim.schedules import (
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseSquareRoot,
    Linear,
    MultiStep,
    Schedule,
    WarmupStableDecay,
)

__all__ = [
    "LAMB",
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Exponential",
    "Group",
    "InverseSquareRoot",
    "Linear",
    "Lion",
    "Momentum",
    "MultiStep",
    "Muon",
    "Nesterov",
    "Optimizer",
    "Schedule",
    "WarmupStableDecay",
]
