"""Why split attention into heads?

Claim    At equal parameters one head of 64 dimensions is worse than four of 16, and so are sixteen of 4 (Vaswani et
         al. 2017, 1706.03762, table 3 A: one head is worse, and so are too many).
Command  llmlab ablate experiments/ablations/heads.py
Cost     3 arms x 8 seeds x 10 s on 2 CPU cores: 5 minutes
Result   supported: one head is worse by +0.023 [+0.001, +0.046] nats a token, sixteen by +0.151 [+0.132, +0.170]; in 7
         min (2026-11-26, 2 shared cores, jax 0.10.2)

All arms have the same matrices and FLOPs; they differ in how a token's 64 query dimensions are shared out, and so in
how many places it can look at. The paper's differences are small (0.9 BLEU): hence eight seeds and no margin.
"""

from base import pretraining

from llmlab.experiment import Experiment
from llmlab.study.ablation import Ablation, with_values

HEADS = "model.pattern.0.mixer.num_heads"


def config() -> Experiment:
    """The nano decoder: four heads."""
    return pretraining()


def ablation() -> Ablation:
    """Fewer and more heads."""
    return Ablation(
        hypothesis="one head is worse than several, and so are too many",
        baseline=config(),
        variants={"1 head": with_values({HEADS: 1}), "16 heads": with_values({HEADS: 16})},
        claim="worse",
        match="parameters",
        tolerance=0.0,
        seeds=8,
    )
