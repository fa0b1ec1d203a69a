"""Mixture of experts: routing, dispatch, experts on sorted rows."""

from llmlab.nn.moe.grouped import grouped_mlp
from llmlab.nn.moe.layer import MixtureOfExperts, MixtureOfExpertsLayer
from llmlab.nn.moe.routing import Capacity, ExpertChoice, LoadBalance, Router, TopK

__all__ = [
    "Capacity",
    "ExpertChoice",
    "LoadBalance",
    "MixtureOfExperts",
    "MixtureOfExpertsLayer",
    "Router",
    "TopK",
    "grouped_mlp",
]
