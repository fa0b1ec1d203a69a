"""Llama among five decoders of equal size: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases.

Claim    A Llama of 1.67 million parameters (the quickstart's) ends far below the bigram; the other files of this folder
         are compared with it.
Command  llmlab train experiments/pretrain/decoders/llama.py
Cost     3 to 4 minutes on 2 CPU cores
Result   validation 2.438 nats a token against 3.505 (bigram) and 5.062 (unigram) (2026-11-25, 2 cores shared with other
         work, Python 3.11.7, jax 0.10.2)
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.llama import llama


def config() -> Experiment:
    """The recipe with a Llama."""
    return pretraining(llama(embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, hidden_dim=512, head=Tied()))
