"""Where a run's time goes: seconds by phase, for the report while it happens and for the summary afterwards."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

from llmlab.training.report import Report


class Phases:
    """Accounts for every second between its making and `stop`: one phase at a time, the same one as often as it comes.

    Args:
        report: told about every change.
        before: seconds spent before, by phase ("imports").
        clock: seconds, monotonic.
    """

    def __init__(
        self, report: Report, before: Mapping[str, float], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds: dict[str, float] = dict(before)
        """Phase to seconds, in the order in which phases first came."""
        self._report = report
        self._clock = clock
        self._present: tuple[str, float] | None = None

    def begin(self, name: str, detail: str = "") -> None:
        """The present phase ends and this one begins."""
        self.stop()
        self.seconds.setdefault(name, 0.0)
        self._present = (name, self._clock())
        self._report.phase(name, detail)

    def stop(self) -> None:
        """The present phase ends."""
        if self._present is not None:
            name, began = self._present
            self.seconds[name] += self._clock() - began
            self._present = None

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase inside the present one, which then goes on."""
        outer = self._present
        self.begin(name)
        yield
        if outer is not None:
            self.begin(outer[0])
