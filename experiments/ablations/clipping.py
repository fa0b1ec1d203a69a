"""Does clipping the gradient save a run from bad batches?

Claim    With bursts of garbage in the data, training without clipping ends worse than with gradients clipped to norm 1
         (Pascanu, Mikolov and Bengio 2012, 1211.5063), by more than 0.02 nats.
Command  llmlab ablate experiments/ablations/clipping.py
Cost     2 arms x 6 seeds x 10 s on 2 CPU cores: 3 minutes
Result   supported: without clipping +0.297 [+0.246, +0.349] nats a token; in 87 s (2026-11-26, 2 shared cores, jax
         0.10.2)

The spikes are injected, and nothing is hidden about it: three batches in a row, every fifty steps, hold one token
repeated, as a dump of a binary file would, another one each time. Which token and which steps follow from seed and step
alone, so that both arms meet the same garbage; validation data has none. Adam's own scaling bounds what one batch can
do, so the effect is smaller than with plain SGD. The margin is twice what pairs of runs vary by.

This file stands alone, for it holds a class of its own, and a run's directory keeps a copy of the file it needs.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmlab.data import INDENTATION, StandardLibrary
from llmlab.data.config import PackedText, Weighted
from llmlab.data.dataset import Batch, Dataset, Numbers, TrainSplit
from llmlab.data.sources import Source
from llmlab.experiment import Experiment
from llmlab.models.config import Tied
from llmlab.models.llama import llama
from llmlab.optim import AdamW, Cosine
from llmlab.study.ablation import Ablation, with_values
from llmlab.tokenizers import SentencePiece, Tokenizer
from llmlab.training.config import Train


@dataclass(frozen=True, kw_only=True)
class WithGarbage(PackedText):
    """Packed text whose training batches are garbage now and then."""

    source: Source = StandardLibrary()
    """The documents."""
    every: int = 50
    """Steps from one burst to the next."""
    length: int = 3
    """Batches of a burst."""

    def weighted(self) -> tuple[Weighted, ...]:
        return (Weighted(self.source),)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{super().fingerprint()} {self.every} {self.length}".encode()).hexdigest()

    def build(self, tokenizer: Tokenizer, *, seed: int, **settings: Any) -> Dataset:
        clean = super().build(tokenizer, seed=seed, **settings)
        fingerprint = hashlib.sha256(f"{clean.fingerprint} {self.every} {self.length}".encode()).hexdigest()
        return replace(clean, train=Spoilt(clean, self, seed), fingerprint=fingerprint)


class Spoilt(TrainSplit):
    """The training batches, with bursts of one repeated token; the first comes after `every` steps."""

    def __init__(self, clean: Dataset, bursts: WithGarbage, seed: int) -> None:
        super().__init__(clean.train.rows, batch_size=clean.train.batch_size)
        self._bursts, self._seed, self._vocab_size = bursts, seed, clean.vocab_size

    def part(self, step: int, places: Numbers) -> Batch:
        batch = super().part(step, places)
        if step < self._bursts.every or step % self._bursts.every >= self._bursts.length:
            return batch
        # Philox's stream is the same in all versions of numpy.
        draw = np.random.Philox(np.random.SeedSequence((self._seed, step // self._bursts.every))).random_raw()
        token = np.int32(draw % self._vocab_size)
        labels = np.where(batch["labels"] < 0, batch["labels"], token)
        return batch | {"input_ids": np.full_like(batch["input_ids"], token), "labels": labels}


def config() -> Experiment:
    """The decoder of base.py on spoilt data."""
    return Experiment(
        model=llama(embed_dim=64, num_layers=3, num_heads=4, hidden_dim=176, embedding_std=0.1, head=Tied()),
        tokenizer=SentencePiece(vocab_size=512, kind="bpe", symbols=INDENTATION),
        data=WithGarbage(),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=40)),
        train=Train(
            steps=400,
            batch_size=16,
            sequence_length=64,
            evaluate_every=100,
            evaluate_batches=48,
            checkpoint_every=0,
            keep_best=0,
        ),
    )


def ablation() -> Ablation:
    """Clipping left out."""
    return Ablation(
        hypothesis="where batches are bad now and then, training without clipping is worse",
        baseline=config(),
        variants={"unclipped": with_values({"optimizer.clip_norm": None})},
        claim="worse",
        margin=0.02,
        match="tokens",
        seeds=6,
    )
