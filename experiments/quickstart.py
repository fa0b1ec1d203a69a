"""Does a small language model learn Python from the Python on this machine, in under four minutes on two CPU cores?

Claim    A Llama-shaped decoder trained from scratch on the standard library's source code ends far below a unigram
         and clearly below a smoothed bigram model of the same tokens.
Command  llmlab train experiments/quickstart.py
Cost     under 4 minutes on 2 CPU cores: tokenizer, tokens, compilation and training
"""

from llmlab.data import Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.llama import llama
from llmlab.objectives import NextToken
from llmlab.optim import AdamW, Cosine
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def config() -> Experiment:
    """The experiment; every number here can be changed on the command line."""
    return Experiment(
        model=llama(embed_dim=192, num_layers=4, num_heads=6, num_kv_heads=2, hidden_dim=512, head=Tied()),
        tokenizer=SentencePiece(vocab_size=1024, kind="unigram", max_training_bytes=2_000_000),
        data=Packed(StandardLibrary()),
        objective=NextToken(),
        optimizer=AdamW(peak_lr=4e-3, schedule=Cosine(warmup_steps=50), weight_decay=0.1),
        train=Train(steps=700, batch_size=16, sequence_length=128),
    )
