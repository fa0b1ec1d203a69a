"""What does label smoothing do to the loss of a language model?

Claim    Trained with 0.1 of the target's probability spread over the vocabulary, a model's plain loss is worse (Vaswani
         et al. 2017, 1706.03762, section 5.4: "hurts perplexity, as the model learns to be more unsure").
Command  llmlab ablate experiments/ablations/label_smoothing.py
Cost     2 arms x 5 seeds x 10 s on 2 CPU cores: 2 minutes
Result   supported: +0.091 [+0.070, +0.112] nats a token, in 95 s (2026-11-26, 2 cores, jax 0.10.2)

Both arms are compared by the plain loss, whatever they minimise. That smoothing helps a model that sees its data many
times is another claim: calibration.py.
"""

from collections.abc import Mapping

from base import pretraining

from llmlab.evals.calibration import expected_calibration_error, predictions
from llmlab.experiment import Experiment
from llmlab.objectives import NextToken
from llmlab.runs import Run
from llmlab.study.ablation import Ablation, with_values

SMOOTHED = with_values({"objective.label_smoothing": 0.1})


def config() -> Experiment:
    """The nano decoder, which sees every token at most once."""
    return pretraining()


def calibration(run: Run) -> Mapping[str, float]:
    """Expected calibration error of the next token, and what it is made of."""
    train = run.experiment.train
    data = run.experiment.data.build(
        run.tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=0
    )
    batches = map(data.validation.batch, range(min(48, data.validation.num_batches)))
    confidence, correct = predictions(run.model, NextToken.inputs, batches)
    return {
        "calibration_error": expected_calibration_error(confidence, correct),
        "confidence": float(confidence.mean()),
        "accuracy": float(correct.mean()),
    }


def ablation() -> Ablation:
    """Smoothing added."""
    return Ablation(
        hypothesis="label smoothing makes the plain loss worse",
        baseline=config(),
        variants={"smoothed": SMOOTHED},
        claim="worse",
        match="tokens",
        seeds=5,
        measure=calibration,
    )
