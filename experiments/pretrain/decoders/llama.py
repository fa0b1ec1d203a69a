"""Llama among five decoders of equal size: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases.

Claim    CLAIM
Command  llmlab train experiments/pretrain/decoders/llama.py
Cost     COST
Result   RESULT
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.llama import llama


def config() -> Experiment:
    """The recipe with a Llama."""
    return pretraining(llama(embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, hidden_dim=512, head=Tied()))
