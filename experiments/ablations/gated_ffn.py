"""Does a gate in the feed-forward pay for its third matrix?

Claim    At equal parameters GELU and ReLU feed-forwards are worse than SwiGLU (Shazeer 2020, 2002.05202, table 1).
Command  llmlab ablate experiments/ablations/gated_ffn.py
Cost     3 arms x 8 seeds x 10 s on 2 CPU cores: 5 minutes
Result   inconclusive: ReLU is worse, +0.047 [+0.022, +0.072] nats a token; GELU, -0.017 [-0.047, +0.012], would take
         about 36 seeds to settle; in 166 s (2026-11-26, 2 cores, jax 0.10.2)

SwiGLU has 3 matrices of 64 x 176, the others 2 of 64 x 264: the same number of parameters to the last one. The paper
finds a few hundredths of a nat at every length that it shows; hence eight seeds and no margin.
"""

from base import pretraining

from llmlab.experiment import Experiment
from llmlab.nn.feed_forward import MLP, GatedMLP
from llmlab.study.ablation import Ablation, swap


def config() -> Experiment:
    """The nano decoder: SwiGLU."""
    return pretraining()


def ablation() -> Ablation:
    """The gate taken away, its parameters given to the width."""
    return Ablation(
        hypothesis="without a gate the feed-forward is worse",
        baseline=config(),
        variants={
            "gelu": swap(GatedMLP, MLP(hidden_dim=264, activation="gelu", bias=False)),
            "relu": swap(GatedMLP, MLP(hidden_dim=264, activation="relu", bias=False)),
        },
        claim="worse",
        match="parameters",
        tolerance=0.0,
        seeds=8,
    )
