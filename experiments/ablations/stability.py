"""At a learning rate that is too high, do QK-norm and z-loss help?

Claim    At about six times the best rate, RMSNorm on queries and keys, a z-loss of 1e-4, and both make the loss better
         (Wortsman et al. 2023, 2309.14322: small models show the instabilities of large ones at high rates; the norm
         holds attention logits down, the z-loss output logits).
Command  llmlab ablate experiments/ablations/stability.py
Cost     4 arms x 5 seeds x 11 s on 2 CPU cores: 5 minutes
Result   inconclusive: QK-norm is better by 0.351 [0.296, 0.406] nats and with the z-loss by 0.363 (both supported), the
         z-loss alone by 0.004 [-0.039, +0.047]: nothing that 5 seeds show; in 3 min (2026-11-26, 2 shared cores, jax
         0.10.2)

A full factorial, so that the results say whether one makes the other needless. The paper sees the z-loss matter late in
runs that are far longer than this one: nothing found here about it says nothing about those.
"""

from dataclasses import replace

from base import pretraining

from llmlab.experiment import Experiment
from llmlab.nn.norms import RMSNorm
from llmlab.study.ablation import Ablation, unchanged, with_values


def config() -> Experiment:
    """The nano decoder at a rate of 0.06."""
    experiment = pretraining()
    return replace(experiment, optimizer=replace(experiment.optimizer, peak_lr=6e-2))


def ablation() -> Ablation:
    """Both remedies, each and together."""
    return Ablation(
        hypothesis="at a high learning rate QK-norm and z-loss help",
        baseline=config(),
        factors={
            "qk_norm": {"none": unchanged, "rmsnorm": with_values({"model.pattern.0.mixer.qk_norm": RMSNorm()})},
            "z_loss": {"none": unchanged, "1e-4": with_values({"objective.z_loss": 1e-4})},
        },
        claim="better",
        match="tokens",
        seeds=5,
    )
