"""From a step's numbers on the device to lines in metrics.jsonl and on the screen, without making the device wait.

A number can only be read when its step is done, and a loop that reads it at once leaves the device idle until the next
step is dispatched. So each step's numbers are read one step late, while the next one runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from llmlab.training.config import Train
from llmlab.training.faults import NonFiniteError
from llmlab.training.metrics import Log
from llmlab.training.report import Report
from llmlab.training.state import LossScale
from llmlab.training.throughput import Throughput


class Recorder:
    """Records a run.

    Args:
        log: where lines go.
        report: who watches.
        speed: measures, and knows how many tokens a step has.
        train: how often to write a line.
        last_good: step of the newest checkpoint, for the message about a loss that is not finite.
    """

    def __init__(
        self, log: Log, report: Report, speed: Throughput, train: Train, last_good: Callable[[], int | None]
    ) -> None:
        self._log = log
        self._report = report
        self._speed = speed
        self._train = train
        self._last_good = last_good
        self._pending: tuple[int, Any] | None = None
        self._timed = False
        self.latest: dict[str, float] = {}
        """The newest value of every metric."""

    def step(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the numbers of a step that was just dispatched, and records those of the step before."""
        before, self._pending = self._pending, (step, metrics)
        if before is not None:
            self._record(*before)

    def flush(self) -> None:
        """Waits for the last step that was dispatched, and records it.

        Raises:
            NonFiniteError: its loss or gradient is not finite.
        """
        before, self._pending = self._pending, None
        if before is not None:
            self._record(*before)

    def sync(self) -> None:
        """Makes all lines survive the machine: a checkpoint is worth no more than the lines up to it."""
        self._log.sync()

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Records an evaluation after `step` steps."""
        record = {"step": step, "tokens": self._tokens(step)} | metrics
        self._log.write(record)
        self._report.evaluation(record)
        self.latest |= record

    def _record(self, step: int, device_metrics: dict[str, jax.Array]) -> None:
        metrics = {name: float(value) for name, value in jax.device_get(device_metrics).items()}
        self._report.progress(step, self._train.steps, "steps")
        record = {"step": step, "tokens": self._tokens(step)} | metrics
        broken = not all(map(math.isfinite, metrics.values()))
        # float16: a step that overflowed was skipped, and the next has a smaller scale. At the smallest it is no use.
        if broken and metrics.get("skipped") and metrics["loss_scale"] > LossScale.MINIMUM:
            broken = False
        if not self._timed:  # compilation is over: from here on it is speed
            self._timed = True
            self._speed.start(step)
        elif step % self._train.log_every == 0 or step == self._train.steps:
            record |= self._speed.measure(step)
        if step % self._train.log_every == 0 or step in (1, self._train.steps) or broken:
            self._log.write(record)
            self._report.step(record)
        self.latest |= record
        if broken:
            raise NonFiniteError(step, metrics, self._last_good())

    def _tokens(self, step: int) -> int:
        return step * self._speed.tokens_per_step
