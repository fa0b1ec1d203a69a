"""BLOOM among five decoders of equal size: ALiBi, a norm after the embedding, LayerNorm, biases, GELU.

Claim    A BLOOM of 1.66 million parameters ends far below the bigram, and lowest of this folder: ALiBi, which needs not
         be learnt, tells it from the first step which tokens are near.
Command  llmlab train experiments/pretrain/decoders/bloom.py
Cost     3 to 4 minutes on 2 CPU cores
Result   validation 2.243 nats a token against 3.505 (bigram) and 5.062 (unigram) (2026-11-25, 2 cores shared with other
         work, Python 3.11.7, jax 0.10.2)
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.bloom import bloom


def config() -> Experiment:
    """The recipe with a BLOOM."""
    return pretraining(bloom(embed_dim=180, num_layers=4, num_heads=6))
