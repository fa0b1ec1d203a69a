"""BLOOM among five decoders of equal size: ALiBi, a norm after the embedding, LayerNorm, biases, GELU.

Claim    CLAIM
Command  llmlab train experiments/pretrain/decoders/bloom.py
Cost     COST
Result   RESULT
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.bloom import bloom


def config() -> Experiment:
    """The recipe with a BLOOM."""
    return pretraining(bloom(embed_dim=180, num_layers=4, num_heads=6))
