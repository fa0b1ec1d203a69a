"""What the five decoders of this folder share: corpus, tokens, objective, optimizer and length. Only the model differs.

It is the quickstart's setting: each model sees 1.2 million tokens of the standard library's source code, in the same
order. Sizes are chosen so that all have 1.66 to 1.68 million parameters at 512 tokens of vocabulary.
"""

from llmlab.data import INDENTATION, Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.config import Transformer
from llmlab.objectives import NextToken
from llmlab.optim import Cosine, Muon
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def pretraining(model: Transformer) -> Experiment:
    """The experiment with this model in it."""
    return Experiment(
        model=model,
        tokenizer=SentencePiece(vocab_size=512, kind="bpe", symbols=INDENTATION),
        data=Packed(StandardLibrary()),
        objective=NextToken(),
        optimizer=Muon(peak_lr=1e-2, schedule=Cosine(warmup_steps=40)),
        train=Train(steps=1200, batch_size=8, sequence_length=128, evaluate_every=400, checkpoint_every=400),
    )
