"""Does a learning rate that suits a narrow model serve one eight times as wide, if muP parametrises it?

Claim    At a rate of 0.016 a width of 256 is better under muP with a base of 32 than in the standard parametrisation
         (Yang et al. 2022, 2203.03466: the standard one wants a lower rate the wider the model is).
Command  llmlab ablate experiments/ablations/mup.py
Cost     2 arms x 5 seeds x 30 s on 2 CPU cores: 5 minutes
Result   supported: muP is better by 0.121 [0.094, 0.148] nats; in 3 min (2026-11-26, 2 shared cores, jax 0.10.2)

Two layers; wider models have more heads of 16. The rate is one that suits widths of 32 to 64 here (base.py's, of width
64, is 0.01); which rate is best at each width, and how far it drifts, is what experiments/scaling/mup.py measures. At
the best rate for its own width the standard parametrisation may well be as good: muP saves the search for it.
"""

from dataclasses import replace

from base import nano, pretraining, with_block

from llmlab.experiment import Experiment
from llmlab.models.config import Untied
from llmlab.nn.mup import MuP
from llmlab.study.ablation import Ablation, with_values


def config() -> Experiment:
    """Sixteen heads of 16, in the standard parametrisation."""
    model = with_block(nano(embed_dim=256, num_layers=2, num_heads=16, hidden_dim=768), mixer={"head_dim": 16})
    experiment = pretraining(replace(model, head=Untied()), steps=150, evaluate_every=50, evaluate_batches=24)
    return replace(experiment, optimizer=replace(experiment.optimizer, peak_lr=1.6e-2))


def ablation() -> Ablation:
    """The same model in muP, whose base is 32 wide."""
    return Ablation(
        hypothesis="a narrow model's learning rate serves a wide one better under muP",
        baseline=config(),
        variants={"muP": with_values({"model.mup": MuP(base_width=32, base_head_dim=16)})},
        claim="better",
        match="parameters",
        tolerance=0.0,
        seeds=5,
    )
