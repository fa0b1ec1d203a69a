"""Why do Transformers normalise over the embedding and not over the batch?

Claim    With BatchNorm in LayerNorm's places the loss is worse, although its statistics let a token see a little of
         later ones (Shen et al. 2020, 2003.07845: statistics of language batches fluctuate).
Command  llmlab ablate experiments/ablations/batch_norm.py
Cost     2 arms x 5 seeds x 10 s on 2 CPU cores: 2 minutes
Result   supported: +0.962 [+0.864, +1.060] nats a token, in under 2 minutes (2026-11-26, 2 cores, jax 0.10.2)

Parameters, tokens and FLOPs are equal. BatchNorm takes mean and variance over all tokens of the batch at hand, in
validation too: that is its best case. `measure/leak` is how far the scores of a row's first token move when its last
token changes: zero for a causal model.
"""

from collections.abc import Mapping
from dataclasses import replace

import jax.numpy as jnp
from base import nano, pretraining, with_block

from llmlab.experiment import Experiment
from llmlab.nn.norms import BatchNorm, LayerNorm
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, swap


def config() -> Experiment:
    """The nano decoder with LayerNorm."""
    return pretraining(replace(with_block(nano(), norm=LayerNorm()), final_norm=LayerNorm()))


def leak(run: Run) -> Mapping[str, float]:
    """Largest change of the first token's scores by the last token."""
    ids = jnp.arange(64, dtype=jnp.int32)[None] + 100
    changed = ids.at[0, -1].set(7)
    first, second = (run.model(input_ids=each).logits[0, 0] for each in (ids, changed))
    return {"leak": float(jnp.abs(first - second).max())}


def ablation() -> Ablation:
    """Every norm of the model swapped."""
    return Ablation(
        hypothesis="BatchNorm is worse than LayerNorm",
        baseline=config(),
        variants={"batch norm": swap(LayerNorm, BatchNorm())},
        claim="worse",
        match="parameters",
        seeds=5,
        measure=leak,
    )
