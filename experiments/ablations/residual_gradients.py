"""Do gradients vanish or explode on their way through a stack without residual additions?

Claim    At the start of training the gradient norms of twelve layers lie further apart without residual additions than
         with them, by more than half an order of magnitude (Bengio et al. 1994; Dong et al. 2021, 2103.03404: attention
         without them makes all tokens alike).
Command  llmlab ablate experiments/ablations/residual_gradients.py
Cost     none beyond residual_depth.py, whose runs these are
Result   supported: 1.79 orders of magnitude against 0.72, +1.07 [+0.96, +1.19] (2026-11-26, 2 cores, jax 0.10.2)
"""

from residual_depth import config, gradients

from llmlab.nn.wiring import NoResidual, PreNorm
from llmlab.study.ablation import Ablation, swap

__all__ = ["ablation", "config"]


def ablation() -> Ablation:
    """The runs of residual_depth.py, asked for their gradients."""
    return Ablation(
        hypothesis="without residual additions gradient norms differ more from layer to layer",
        baseline=config(),
        variants={"no residual": swap(PreNorm, NoResidual())},
        metric="measure/gradient_spread",
        claim="worse",
        margin=0.5,
        match="parameters",
        seeds=5,
        measure=gradients,
    )
