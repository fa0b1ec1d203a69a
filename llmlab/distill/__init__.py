"""Distillation: small models from large ones. `Distill` is the objective; the rest is what it is made of."""

from llmlab.distill.layers import Explicit, FirstLayers, LastLayers, LayerMap, Uniform
from llmlab.distill.objective import Distill
from llmlab.distill.on_policy import OnPolicy
from llmlab.distill.terms import (
    AttentionMaps,
    AttentionTransfer,
    CosineStates,
    Embeddings,
    FeatureMaps,
    Predictions,
    Relations,
    States,
    Term,
)
from llmlab.distill.texts import Beam, Greedy, Sampled, TeacherTexts
from llmlab.objectives.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation

__all__ = [
    "AttentionMaps",
    "AttentionTransfer",
    "Beam",
    "CosineStates",
    "Distill",
    "Embeddings",
    "Explicit",
    "FeatureMaps",
    "FirstLayers",
    "ForwardKL",
    "Greedy",
    "JensenShannon",
    "LastLayers",
    "LayerMap",
    "OnPolicy",
    "Predictions",
    "Relations",
    "ReverseKL",
    "Sampled",
    "States",
    "TeacherTexts",
    "Term",
    "TotalVariation",
    "Uniform",
]
