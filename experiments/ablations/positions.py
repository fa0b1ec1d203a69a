"""Sinusoidal, learned, rotary or ALiBi: which positions are best at the length that was trained?

Claim    A learned table equals sinusoidal positions within 0.03 nats (Vaswani et al. 2017, 1706.03762, table 3 E:
         "nearly identical"); rotary positions are better than sinusoidal ones (Su et al. 2021, 2104.09864), and ALiBi
         is no worse than they are by more than 0.03 (Press et al. 2021, 2108.12409).
Command  llmlab ablate experiments/ablations/positions.py
Cost     4 arms x 6 seeds x 10 s on 2 CPU cores: 5 minutes
Result   inconclusive: a learned table is worse by +0.028 [+0.022, +0.034], too near the margin; rotary is better by
         0.194 (supported) and ALiBi by 0.209 (no worse: supported); in 3 min (2026-11-26, 2 shared cores, jax 0.10.2)

Embeddings are multiplied by sqrt(64), as in the original, so that they are no smaller than the waves added to them.
The margin is three times what pairs of runs vary by. What happens beyond the trained length: extrapolation.py.
"""

from collections.abc import Mapping
from dataclasses import replace

from base import nano, pretraining, with_block

from llmlab.evals.loss import mean_loss
from llmlab.experiment import Experiment
from llmlab.nn.positions import ALiBi, Learned, Rotary, Sinusoidal
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, Change, Variant, with_values

IN_ATTENTION = "model.pattern.0.mixer.position"
BOTH = ("model.position", IN_ATTENTION)
LENGTH = 64


def config() -> Experiment:
    """The nano decoder with waves added to its embeddings."""
    model = with_block(nano(), mixer={"position": None})
    return pretraining(replace(model, position=Sinusoidal(), embedding_scale=8.0), sequence_length=LENGTH)


def in_attention(position: Rotary | ALiBi) -> Change:
    """Positions that act inside attention, instead of those that are added."""
    return with_values({"model.position": None, IN_ATTENTION: position})


def extrapolation(run: Run) -> Mapping[str, float]:
    """Loss of validation rows of the trained length, and of rows 2 and 4 times as long."""
    losses = {}
    for times in (1, 2, 4):
        data = run.experiment.data.build(run.tokenizer, sequence_length=times * LENGTH, batch_size=16 // times, seed=0)
        batches = map(data.validation.batch, range(48))
        losses[f"loss_at_{times}x"] = mean_loss(run.model, run.experiment.objective, batches)
    return losses


def ablation() -> Ablation:
    """One way to tell positions at a time."""
    return Ablation(
        hypothesis="learned equals sinusoidal, rotary is better, ALiBi no worse, at the trained length",
        baseline=config(),
        variants={
            "learned": Variant(with_values({"model.position": Learned(LENGTH)}), claim="equal"),
            "rotary": Variant(in_attention(Rotary()), claim="better", margin=0.0, changes=BOTH),
            "alibi": Variant(in_attention(ALiBi()), claim="no worse", changes=BOTH),
        },
        margin=0.03,
        match="tokens",
        seeds=6,
    )
