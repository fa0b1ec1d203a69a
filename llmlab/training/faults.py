"""What can stop a run, and how it stops.

    Ctrl-C (SIGINT)    save, say how to resume, exit code 130
    SIGTERM            the same with exit code 42, which job schedulers take as "preempted, run me again"
    a loss of NaN      stop before anything is overwritten, name the last good checkpoint and what to try

A handler that only sets a flag does nothing while nobody looks, and one that raises can leave a half-written anything.
So there are two modes: preparation (tokenizing, compiling) has nothing to save and is left at once by an exception;
training looks at the flag between steps and between batches of an evaluation. A second signal always raises.

Where several processes train together, a signal may reach one of them only, and all must stop after the same step: they
vote at every look (`llmlab.sharding.cluster`), and a signal counts when all have heard of it, one look later.
"""

import contextlib
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

_EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 42}


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. Not an Exception: code that survives errors must not survive this."""

    def __init__(self, number: int, step: int | None = None) -> None:
        self.signal = signal.Signals(number)
        self.step = step
        """Steps that the checkpoint saved on the way out holds; None where training had not begun."""
        super().__init__(f"stopped by {self.signal.name}")

    @property
    def exit_code(self) -> int:
        """130 for Ctrl-C, 42 for a preemption."""
        return _EXIT_CODES.get(self.signal, 1)


class Pruned(Exception):
    """Raised by a report in an evaluation: whoever runs many trainings wants no more of this one."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"pruned after {step} steps")


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not a number any more: going on would only write NaN over good parameters."""

    def __init__(self, step: int, metrics: Mapping[str, float], last_good: int | None) -> None:
        self.step = step
        self.last_good = last_good
        numbers = ", ".join(f"{name}={value:g}" for name, value in metrics.items() if not math.isfinite(value))
        saved = f"the last good checkpoint is of step {last_good}" if last_good else "there is no checkpoint yet"
        super().__init__(
            f"{numbers} at step {step}; {saved}. Try a lower peak learning rate (--optimizer.peak-lr), a longer "
            "warm-up, clipping (--optimizer.clip-norm 1), or --train.precision float32; the same command again "
            "would come to the same step and the same numbers"
        )


class Interruption:
    """Watches for SIGINT and SIGTERM while it is entered (in the main thread; elsewhere it watches nothing).

    Args:
        vote: own signal (0 for none) to that of any process, the same in all of them; None for a single process.
    """

    def __init__(self, vote: Callable[[int], int] | None = None) -> None:
        self.signal: int | None = None
        """That asked the run to stop."""
        self._received: int | None = None
        self._vote = vote
        self._raise_at_once = True

    def __enter__(self) -> "Interruption":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in _EXIT_CODES:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = self._received is not None
        self._received = number
        if self._vote is None:
            self.signal = number
        if self._raise_at_once or again:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal waits for a `look`."""
        self._raise_at_once = False
        try:
            yield
        finally:
            self._raise_at_once = True

    def look(self) -> bool:
        """Whether a signal asked the run to stop. Where there are several processes all must look, at the same points:
        the answer is the same for all."""
        if self._vote is not None:
            self.signal = self._vote(self._received or 0) or self.signal
        return self.requested

    @property
    def requested(self) -> bool:
        """Whether a signal had asked the run to stop at the last look; of a single process, at this moment."""
        return self.signal is not None


_BACKGROUND = "llmlab-background"


def in_background(function: Callable[[], T]) -> "Future[T]":
    """Runs a long call that cannot be interrupted (XLA's compiler) beside the main thread, which stays responsive."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    # Not a daemon: a thread inside the compiler when the interpreter ends would abort the process.
    threading.Thread(target=run, name=_BACKGROUND).start()
    return future


def wait(future: "Future[T]") -> T:
    """The future's result; signals are handled while waiting, which a plain `result()` would put off."""
    while True:
        try:
            return future.result(timeout=0.1)
        except FutureTimeoutError:
            if future.done():  # the function's own TimeoutError
                raise


def exit_if_busy(code: int) -> int:
    """Ends the process now if a call in the background would keep it alive; else returns the exit code.

    For a command that was asked to stop: a compilation of a large model takes minutes, and nobody wants it any more.
    """
    if any(thread.name == _BACKGROUND for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
