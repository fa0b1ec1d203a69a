"""Why are attention's products divided by sqrt(d_k)?

Claim    Without the division the loss is worse (Vaswani et al. 2017, 1706.03762, section 3.2.1: products of d_k terms
         of size one have size sqrt(d_k), where softmax is saturated and passes little gradient on).
Command  llmlab ablate experiments/ablations/attention_scale.py
Cost     2 arms x 8 seeds x 12 s on 2 CPU cores: 4 minutes
Result   supported: +0.530 [+0.469, +0.591] nats a token, in 171 s (2026-11-26, 2 cores, jax 0.10.2)

Two heads of 64 dimensions, so that the factor is 8. Queries and keys start at the size that makes the division right;
T5 leaves the division out and starts them smaller instead, which `query_gain=1` forbids. `measure/entropy_at_start` and
`measure/saturated_at_start` are of the same model before training (attention_saturation.py asks for them).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from base import initial_model, nano, pretraining, with_block

from llmlab.experiment import Experiment
from llmlab.interpret.attention import Sharpness, attention_weights, sharpness
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, with_values

UNSCALED = with_values({"model.pattern.0.mixer.scale": 1.0})


def config() -> Experiment:
    """The nano decoder with two wide heads."""
    return pretraining(with_block(nano(num_heads=2), mixer={"head_dim": 64, "query_gain": 1.0}))


def saturation(run: Run) -> Mapping[str, float]:
    """Relative entropy of attention, and the share of queries that one key has to itself, before and after training."""
    start, end = _sharpness(run, initial_model(run)), _sharpness(run, run.model)
    return {
        "entropy_at_start": start.entropy,
        "saturated_at_start": start.saturated,
        "entropy_at_end": end.entropy,
        "saturated_at_end": end.saturated,
    }


def _sharpness(run: Run, model: object) -> Sharpness:
    data = run.experiment.data.build(run.tokenizer, sequence_length=64, batch_size=16, seed=0)
    batch = {name: jnp.asarray(array) for name, array in data.validation.batch(0).items()}
    inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "position_ids")}
    return sharpness(attention_weights(model, **inputs), batch["position_ids"] + 1.0)


def ablation() -> Ablation:
    """The division left out."""
    return Ablation(
        hypothesis="attention without the division by sqrt(d_k) is worse",
        baseline=config(),
        variants={"unscaled": UNSCALED},
        claim="worse",
        match="parameters",
        seeds=8,
        measure=saturation,
    )
