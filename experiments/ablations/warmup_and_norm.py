"""Does a learning rate need a warm-up after norms, and none before them?

Claim    With the norm after each addition (post-norm) training from the full learning rate is worse by more than 0.1
         nats; with a warm-up post-norm is no worse than pre-norm by more than 0.1, and pre-norm without a warm-up by
         no more than 0.05 (Xiong et al. 2020, 2002.04745: at the start post-norm's gradients are large near the
         output, pre-norm's are not). As in the paper nothing clips the gradient, which would be a warm-up of its own.
Command  llmlab ablate experiments/ablations/warmup_and_norm.py
Cost     4 arms x 5 seeds x 16 s on 2 CPU cores: 6 minutes
Result   refuted: pre-norm without a warm-up is worse by +0.162 [+0.114, +0.211] nats; post-norm with one is no worse
         (-0.032, supported); post-norm without one is +0.51 [-0.48, +1.49], some seeds lost and some not, and would
         take about 36 seeds; in 11 min (2026-11-26, 2 shared cores, jax 0.10.2)

The margins: 0.05 is what a tenth of the steps is worth at this length, and a run that lost its first steps and no more
loses about as much; more than 0.1 is a run that went wrong.
"""

from dataclasses import replace

from base import nano, pretraining

from llmlab.experiment import Experiment
from llmlab.nn.wiring import PostNorm, PreNorm
from llmlab.optim import AdamW, Cosine
from llmlab.study.ablation import Ablation, Variant, swap, with_values

WARM_UP = "optimizer.schedule.warmup_steps"


def config() -> Experiment:
    """Six layers, pre-norm, a warm-up of 100 steps; Adam's rates are the original Transformer's."""
    optimizer = AdamW(peak_lr=1e-2, beta2=0.98, clip_norm=None, schedule=Cosine(warmup_steps=100))
    return replace(pretraining(nano(num_layers=6)), optimizer=optimizer)


def without_both(experiment: Experiment) -> Experiment:
    """Post-norm from the full rate."""
    return with_values({WARM_UP: 0})(swap(PreNorm, PostNorm())(experiment))


def ablation() -> Ablation:
    """Both norms with and without warm-up."""
    return Ablation(
        hypothesis="post-norm needs a warm-up and pre-norm does not",
        baseline=config(),
        variants={
            "pre-norm without warm-up": Variant(with_values({WARM_UP: 0}), claim="no worse", margin=0.05),
            "post-norm": Variant(swap(PreNorm, PostNorm()), claim="no worse", margin=0.1),
            "post-norm without warm-up": Variant(
                without_both, claim="worse", margin=0.1, changes=("model.pattern.0.wiring", WARM_UP)
            ),
        },
        match="tokens",
        seeds=5,
    )
