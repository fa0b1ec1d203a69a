"""Trained on 64 tokens, evaluated on 256: whose positions still mean something?

Claim    At 4 times the trained length sinusoidal and rotary positions lose more than 0.1 nats to ALiBi (Press et al.
         2021, 2108.12409, figure 1). A learned table has no row beyond its last, so it cannot take part.
Command  llmlab ablate experiments/ablations/extrapolation.py
Cost     none beyond positions.py, whose runs these are
Result   supported: at 4 times the length sinusoidal positions lose +0.470 [+0.459, +0.480] nats to ALiBi, rotary ones
         +0.226 [+0.178, +0.275]; in 37 s (2026-11-26, 2 shared cores, jax 0.10.2)

The same tokens in longer rows, each with more context: a model that extrapolates has a lower loss than at the trained
length, not the same. `measure/loss_at_1x`, `_2x` and `_4x` are in the results.
"""

from positions import BOTH, config, extrapolation, in_attention

from llmlab.experiment import Experiment
from llmlab.nn.positions import ALiBi, Rotary, Sinusoidal
from llmlab.study.ablation import Ablation, Variant, with_values

__all__ = ["ablation", "config"]


def with_alibi() -> Experiment:
    """positions.py's arm of that name."""
    return in_attention(ALiBi())(config())


def ablation() -> Ablation:
    """ALiBi against the others at 4 times the length."""
    waves = with_values({"model.position": Sinusoidal(), "model.pattern.0.mixer.position": None})
    return Ablation(
        hypothesis="sinusoidal and rotary positions do not extrapolate as ALiBi does",
        baseline=with_alibi(),
        variants={
            "sinusoidal": Variant(waves, changes=BOTH),
            "rotary": with_values({"model.pattern.0.mixer.position": Rotary()}),
        },
        metric="measure/loss_at_4x",
        claim="worse",
        margin=0.1,
        match="tokens",
        seeds=6,
        measure=extrapolation,
    )
