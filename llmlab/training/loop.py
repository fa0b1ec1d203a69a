"""The training loop, to be read from top to bottom.

    for every step:   batch -> step -> record -> (evaluate) -> (save)

What is dispatched to the device is not waited for, except before an evaluation or a save. Everything that decides the
numbers is an argument: parameters and optimizer state in `state`, data by step number, dropout by seed and step. So a
run that is stopped anywhere and taken up again at its last checkpoint ends with the same bits.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from llmlab.objectives import Batch
from llmlab.training.config import Train
from llmlab.training.faults import Interrupted, Interruption
from llmlab.training.phases import Phases
from llmlab.training.report import Report
from llmlab.training.state import TrainState

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Any]]
Evaluate = Callable[[TrainState], dict[str, Any] | None]
"""Metrics of a state; None where a signal asked to stop."""


@runtime_checkable
class Saver(Protocol):
    """What the loop asks of `Checkpoints`."""

    def save(self, state: TrainState, step: int, meta: Mapping[str, Any]) -> None:
        """Begins to save the state after `step` steps."""
        ...

    def poll(self) -> int | None:
        """The step of a save that has finished since the last call, if one has."""
        ...

    def wait(self) -> int | None:
        """Waits for the save that is under way, and returns its step."""
        ...


@runtime_checkable
class Recording(Protocol):
    """What the loop asks of `Recorder`."""

    def step(self, step: int, metrics: Any) -> None:
        """Takes the numbers of a step that was just dispatched."""
        ...

    def flush(self) -> None:
        """Waits for the last step that was dispatched, and records it."""
        ...

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Records an evaluation after `step` steps."""
        ...

    def sync(self) -> None:
        """What was recorded is to survive the loss of the machine."""
        ...


UNEVALUATED = "unevaluated"
"""Key of a checkpoint's meta: the evaluation that was due at its step was cut short, and is made up for on resuming."""


@runtime_checkable
class Pauses(Protocol):
    """What the loop asks of `Throughput`."""

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """What happens inside is no training."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with."""

    config: Train
    step: TrainStep
    evaluate: Evaluate
    batches: Callable[[int], Generator[Batch, None, None]]
    """The batches from a step on."""
    checkpoints: Saver
    recorder: Recording
    speed: Pauses
    phases: Phases
    report: Report
    interruption: Interruption


def train(state: TrainState, start: int, parts: Parts, *, unevaluated: bool = False) -> TrainState:
    """Trains from `start` steps done to `config.steps` and returns the last state, which is saved.

    Args:
        state: after `start` steps; it is given up.
        start: steps done.
        parts: everything else.
        unevaluated: whether the evaluation that was due at `start` is missing.

    Raises:
        NonFiniteError: the loss or the gradient is not finite any more.
        Interrupted: a signal asked to stop; the state is saved.
    """
    config, recorder, checkpoints = parts.config, parts.recorder, parts.checkpoints
    with parts.interruption.deferred():
        if unevaluated:
            _look(state, start, parts)
        with contextlib.closing(parts.batches(start)) as batches:
            for step, batch in enumerate(batches, start + 1):
                state, metrics = parts.step(state, batch)
                recorder.step(step, metrics)
                stop = parts.interruption.look()
                if stop or evaluation_due(step, config) or checkpoint_due(step, config):
                    _look(state, step, parts)
                _tell_saved(checkpoints.poll(), parts.report)
        _tell_saved(checkpoints.wait(), parts.report)
    return state


def evaluation_due(step: int, config: Train) -> bool:
    """Whether to evaluate after this many steps: by `evaluate_every`, at the end, and where the best are kept."""
    return _due(step, config.evaluate_every, config.steps) or (config.keep_best > 0 and checkpoint_due(step, config))


def checkpoint_due(step: int, config: Train) -> bool:
    """Whether to save after this many steps."""
    return _due(step, config.checkpoint_every, config.steps)


def _due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _look(state: TrainState, step: int, parts: Parts) -> None:
    """What happens between steps: evaluation, saving, and leaving when asked to."""
    config, checkpoints = parts.config, parts.checkpoints
    parts.recorder.flush()  # raises where this step's loss is not finite: such a state must not be saved
    meta: dict[str, Any] = {}
    with parts.speed.pause():
        if evaluation_due(step, config):
            with parts.phases.within("evaluate"):
                metrics = parts.evaluate(state)
            if metrics is None:
                meta[UNEVALUATED] = 1.0
            else:
                parts.recorder.evaluation(step, metrics)
                meta |= metrics
        stopping = parts.interruption.signal
        if checkpoint_due(step, config) or stopping is not None:
            with parts.phases.within("checkpoint"):
                parts.recorder.sync()
                checkpoints.save(state, step, meta)
    if stopping is not None and (step < config.steps or UNEVALUATED in meta):
        _tell_saved(checkpoints.wait(), parts.report)
        raise Interrupted(stopping, step)


def _tell_saved(step: int | None, report: Report) -> None:
    if step is not None:
        report.checkpoint(step)
