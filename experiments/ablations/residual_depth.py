"""What do residual additions do for a deep stack?

Claim    Twelve layers without residual additions end more than 0.3 nats worse than with them (He et al. 2015,
         1512.03385), whatever the norms before each part do for the scale of its input.
Command  llmlab ablate experiments/ablations/residual_depth.py
Cost     2 arms x 5 seeds x 20 s on 2 CPU cores: 5 minutes
Result   supported: +1.505 [+1.487, +1.522] nats a token, in 189 s (2026-11-26, 2 cores, jax 0.10.2)

The margin is a third of what twelve layers gain over a unigram model here. The gradient norms that explain it are
those of residual_gradients.py, of the same runs.
"""

from collections.abc import Mapping
from math import log10

from base import nano, pretraining

from llmlab.experiment import Experiment
from llmlab.nn.wiring import NoResidual, PreNorm
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, swap


def config() -> Experiment:
    """Twelve narrow layers."""
    model = nano(embed_dim=48, num_layers=12, num_heads=3, hidden_dim=128)
    return pretraining(model, steps=250, log_gradients="layers")


def gradients(run: Run) -> Mapping[str, float]:
    """Gradient norms of the first step, the weights being those of the start: in orders of magnitude, how far the
    layers lie apart, and the first layer's against the last one's."""
    first = run.metrics[0]
    norms = [first[f"gradient_norm/layer.{i}"] for i in range(12)]
    return {
        "gradient_spread": log10(max(norms) / min(norms)),
        "gradient_first_over_last": log10(norms[0] / norms[-1]),
    }


def ablation() -> Ablation:
    """The additions left out, the norms left in."""
    return Ablation(
        hypothesis="a deep stack without residual additions trains worse",
        baseline=config(),
        variants={"no residual": swap(PreNorm, NoResidual())},
        claim="worse",
        margin=0.3,
        match="parameters",
        seeds=5,
        measure=gradients,
    )
