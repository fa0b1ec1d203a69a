"""The loop's order of events, with everything around it replaced by notes."""

import os
import signal
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from llmlab.training.checkpoint import Checkpoints
from llmlab.training.config import Train
from llmlab.training.faults import Interrupted, Interruption
from llmlab.training.loop import UNEVALUATED, Parts, checkpoint_due, evaluation_due, train
from llmlab.training.metrics import MetricsLog
from llmlab.training.phases import Phases
from llmlab.training.recorder import Recorder
from llmlab.training.report import NullReport
from llmlab.training.state import TrainState
from llmlab.training.throughput import Throughput

CONFIG = Train(steps=6, batch_size=2, sequence_length=4, evaluate_every=2, checkpoint_every=3, keep_best=0, log_every=1)


class FakeCheckpoints(Checkpoints):
    """Notes what it is asked to save, and has it."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events
        self.meta: dict[int, Any] = {}

    def save(self, state: Any, step: int, meta: Mapping[str, float]) -> None:
        self.events.append(("save", step))
        self.meta[step] = dict(meta)

    def poll(self) -> int | None:
        return None

    def wait(self) -> int | None:
        return max(self.meta, default=None)

    def newest(self) -> int | None:
        return max(self.meta, default=None)


class Harness:
    """A loop over a state that counts; every event is noted in order."""

    def __init__(self, tmp_path: Path, config: Train = CONFIG, losses: dict[int, float] | None = None) -> None:
        self.events: list[Any] = []
        self.checkpoints = FakeCheckpoints(self.events)
        self.interruption = Interruption()
        self.log = MetricsLog(tmp_path, tensorboard=False)
        self.losses = losses or {}
        self.signal_at: Any = None
        speed = Throughput(flops_per_token=1, tokens_per_step=8, total_steps=config.steps, peak=None)
        report = NullReport()
        self.parts = Parts(
            config=config,
            step=self.step,
            evaluate=self.evaluate,
            batches=self.batches,
            checkpoints=self.checkpoints,
            recorder=Recorder(self.log, report, speed, config, self.checkpoints.newest),
            speed=speed,
            phases=Phases(report, {}),
            report=report,
            interruption=self.interruption,
        )

    def note(self, *event: Any) -> None:
        self.events.append(event)
        if event == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def batches(self, start: int) -> Generator[Any, None, None]:
        try:
            for step in range(start, self.parts.config.steps):
                yield {"input_ids": jnp.asarray(step)}
        finally:
            self.events.append("batches closed")

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        step = int(state.step) + 1
        assert int(batch["input_ids"]) == step - 1
        self.note("step", step)
        loss = self.losses.get(step, float(step))
        metrics = {"train/loss": jnp.asarray(loss), "gradient_norm": jnp.asarray(1.0)}
        return replace(state, step=jnp.asarray(step)), metrics

    def evaluate(self, state: TrainState) -> dict[str, float] | None:
        self.note("evaluate", int(state.step))
        return None if self.interruption.requested else {"validation/loss": 0.5}

    def run(self, start: int = 0, **settings: Any) -> TrainState:
        state = TrainState(step=jnp.asarray(start), params={}, optimizer_state={}, ema=None, loss_scale=None)
        with self.interruption:
            return train(state, start, self.parts, **settings)

    @property
    def lines(self) -> list[str]:
        return self.log.path.read_text(encoding="utf-8").splitlines()


@pytest.fixture
def make_harness(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    made: list[Harness] = []

    def make(config: Train = CONFIG, losses: dict[int, float] | None = None) -> Harness:
        made.append(Harness(tmp_path, config, losses))
        return made[-1]

    yield make
    for harness in made:
        harness.log.close()


def test_every_step_is_made_and_evaluations_come_before_saves(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    harness.run()
    made = [("step", 1), ("step", 2), ("evaluate", 2), ("step", 3), ("save", 3), ("step", 4), ("evaluate", 4)]
    assert harness.events == [*made, ("step", 5), ("step", 6), ("evaluate", 6), ("save", 6), "batches closed"]
    assert harness.checkpoints.meta == {3: {}, 6: {"validation/loss": 0.5}}


def test_the_lines_up_to_a_checkpoint_are_put_on_disk_before_it(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    harness.log.sync = lambda: harness.events.append(("lines on disk", len(harness.lines)))
    harness.run()
    before_saves = [harness.events[i - 1] for i, event in enumerate(harness.events) if event[0] == "save"]
    steps_and_evaluations = (3 + 1, 6 + 3)
    assert before_saves == [("lines on disk", lines) for lines in steps_and_evaluations]


def test_a_resumed_loop_continues_with_the_batch_after_its_last(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    harness.run(start=4)
    assert harness.events[:2] == [("step", 5), ("step", 6)]


def test_an_evaluation_that_was_cut_short_is_made_up_for_first(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    harness.run(start=4, unevaluated=True)
    assert harness.events[:2] == [("evaluate", 4), ("step", 5)]


@pytest.mark.parametrize(
    ("moment", "saved", "meta"),
    [
        (("step", 1), 1, {}),
        (("evaluate", 4), 4, {UNEVALUATED: 1.0}),
        (("evaluate", 6), 6, {UNEVALUATED: 1.0}),
    ],
)
def test_a_signal_saves_the_step_it_came_in(
    moment: Any, saved: int, meta: dict[str, float], make_harness: Callable[..., Harness]
) -> None:
    harness = make_harness()
    harness.signal_at = moment
    with pytest.raises(Interrupted) as caught:
        harness.run()
    assert (caught.value.step, caught.value.exit_code) == (saved, 42)
    assert harness.events[-2:] == [("save", saved), "batches closed"]
    assert harness.checkpoints.meta[saved] == meta


def test_a_signal_after_the_last_evaluation_lets_the_run_finish(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    evaluate = harness.parts.evaluate

    def then_signal(state: TrainState) -> dict[str, float] | None:
        metrics = evaluate(state)
        if int(state.step) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    harness.parts = replace(harness.parts, evaluate=then_signal)
    assert int(harness.run().step) == 6
    assert harness.checkpoints.meta[6] == {"validation/loss": 0.5}


def test_a_second_signal_does_not_wait(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness()
    with harness.interruption, harness.interruption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert harness.interruption.requested
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)


def test_numbers_are_read_one_step_late_and_all_are_written(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(replace(CONFIG, evaluate_every=0, checkpoint_every=0))
    written: list[int] = []
    step = harness.step

    def watched(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        written.append(len(harness.lines))
        return step(state, batch)

    harness.parts = replace(harness.parts, step=watched)
    harness.run()
    assert written == [0, 0, 1, 2, 3, 4]
    assert [line.split(",")[0] for line in harness.lines] == [*(f'{{"step": {i}' for i in (1, 2, 3, 4, 5, 6, 6))]


def test_a_state_whose_loss_is_not_finite_is_never_saved(make_harness: Callable[..., Harness]) -> None:
    harness = make_harness(losses={3: float("nan")})
    with pytest.raises(ArithmeticError, match="train/loss=nan at step 3; there is no checkpoint yet"):
        harness.run()
    assert harness.checkpoints.meta == {}
    assert '"train/loss": "NaN"' in harness.lines[-1]


def test_zero_means_the_last_step_only_and_the_best_are_known_where_they_are_kept() -> None:
    never = replace(CONFIG, evaluate_every=0, checkpoint_every=0)
    assert [step for step in range(1, 7) if evaluation_due(step, never)] == [6]
    assert [step for step in range(1, 7) if checkpoint_due(step, never)] == [6]
    best = replace(CONFIG, keep_best=1)
    assert [step for step in range(1, 7) if evaluation_due(step, best)] == [2, 3, 4, 6]
    assert [step for step in range(1, 7) if evaluation_due(step, CONFIG)] == [2, 4, 6]
