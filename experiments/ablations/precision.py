"""Which types may the arithmetic have?

Claim    bfloat16, and float16 with a dynamic loss scale, equal float32 within 0.02 nats; float16 without loss scaling
         is worse (Micikevicius et al. 2018, 1710.03740: gradients below 6e-8 are lost).
Command  llmlab ablate experiments/ablations/precision.py
Cost     4 arms x 5 seeds x 25 s on 2 CPU cores: 9 minutes
Result   supported: bfloat16 +0.0003, float16 with its scale +0.0001 nats from float32; float16 without +0.0021
         [+0.0002, +0.0041]: worse, though by little at this size; in 6 min (2026-11-26, 2 shared cores, jax 0.10.2)

Parameters, norms, softmax and the loss stay float32 in all arms. Whether gradients fall below float16's smallest number
depends on the size of the batch, by which the loss is divided: the larger it is the more do. 64 rows of 64 tokens are
far fewer than large models train on, so the last part of the claim may not show here. The margin is twice what pairs
of runs vary by.
"""

from base import pretraining

from llmlab.experiment import Experiment
from llmlab.study.ablation import Ablation, Variant, with_values


def config() -> Experiment:
    """The nano decoder in float32, with a batch four times as large."""
    return pretraining(steps=200, batch_size=64, evaluate_batches=12)


def ablation() -> Ablation:
    """One type of arithmetic at a time."""
    half = {"train.precision": "float16"}
    return Ablation(
        hypothesis="bfloat16 and scaled float16 train as float32 does, and float16 needs its loss scaled",
        baseline=config(),
        variants={
            "bfloat16": with_values({"train.precision": "bfloat16"}),
            "float16": with_values(half),
            "float16 unscaled": Variant(
                with_values(half | {"train.loss_scaling": "none"}),
                claim="worse",
                margin=0.0,
                changes=("train.precision", "train.loss_scaling"),
            ),
        },
        claim="equal",
        margin=0.02,
        match="tokens",
        seeds=5,
    )
