"""What a run tells whoever watches it.

The training code calls a `Report`; a live terminal display, plain lines, or nothing at all stand behind it. So the loop
neither prints nor knows how its words are shown. A report only shows: metrics.jsonl is written by the loop, and a run
with `NullReport` records exactly what a run with a display records.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

Level = Literal["info", "warning", "error"]


@runtime_checkable  # for the checks of argument types at run time
class Report(Protocol):
    """Receives the events of one run, in order, from the thread that trains (and `progress` from data workers' parent).

    Numbers are Python floats or ints: a report never waits for a device.
    """

    def phase(self, name: str, detail: str = "") -> None:
        """A stage begins ("tokenizer", "tokenize", "compile", "train", "evaluate"); the one before it has ended.

        `detail` is one line for people: "SentencePiece unigram, 1,024 pieces".
        """
        ...

    def progress(self, done: int, total: int | None, what: str) -> None:
        """`done` of `total` (None: unknown) units of `what` ("documents", "batches") in the present phase."""
        ...

    def step(self, metrics: Mapping[str, float]) -> None:
        """A training step's record, with the keys of metrics.jsonl: `step`, `tokens`, `train/loss`, `learning_rate`,...

        Keys a display shows where present besides those: `tokens_per_second`, `model_flops_per_second`, `mfu`,
        `eta_seconds`.
        """
        ...

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """An evaluation's record: `step`, `validation/loss`, ..."""
        ...

    def checkpoint(self, step: int) -> None:
        """The state after `step` steps is safely on disk."""
        ...

    def message(self, text: str, level: Level = "info") -> None:
        """One remark for people: a restored checkpoint, files skipped, a loss that is not finite."""
        ...

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """The run is over: finished with its summary (that of summary.json), or None where it was cut short.

        Gives the terminal back. Called once, also when the run fails.
        """
        ...


class NullReport:
    """A report that shows nothing: for library use, tests, and the processes of a pod other than the first."""

    def phase(self, name: str, detail: str = "") -> None:
        """Shows nothing."""

    def progress(self, done: int, total: int | None, what: str) -> None:
        """Shows nothing."""

    def step(self, metrics: Mapping[str, float]) -> None:
        """Shows nothing."""

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        """Shows nothing."""

    def checkpoint(self, step: int) -> None:
        """Shows nothing."""

    def message(self, text: str, level: Level = "info") -> None:
        """Shows nothing."""

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        """Shows nothing."""
