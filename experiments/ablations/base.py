"""What the studies of this folder share: a decoder so small that forty runs of it take minutes on two CPU cores.

    180,000 parameters      3 layers of width 64, 4 heads, SwiGLU, RMSNorm before each part, rotary positions, tied head
    410,000 tokens          400 steps of 16 rows of 64 tokens of the standard library, a vocabulary of 512
    about 10 seconds        a run, after the first of its arm has been compiled

A loss of 3.4 nats a token at its end is just below a bigram model's 3.5: it has begun to use context and is far from
done. What holds here holds for small models early in training; each study says whether more than that is known.

Two runs with the same seed see the same batches and start from the same values wherever they have the same parameters.
What is left of a difference between pairs is about 0.01 nats, so that five pairs show differences from 0.015 on.
"""

from dataclasses import replace
from typing import Any

import jax

from llmlab.data import INDENTATION, Packed, StandardLibrary
from llmlab.experiment import Experiment
from llmlab.models.config import Tied, Transformer
from llmlab.models.llama import llama
from llmlab.nn.module import draw, merge
from llmlab.optim import AdamW, Cosine
from llmlab.runs import Run
from llmlab.tokenizers import SentencePiece
from llmlab.training.config import Train


def nano(*, embed_dim: int = 64, num_layers: int = 3, num_heads: int = 4, hidden_dim: int = 176) -> Transformer:
    """The decoder; an embedding of 0.1 suits a fresh tied head."""
    return llama(
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden_dim=hidden_dim,
        embedding_std=0.1,
        head=Tied(),
    )


def with_block(model: Transformer, **changes: Any) -> Transformer:
    """A model of one kind of block with fields of it changed; those of `mixer` by a dict."""
    (block,) = model.pattern
    mixer = changes.pop("mixer", {})
    block = replace(block, **changes)
    return replace(model, pattern=(replace(block, mixer=replace(block.mixer, **mixer)),))


def initial_model(run: Run) -> Any:
    """The model that a run started from."""
    config = run.experiment.model.with_vocabulary(run.tokenizer.vocab_size)
    params = jax.jit(lambda key: draw(config.build, key))(jax.random.key(run.experiment.train.seed))
    return merge(config.abstract()[0], params)


def pretraining(model: Transformer | None = None, *, steps: int = 400, **train: Any) -> Experiment:
    """The decoder, trained on the standard library."""
    lengths: dict[str, Any] = {"batch_size": 16, "sequence_length": 64}
    rhythm: dict[str, Any] = {"evaluate_every": 100, "evaluate_batches": 48, "checkpoint_every": 0, "keep_best": 0}
    return Experiment(
        model=model or nano(),
        tokenizer=SentencePiece(vocab_size=512, kind="bpe", symbols=INDENTATION),
        data=Packed(StandardLibrary()),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=40)),
        train=Train(steps=steps, **lengths | rhythm | train),
    )
