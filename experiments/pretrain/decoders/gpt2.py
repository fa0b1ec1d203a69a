"""GPT-2 among five decoders of equal size: learned positions, LayerNorm, biases, GELU.

Claim    A GPT-2 of 1.67 million parameters ends far below the bigram, and above the Llama of this folder, which need
         not learn what neighbouring places are.
Command  llmlab train experiments/pretrain/decoders/gpt2.py
Cost     3 to 4 minutes on 2 CPU cores
Result   validation 2.592 nats a token against 3.505 (bigram) and 5.062 (unigram) (2026-11-25, 2 cores shared with other
         work, Python 3.11.7, jax 0.10.2)
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.gpt2 import gpt2


def config() -> Experiment:
    """The recipe with a GPT-2."""
    return pretraining(gpt2(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=616, max_length=128))
