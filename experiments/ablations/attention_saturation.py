"""Is softmax saturated without the division by sqrt(d_k)?

Claim    At the start of training the share of queries that give one key more than 0.99 is higher without the division,
         by more than 0.1 (Vaswani et al. 2017, 1706.03762, footnote 4).
Command  llmlab ablate experiments/ablations/attention_saturation.py
Cost     none beyond attention_scale.py, whose runs these are
Result   supported: 21.9% of the queries, [21.4%, 22.4%], against 0.0% (2026-11-26, 2 cores, jax 0.10.2)
"""

from attention_scale import UNSCALED, config, saturation

from llmlab.study.ablation import Ablation

__all__ = ["ablation", "config"]


def ablation() -> Ablation:
    """The runs of attention_scale.py, asked for their softmax."""
    return Ablation(
        hypothesis="without the division by sqrt(d_k) softmax starts saturated",
        baseline=config(),
        variants={"unscaled": UNSCALED},
        metric="measure/saturated_at_start",
        claim="worse",
        margin=0.1,
        match="parameters",
        seeds=8,
        measure=saturation,
    )
