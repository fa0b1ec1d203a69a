"""A run as plain lines: for log files, pipes and job schedulers. One line per event, made to be read and grepped.

[  0:03] tokenizer: SentencePiece unigram, 1,024 pieces
[  0:31] step   100/2000  loss 4.1234  lr 3.000e-03  grad 0.8312  10204 tok/s  92.4 GFLOP/s  mfu 18.3%  eta 4:12
[  0:33] step   100/2000  validation loss 4.2010
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from llmlab.display.numbers import duration, nats
from llmlab.display.summary import Closing
from llmlab.training.report import Level
from llmlab.training.throughput import readable_flops

# Seconds between two lines about the same progress: a tokenization of an hour is then 360 lines.
_PROGRESS_INTERVAL = 10.0


class PlainReport:
    """Writes one line per event to the console.

    Args:
        console: where to; its width does not break lines.
        closing: what the summary says about the run.
        clock: seconds, monotonic.
    """

    def __init__(self, console: Console, closing: Closing, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._closing = closing
        self._clock = clock
        self._began = clock()
        self._closed = False
        self._total_steps: int | None = None
        self._what, self._last_line, self._complete = "", self._began, False  # of the progress reported last

    def phase(self, name: str, detail: str = "") -> None:
        if self._total_steps is None or detail:  # in training, an evaluation says enough with its result
            self._line(f"{name}: {detail}" if detail else name)
        self._what = ""

    def progress(self, done: int, total: int | None, what: str) -> None:
        if what == "steps":
            self._total_steps = total
        elif self._total_steps is None:
            self._report_progress(done, total, what)

    def _report_progress(self, done: int, total: int | None, what: str) -> None:
        """A line when something of unknown length begins, when something ends, and now and then between."""
        now = self._clock()
        new = what != self._what
        if new:
            self._what, self._last_line, self._complete = what, now, False
        complete = total is not None and done >= total
        ended = complete and not self._complete
        self._complete = complete
        if (new and total is None) or ended or now - self._last_line >= _PROGRESS_INTERVAL:
            self._line(f"{what} {done / total:4.0%}" if total else f"{what} ({done:,})" if done else what)
            self._last_line = now

    def step(self, metrics: Mapping[str, float]) -> None:
        get = metrics.get
        parts = [self._step(metrics)]
        parts += [f"loss {nats(loss):>7}"] if (loss := get("train/loss")) is not None else []
        parts += [f"lr {rate:.3e}"] if (rate := get("learning_rate")) is not None else []
        parts += [f"grad {norm:7.4f}"] if (norm := get("gradient_norm")) is not None else []
        parts += [f"{speed:>7.0f} tok/s"] if (speed := get("tokens_per_second")) is not None else []
        parts += [readable_flops(flops)] if (flops := get("model_flops_per_second")) is not None else []
        parts += [f"mfu {mfu:>5.1%}"] if (mfu := get("mfu")) is not None else []
        parts += [f"eta {duration(eta)}"] if (eta := get("eta_seconds")) is not None else []
        self._line("  ".join(parts))

    def evaluation(self, metrics: Mapping[str, float]) -> None:
        losses = {key.removeprefix("validation/"): value for key, value in metrics.items() if "/" in key}
        shown = [f"validation {name} {nats(value)}" for name, value in losses.items()]
        self._line("  ".join([self._step(metrics), *shown]))

    def checkpoint(self, step: int) -> None:
        self._line(f"{self._step({'step': step})}  checkpoint saved")

    def message(self, text: str, level: Level = "info") -> None:
        self._line(text if level == "info" else f"{level}: {text}")

    def close(self, summary: Mapping[str, Any] | None = None) -> None:
        if summary is not None and not self._closed:
            self._console.print(self._closing.render(summary, self._console.options), crop=False)
        self._closed = True

    def _step(self, metrics: Mapping[str, float]) -> str:
        step = int(metrics.get("step", 0))
        total = self._total_steps
        return f"step {step}" if total is None else f"step {step:>{len(str(total))}}/{total}"

    def _line(self, text: str) -> None:
        elapsed = f"[{duration(self._clock() - self._began):>7}]"
        self._console.print(Text(f"{elapsed} {text}"), soft_wrap=True)
