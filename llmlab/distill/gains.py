"""What distillation gained: teacher, student, and the same student without a teacher, measured alike.

    gap closed = (scratch - student) / (scratch - teacher)      0: nothing was taught, 1: the student is as good

All three are scored by one objective on one validation split, and timed on one batch of it. Parameters and FLOPs say
what each costs to use, tokens/s what this machine makes of that. The two students saw the same rows in the same order,
from the same initial values; one pair of runs says nothing of luck: for a verdict compare pairs of seeds (llmlab
ablate).
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from llmlab.distill.objective import Distill
from llmlab.distill.teacher import check_same_tokenizer
from llmlab.distill.texts import TeacherTexts
from llmlab.nn.module import Params, split
from llmlab.objectives import Objective
from llmlab.training.evaluation import evaluate
from llmlab.training.program import Program
from llmlab.training.session import tokenizer_for

_REPEATS = 9  # forward passes that are timed: the median of an odd number is one of them


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One of the three."""

    name: str
    """"teacher", "student" or "scratch"."""
    source: str
    """Where it is from."""
    loss: float
    """Plain loss on the validation split, nats per token (or what the objective counts)."""
    num_parameters: int
    """Of the model."""
    flops_per_token: float
    """Of a forward pass, by the model's formula."""
    tokens_per_second: float
    """Of a forward pass over a validation batch, measured here: the median of nine."""


def teacher_of(experiment: Any) -> str:
    """Directory of the teacher whose predictions, states or texts the student learns.

    Raises:
        ValueError: it has none.
    """
    objective, data = experiment.objective, experiment.data
    if isinstance(objective, Distill):
        return objective.teacher
    if isinstance(data, TeacherTexts):
        return data.teacher
    raise ValueError(
        f"objective={type(objective).__name__} has no teacher; llmlab distill compares an experiment with "
        'objective=Distill(teacher="RUN") or data=TeacherTexts(...), and llmlab train trains any'
    )


def without_teacher(experiment: Any) -> Any:
    """The experiment in which the student learns from the data alone.

    Raises:
        ValueError: it has no teacher, or nothing could be learned without one.
    """
    teacher_of(experiment)
    objective, data = experiment.objective, experiment.data
    if isinstance(objective, Distill):
        if objective.base is None:
            raise ValueError(
                "objective.base is None: without its teacher the student has nothing to learn, so there is no "
                "baseline; give a base, or train with llmlab train and measure the run"
            )
        objective = objective.base
    if isinstance(data, TeacherTexts):
        data = data.plain
    return dataclasses.replace(experiment, objective=objective, data=data)


def check_comparable(experiment: Any) -> None:
    """Raises a ValueError where student and teacher read different tokens, so that losses say nothing of each other."""
    check_same_tokenizer(teacher_of(experiment), tokenizer_for(experiment))


def gap_closed(*, teacher: float, student: float, scratch: float) -> float | None:
    """Fraction of the distance from scratch to the teacher; None where the teacher is no better than scratch."""
    gap = scratch - teacher
    return (scratch - student) / gap if gap > 0 else None


def compare(
    experiment: Any, student: Any, scratch: Any, tell: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measures all three.

    Args:
        experiment: with its teacher.
        student: the finished run of it (`llmlab.runs.Run`).
        scratch: the finished run without the teacher.
        tell: told what is measured.

    Returns:
        Plain JSON values: "entrants" by name, "gap_closed", "training" of the two runs.
    """
    from llmlab.runs import load, load_config

    teacher, alone = teacher_of(experiment), without_teacher(experiment)
    base, tokenizer, train = alone.objective, student.tokenizer, experiment.train
    dataset = alone.data.build(
        tokenizer, sequence_length=train.sequence_length, batch_size=train.batch_size, seed=train.seed
    )
    configs = {
        "teacher": (load_config(teacher), lambda: split(load(teacher))[1], teacher),
        "student": (load_config(student.directory), lambda: split(student.model)[1], str(student.directory)),
        "scratch": (load_config(scratch.directory), lambda: split(scratch.model)[1], str(scratch.directory)),
    }
    forwards, losses = {}, {}
    for name, (config, params, _) in configs.items():
        tell(f"measuring {name}")
        forwards[name] = Forward.of(config, params(), base, experiment, dataset)
        losses[name] = forwards[name].loss(dataset, experiment.train.evaluate_batches)
    speeds = tokens_per_second(forwards)
    entrants = {
        name: Entrant(
            name=name,
            source=Path(source).name,
            loss=losses[name],
            num_parameters=forwards[name].program.num_parameters,
            flops_per_token=forwards[name].flops_per_token,
            tokens_per_second=speeds[name],
        )
        for name, (_, _, source) in configs.items()
    }
    return {
        "format": 1,
        "unit": base.unit,
        "entrants": {name: dataclasses.asdict(entrant) for name, entrant in entrants.items()},
        "gap_closed": gap_closed(**losses),
        "gained": losses["scratch"] - losses["student"],
        "training": {name: trained(run.summary) for name, run in (("student", student), ("scratch", scratch))},
    }


@dataclass(frozen=True, kw_only=True)
class Forward:
    """The forward pass of a model, ready to be scored and timed."""

    program: Program
    params: Params
    batch: Any
    """On the devices."""

    @classmethod
    def of(cls, config: Any, params: Params, base: Objective, experiment: Any, dataset: Any) -> "Forward":
        """Laid out as the experiment's mesh says."""
        batch = dataset.validation.batch(0)
        placement = experiment.mesh.build(jax.devices())
        program = Program.build(config, base, experiment.optimizer, placement, experiment.train, batch)
        params = jax.tree.map(lambda x, kind: jax.device_put(x, kind.sharding), params, program.state.params)
        return cls(program=program, params=params, batch=program.place(batch))

    def loss(self, dataset: Any, max_batches: int | None) -> float:
        """Mean on the validation split."""
        program = self.program
        metrics = evaluate(
            program.evaluate_step, self.params, dataset.validation, program.place, max_batches=max_batches
        )
        assert metrics is not None, "nobody asks to stop"
        return metrics["loss"]

    @property
    def flops_per_token(self) -> float:
        """By the model's formula."""
        model, shapes = self.program.model, self.program.shapes
        return model.flops(shapes, training=False) / model.num_tokens(shapes)

    def run(self) -> None:
        """Once, to its end."""
        jax.block_until_ready(self.program.evaluate_step(self.params, self.batch))


def tokens_per_second(forwards: Mapping[str, Forward]) -> dict[str, float]:
    """Medians of passes that take turns, so that whatever else the machine does meets all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for _ in range(_REPEATS):
        for name, forward in forwards.items():
            began = time.perf_counter()
            forward.run()
            seconds[name].append(time.perf_counter() - began)
    return {
        name: forward.program.model.num_tokens(forward.program.shapes) / statistics.median(seconds[name])
        for name, forward in forwards.items()
    }


def trained(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's training cost."""
    seconds = summary.get("seconds", {})
    found = {
        "steps": summary.get("step"),
        "tokens": summary.get("tokens"),
        "tokens_per_second": summary.get("tokens_per_second"),
        "seconds": seconds.get("train"),
    }
    return {name: value for name, value in found.items() if value is not None and math.isfinite(value)}
