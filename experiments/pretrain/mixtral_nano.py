"""Does a mixture of experts learn more than a dense decoder from the same tokens at the same compute per token?

Claim    A Mixtral of 5.2 million parameters, of which each token uses 1.7 million (2 of 8 experts), ends below the
         bigram model, and below the dense Llama of equal compute and tokens: decoders/llama.py.
Command  llmlab train experiments/pretrain/mixtral_nano.py
Cost     7 minutes on 2 CPU cores, about half of it in Muon: orthogonalising 96 expert matrices takes twice the
         FLOPs of a step this small
Result   validation 2.386 nats a token against 2.438 of the dense Llama, 3.505 (bigram) and 5.062 (unigram) (2026-11-25,
         2 cores shared with other work and stopped at times, Python 3.11.7, jax 0.10.2)
"""

from llmlab.data import INDENTATION, Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.mixtral import mixtral
from llmlab.objectives import NextToken
from llmlab.optim import Cosine, Muon
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def config() -> Experiment:
    """The experiment; every number here can be changed on the command line."""
    return Experiment(
        model=mixtral(embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, hidden_dim=256, head=Tied()),
        tokenizer=SentencePiece(vocab_size=512, kind="bpe", symbols=INDENTATION),
        data=Packed(StandardLibrary()),
        objective=NextToken(),
        optimizer=Muon(peak_lr=1e-2, schedule=Cosine(warmup_steps=40)),
        train=Train(steps=1200, batch_size=8, sequence_length=128, evaluate_every=400, checkpoint_every=400),
    )
