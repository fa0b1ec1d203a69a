"""How many key and value heads does attention need?

Claim    Two key/value heads for four query heads (grouped-query), and one (multi-query), are no worse than four by more
         than 0.03 nats (Shazeer 2019, 1911.02150; Ainslie et al. 2023, 2305.13245).
Command  llmlab ablate experiments/ablations/grouped_query.py
Cost     3 arms x 6 seeds x 10 s on 2 CPU cores: 4 minutes
Result   inconclusive: both are worse by about the margin: two key/value heads +0.025, one +0.032 nats a token
         (2026-11-26, 2 cores, jax 0.10.2)

At equal tokens; fewer heads are also 7% and 10% fewer parameters, which are not given back: what is bought is the cache
of decoding, 2 and 4 times smaller. The margin is three times what pairs of runs vary by.
"""

from base import pretraining

from llmlab.experiment import Experiment
from llmlab.study.ablation import Ablation, with_values

KV_HEADS = "model.pattern.0.mixer.num_kv_heads"


def config() -> Experiment:
    """The nano decoder: four heads, each with keys and values of its own."""
    return pretraining()


def ablation() -> Ablation:
    """Key/value heads shared by two, and by all."""
    return Ablation(
        hypothesis="grouped-query and multi-query attention are no worse than multi-head",
        baseline=config(),
        variants={"grouped-query": with_values({KV_HEADS: 2}), "multi-query": with_values({KV_HEADS: 1})},
        claim="no worse",
        margin=0.03,
        match="tokens",
        seeds=6,
    )
