"""What the arms of a study have equal: tokens, parameters, FLOPs or seconds, before anything runs and after.

    tokens        positions that the model processed in training
    parameters    of the model, a tied table counted once
    flops         matmul FLOPs of training, forward and backward, by the model's formula (ModelConfig.flops)
    seconds       of training steps at the run's median speed: without compilation, evaluation, or the noise of a start

Before the runs the first three follow from the configs, where the vocabulary and the shape of a batch are known there.
Afterwards all four are what the runs recorded. A claim "at equal tokens" about arms with unequal tokens would be a
claim about something else, so a mismatch beyond the tolerance fails the study, unless it says why it may stand.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmlab.experiment import Experiment, known_size
from llmlab.study.ablation import Ablation, Arm, Quantity

QUANTITIES: tuple[Quantity, ...] = ("tokens", "parameters", "flops", "seconds")


class MismatchError(ValueError):
    """The arms do not have equal what they are to have equal."""


@dataclass(frozen=True)
class Mismatch:
    """An arm that differs from the baseline in what is matched."""

    arm: str
    quantity: Quantity
    baseline: float
    variant: float
    relative: float
    """variant / baseline - 1."""

    def __str__(self) -> str:
        amounts = f"{self.variant:,.6g} {self.quantity}, the baseline {self.baseline:,.6g}"
        return f"{self.arm} has {amounts} ({self.relative:+.2%})"


Achieved = Mapping[str, float | None]
"""Quantity -> how much; None where it is not known."""


def expected(experiment: Experiment) -> dict[str, float | None]:
    """Tokens, parameters and FLOPs of a run, from its config alone; None for what that does not tell."""
    train, model = experiment.train, experiment.model
    found: dict[str, float | None] = dict.fromkeys(QUANTITIES)
    size = known_size(experiment.tokenizer)
    if model.vocab_size is None and size is None:
        settled = None
    else:
        settled = model if size is None else model.with_vocabulary(size)
        found["parameters"] = float(settled.num_parameters())
    if train.sequence_length is not None:
        shapes = model.batch_shapes(train.batch_size, train.sequence_length)
        found["tokens"] = float(train.steps * model.num_tokens(shapes))
        if settled is not None:
            found["flops"] = float(train.steps * settled.flops(shapes))
    return found


def of_run(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """The four quantities of a finished run, from its summary.json; None for what it does not tell."""
    tokens, speed = _number(summary.get("tokens")), _number(summary.get("tokens_per_second"))
    flops_per_token = _number(summary.get("flops_per_token"))
    # The phase is of the run's last session alone, which for a resumed run is a part: only where no speed was measured.
    measured = _number((summary.get("seconds") or {}).get("train"))
    return {
        "tokens": tokens,
        "parameters": _number(summary.get("num_parameters")),
        "flops": tokens * flops_per_token if tokens and flops_per_token else None,
        "seconds": tokens / speed if tokens and speed else measured,
    }


def mean_of(runs: Iterable[Achieved]) -> dict[str, float | None]:
    """The mean of each quantity over the runs that tell it; None where none does."""
    runs = list(runs)
    means: dict[str, float | None] = {}
    for quantity in QUANTITIES:
        values = [value for run in runs if (value := run.get(quantity)) is not None]
        means[quantity] = statistics.fmean(values) if values else None
    return means


def mismatches(ablation: Ablation, achieved: Mapping[str, Achieved]) -> list[Mismatch]:
    """The arms whose matched quantity is further from the baseline's than the tolerance.

    Args:
        ablation: says which quantity, and how far.
        achieved: arm -> quantities, the baseline first. An arm or a baseline that does not know is passed over.
    """
    (_, baseline), *others = achieved.items()
    reference, found = baseline.get(ablation.match), []
    for name, amounts in others:
        amount = amounts.get(ablation.match)
        if reference is None or amount is None or reference == amount:
            continue
        relative = amount / reference - 1
        if abs(relative) > ablation.tolerance:
            found.append(Mismatch(name, ablation.match, reference, amount, relative))
    return found


def check(ablation: Ablation, arms: Sequence[Arm]) -> list[Mismatch]:
    """The mismatches that the configs already show.

    Raises:
        MismatchError: there are some, and the study does not say why they may stand.
    """
    found = mismatches(ablation, {arm.name: expected(arm.experiment) for arm in arms})
    if found and ablation.acknowledge_mismatch is None:
        raise MismatchError(refusal(ablation, found))
    return found


def refusal(ablation: Ablation, found: Sequence[Mismatch]) -> str:
    """Why arms that do not match give no verdict, and the ways out."""
    lines = "".join(f"\n  {mismatch}" for mismatch in found)
    others = ", ".join(quantity for quantity in QUANTITIES if quantity != ablation.match)
    return (
        f"the arms are to match in {ablation.match}, within {ablation.tolerance:.2%}, and do not:{lines}\n"
        f"make them equal, match in something else ({others}), widen the tolerance, or compare them all the same with "
        'acknowledge_mismatch="why", which the report shows'
    )


def as_json(found: Sequence[Mismatch]) -> list[dict[str, Any]]:
    """As in results.json."""
    return [asdict(mismatch) for mismatch in found]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
