"""Do many experts, of which a token meets two, beat one feed-forward of equal FLOPs?

Claim    Eight experts of half the width, two for each token, are better than the dense feed-forward at equal tokens and
         FLOPs (Shazeer et al. 2017, 1701.06538; Fedus et al. 2021, 2101.03961).
Command  llmlab ablate experiments/ablations/mixture_of_experts.py
Cost     2 arms x 5 seeds x 30 s on 2 CPU cores: 6 minutes
Result   inconclusive: the experts are better by 0.011 [-0.004, +0.027] nats, which about 10 seeds would settle; in 3
         min (2026-11-26, 2 shared cores, jax 0.10.2)

The experts' model has 2.7 times the parameters and meets as many with each token; its router adds 1% of FLOPs. Time
is another matter: matmuls of few rows and the sorting of tokens make the step slower, more so at this size.
"""

from base import pretraining

from llmlab.experiment import Experiment
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.moe import MixtureOfExperts
from llmlab.study.ablation import Ablation, swap


def config() -> Experiment:
    """The nano decoder, dense, for 600 steps: experts see a quarter of the tokens each."""
    return pretraining(steps=600, evaluate_every=150)


def ablation() -> Ablation:
    """The feed-forward cut into eight halves."""
    experts = MixtureOfExperts(num_experts=8, experts_per_token=2, expert=GatedMLP(hidden_dim=88))
    return Ablation(
        hypothesis="a mixture of experts beats a dense model of equal FLOPs",
        baseline=config(),
        variants={"experts": swap(GatedMLP, experts)},
        claim="better",
        match="flops",
        tolerance=0.02,
        seeds=5,
    )
