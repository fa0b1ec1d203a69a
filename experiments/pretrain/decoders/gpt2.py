"""GPT-2 among five decoders of equal size: learned positions, LayerNorm, biases, GELU.

Claim    CLAIM
Command  llmlab train experiments/pretrain/decoders/gpt2.py
Cost     COST
Result   RESULT
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.gpt2 import gpt2


def config() -> Experiment:
    """The recipe with a GPT-2."""
    return pretraining(gpt2(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=616, max_length=128))
