"""Trials that nobody trained: an executor whose runs end at the values that a test gives them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlab.config import config_hash
from llmlab.experiment import Experiment
from llmlab.study.trials import Status, Trial

Value = Callable[[str, int, Experiment], "float | Trial"]
"""(arm, seed, experiment) -> the loss at the end, or another trial."""


def finished(experiment: Experiment, value: float, **summary: Any) -> Trial:
    """A run that ended at this validation loss, on a curve of three evaluations."""
    steps = experiment.train.steps
    metrics = [{"step": steps * i // 3, "tokens": 100 * i, "validation/loss": value + (3 - i) * 0.5} for i in (1, 2, 3)]
    content = {"step": steps, "tokens": 300, "validation/loss": value, "num_parameters": 1000} | summary
    content |= {"tokens_per_second": 100.0, "flops_per_token": 6.0, "seconds": {"train": 9.0, "total": 10.0}}
    return trial(experiment, Status.FINISHED, summary=content | summary, metrics=metrics)


def trial(experiment: Experiment, status: Status, **fields: Any) -> Trial:
    """A trial in this state."""
    hash_ = config_hash(experiment)
    return Trial(directory=Path("runs/trials") / hash_, hash=hash_, status=status, **fields)


@dataclass
class FakeExecutor:
    """Executes by looking values up; remembers what it was asked for."""

    value: Value
    asked: list[str] = field(default_factory=list)

    def __call__(self, jobs: Mapping[str, Experiment]) -> dict[str, Trial]:
        self.asked += [label for label in jobs if label not in self.asked]
        trials = {}
        for label, experiment in jobs.items():
            arm, seed = label.split("/")[0], experiment.train.seed
            found = self.value(arm, seed, experiment)
            trials[label] = found if isinstance(found, Trial) else finished(experiment, found)
        return trials
