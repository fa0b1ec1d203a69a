"""PaLM among five decoders of equal size: attention and SwiGLU side by side, one key/value head, rotary positions.

Claim    CLAIM
Command  llmlab train experiments/pretrain/decoders/palm.py
Cost     COST
Result   RESULT
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.palm import palm


def config() -> Experiment:
    """The recipe with a PaLM."""
    return pretraining(palm(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=528))
