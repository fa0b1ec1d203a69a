"""PaLM among five decoders of equal size: attention and SwiGLU side by side, one key/value head, rotary positions.

Claim    A PaLM of 1.66 million parameters ends as far below the bigram as the Llama of this folder, within 0.02 nats:
         one norm a block and one key/value head cost nothing here.
Command  llmlab train experiments/pretrain/decoders/palm.py
Cost     3 to 4 minutes on 2 CPU cores
Result   validation 2.450 nats a token against 3.505 (bigram) and 5.062 (unigram) (2026-11-25, 2 cores shared with other
         work, Python 3.11.7, jax 0.10.2)
"""

from recipe import pretraining

from llmlab.experiment import Experiment
from llmlab.models.palm import palm


def config() -> Experiment:
    """The recipe with a PaLM."""
    return pretraining(palm(embed_dim=192, num_layers=4, num_heads=6, hidden_dim=528))
