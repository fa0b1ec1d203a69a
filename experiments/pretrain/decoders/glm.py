"""GLM among five decoders of equal size: rotary positions on half of each head, interleaved; RMSNorm, SwiGLU.

Claim    CLAIM
Command  llmlab train experiments/pretrain/decoders/glm.py
Cost     COST
Result   RESULT
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.glm import glm


def config() -> Experiment:
    """The recipe with a GLM."""
    return pretraining(glm(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, head=Tied()))
