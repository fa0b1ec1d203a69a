"""May the embedding table score the next token too?

Claim    A tied head is no worse than one of its own by more than 0.03 nats: neither at equal width, where it saves a
         sixth of the parameters, nor at equal parameters, where they go into the feed-forward (Press and Wolf 2017,
         1608.05859).
Command  llmlab ablate experiments/ablations/tied_embeddings.py
Cost     3 arms x 6 seeds x 10 s on 2 CPU cores: 4 minutes
Result   inconclusive: at equal width +0.011 [-0.017, +0.040] nats, which about 20 seeds would settle; at equal
         parameters -0.037 [-0.062, -0.013], no worse (supported); in 2 min (2026-11-26, 2 shared cores, jax 0.10.2)

A vocabulary of 512 is small; with 32,000 the table would be most of a model of this width, and the parameter-matched
arm another model altogether. The margin is three times what pairs of runs vary by.
"""

from dataclasses import replace

from base import nano, pretraining

from llmlab.experiment import Experiment
from llmlab.models.config import Tied, Untied
from llmlab.study.ablation import Ablation, Variant, with_values

HEAD, WIDTH = "model.head", "model.pattern.0.ffn.hidden_dim"


def config() -> Experiment:
    """The nano decoder with a head of its own."""
    return pretraining(replace(nano(), head=Untied()))


def ablation() -> Ablation:
    """The head tied, its parameters saved or spent: 3 layers x 3 x 64 x 57 more are 32,832, the head's were 32,768."""
    return Ablation(
        hypothesis="a tied head is no worse than an untied one",
        baseline=config(),
        variants={
            "tied, equal width": with_values({HEAD: Tied()}),
            "tied, equal parameters": Variant(with_values({HEAD: Tied(), WIDTH: 176 + 57}), changes=(HEAD, WIDTH)),
        },
        claim="no worse",
        margin=0.03,
        match="tokens",
        seeds=6,
    )
