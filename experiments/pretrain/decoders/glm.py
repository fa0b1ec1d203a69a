"""GLM among five decoders of equal size: rotary positions on half of each head, interleaved; RMSNorm, SwiGLU.

Claim    A GLM of 1.67 million parameters ends as far below the bigram as the Llama of this folder, within 0.02 nats:
         half of a head's dimensions are enough for positions.
Command  llmlab train experiments/pretrain/decoders/glm.py
Cost     3 to 4 minutes on 2 CPU cores
Result   validation 2.427 nats a token against 3.505 (bigram) and 5.062 (unigram) (2026-11-25, 2 cores shared with other
         work, Python 3.11.7, jax 0.10.2)
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.glm import glm


def config() -> Experiment:
    """The recipe with a GLM."""
    return pretraining(glm(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=512, head=Tied()))
