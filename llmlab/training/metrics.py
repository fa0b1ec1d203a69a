"""What a run measured, kept: metrics.jsonl is the truth, TensorBoard files beside it are a view of it.

One JSON object a line, each with `step` and whatever was measured after that many steps:

    {"step": 200, "tokens": 409600, "train/loss": 3.1415, "learning_rate": 0.003, "gradient_norm": 0.71, ...}
    {"step": 200, "tokens": 409600, "validation/loss": 3.2}

Losses are in nats per token. A number that is not finite is written as the string "NaN", "Infinity" or "-Infinity":
JSON has no such numbers, the bare words that some writers use are rejected by other readers, and null would make an
overflow look like a missing value. `float()` turns the strings back, and `read_metrics` does.

Every line is handed to the operating system when it is written, so a killed process loses nothing but at most the line
it was writing. A machine that is lost takes with it what was not on disk yet, and in a mounted bucket a file is there
when it is closed: so before every checkpoint `sync` closes the file and opens it again, and a run that resumes at a
checkpoint has all lines up to it. It cuts the file back to that step, byte for byte, and goes on from there.
TensorBoard's files are not closed for that: a lost machine's last one is lost.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llmlab.training.directory import write_text

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

FILE_NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"

_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


@runtime_checkable  # for the checks of argument types at run time
class Log(Protocol):
    """Where records go."""

    def write(self, metrics: Mapping[str, float]) -> None:
        """Takes one record."""
        ...

    def cut_back(self, step: int) -> int:
        """Removes the records after `step`; returns how many were removed."""
        ...

    def sync(self) -> None:
        """Makes what was written survive the machine."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class NoLog:
    """Keeps nothing: of the processes that train together only the first one writes."""

    def write(self, metrics: Mapping[str, float]) -> None:
        """Drops the record."""

    def cut_back(self, step: int) -> int:
        """Removes nothing."""
        return 0

    def sync(self) -> None:
        """Has nothing to keep."""

    def close(self) -> None:
        """Has nothing to close."""


class MetricsLog:
    """Appends records to <directory>/metrics.jsonl and mirrors their numbers to <directory>/tensorboard/.

    Only one process of a run may hold one. A torn last line (a killed writer's) is removed when the log is opened.
    """

    def __init__(self, directory: Path | str, *, tensorboard: bool = True) -> None:
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._tensorboard = tensorboard
        self._purge_step: int | None = None
        self._writer: SummaryWriter | None = None
        _mend(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    @property
    def path(self) -> Path:
        """The metrics.jsonl of the run."""
        return self.directory / FILE_NAME

    def write(self, metrics: Mapping[str, float]) -> None:
        """Appends one record. It needs `step`; values are numbers.

        Raises ValueError where `step` is missing or is no whole number: nothing could be cut back or drawn by it.
        """
        step = metrics.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"a record of metrics needs a whole number as its step, not {step!r}: {dict(metrics)}")
        record = {key: _encode(value) for key, value in metrics.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard:
            self._mirror(step, metrics)

    def cut_back(self, step: int) -> int:
        """Removes the records after `step`, in one atomic rename; returns how many were removed.

        TensorBoard's files are never rewritten: the next one begins with a mark that makes TensorBoard drop the
        points after `step`.
        """
        lines = list(_complete_lines(self.path))
        kept = [line for line, record in lines if record["step"] <= step]
        self._close_writer()
        self._purge_step = step + 1
        if len(kept) < len(lines):
            self._file.close()
            write_text(self.path, b"".join(kept).decode())
            self._file = self.path.open("a", encoding="utf-8")
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Puts every record on disk, where the disk is a mounted bucket as well.

        fsync alone does not do it there: gcsfuse streams a new file, and the object exists once the file is closed.
        """
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flushes everything to disk. Closing twice does no harm."""
        self._close_writer()
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _mirror(self, step: int, metrics: Mapping[str, float]) -> None:
        writer = self._writer
        if writer is None:
            from tensorboardX import SummaryWriter

            # A writer starts a file of its own; at its head goes the mark that drops what was cut back.
            writer = self._writer = SummaryWriter(str(self.directory / TENSORBOARD), purge_step=self._purge_step)
            self._purge_step = None
        for key, value in metrics.items():
            if key != "step":
                writer.add_scalar(key, float(value), step)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def read_metrics(run_directory: Path | str) -> list[dict[str, Any]]:
    """The records of a run, in order, with numbers that are not finite as floats; a torn last line is left out.

    Raises:
        FileNotFoundError: the directory has no metrics.jsonl.
        ValueError: a line before the last is no record; the message names it.
    """
    path = Path(run_directory) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_directory} has no {FILE_NAME}: it is not a run directory, or training has not begun"
        )
    return [
        {key: float(value) if value in _NOT_FINITE else value for key, value in record.items()}
        for _, record in _complete_lines(path)
    ]


def _encode(value: float) -> int | float | str:
    """The value as JSON can hold it. float32 scalars and the like become the Python float of the same value."""
    if isinstance(value, int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every line with its record, without a torn last one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError(
                    f"{path}, line {number} is no record of metrics ({line[:60]!r}); "
                    "the file was damaged or edited: remove the line, or start the run in another directory"
                )
            yield line, record


def _mend(path: Path) -> None:
    """Drops what a killed writer left after the last newline."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
