"""Samples as the rows of a decoding call: who sits where, and what each asks, as arrays of fixed widths."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from llmlab.infer.engine.jobs import Sample
from llmlab.infer.engine.programs import Program, Rows, covers
from llmlab.infer.sampling import GREEDY, Counts, Needs, Sampling, SamplingRows

MAX_BIASED, MAX_FORCED, MAX_STOP_IDS = 512, 128, 8
"""Tokens of a request that the programs have room for: with a bias or ban, forced, and looked for on the device."""


@dataclass(frozen=True)
class DecodeRow:
    """One row of a decoding call."""

    sample: Sample
    room: int
    """Tokens that it may draw."""
    stop_ids: Sequence[int]
    allowed: np.ndarray | None = None
    """Bitmask of the tokens that it may draw, 32 to a word; None for all."""


class Seats:
    """Which sample has which row of the windows.

    A sample keeps its row from call to call, and a row is copied from its blocks only for a sample that was not in it:
    what is stored of a sample between two of its calls was stored by its calls, whatever it was preempted by.
    """

    def __init__(self, count: int, width: int) -> None:
        self.shape = (count, width)
        self.stale: list[int] = []
        """Rows whose window is not that of their blocks."""
        self._samples: list[Sample | None] = [None] * count

    def take(self, rows: Sequence[DecodeRow]) -> list[int]:
        """A row of the windows for each row of the call."""
        known = {sample: seat for seat, sample in enumerate(self._samples) if sample is not None}
        seats = [known.get(row.sample) for row in rows]
        free = iter(sorted(set(range(len(self._samples))) - set(seats)))
        taken = [next(free) if seat is None else seat for seat in seats]
        self.stale = []
        for seat, row in zip(taken, rows, strict=True):
            if self._samples[seat] is not row.sample:
                self.stale.append(seat)
                self._samples[seat] = row.sample
        return taken


class RowArrays:
    """Makes the arrays of decoding calls.

    Args:
        program: what they are for.
        row_counts: numbers of rows that calls have.
        padded: blocks as an array of some width.
    """

    def __init__(
        self, program: Program, row_counts: Sequence[int], padded: Callable[[Sequence[int], int], np.ndarray]
    ) -> None:
        self._program, self._padded = program, padded
        self._words = -(-program.num_tokens // 32)
        # Counts and bitmasks of rows that ask for neither, on the device once and for all.
        self._plain = {count: jax.device_put(self._particular([None] * count)) for count in row_counts}

    def rows(self, seated: Sequence[DecodeRow | None], width: int, stale: Sequence[int]) -> Rows:
        """The rows, None where nobody sits; `stale` are those whose windows must be filled."""
        count = len(seated)
        table_BW = np.stack([self._padded([], width)] * count)
        stop_BE = np.full((count, MAX_STOP_IDS), -1, np.int32)
        token_B, position_B, room_B, level_B, stale_B = (np.zeros(count, np.int32) for _ in range(5))
        stale_B[: len(stale)] = stale
        for number, row in enumerate(seated):
            if row is None:
                continue
            sample, stop_ids = row.sample, list(row.stop_ids)[:MAX_STOP_IDS]  # the engine looks for all of them
            token_B[number], position_B[number], room_B[number] = sample.ids[-1], sample.table.length, row.room
            table_BW[number, : len(sample.table.blocks)] = sample.table.blocks
            stop_BE[number, : len(stop_ids)] = stop_ids
            level_B[number] = self._level(sample.job.request.sampling, row.allowed is not None)
        counts, allowed_BW = self._plain[count]
        if len(self._program.levels) - 1 in level_B:
            counts, allowed_BW = self._particular(seated)
        return Rows(
            token_B=token_B,
            position_B=position_B,
            room_B=room_B,
            stop_BE=stop_BE,
            table_BW=table_BW,
            level_B=level_B,
            sampling=_sampling_rows(seated),
            counts=counts,
            allowed_BW=allowed_BW,
            stale_B=stale_B,
            num_stale=np.int32(len(stale)),
        )

    def nobody(self, count: int, width: int) -> Iterator[Rows]:
        """Rows without samples, in every form that a call's arguments have: for compilation."""
        rows = self.rows([None] * count, width, [])
        yield rows
        counts, allowed_BW = self._particular([None] * count)
        yield replace(rows, counts=counts, allowed_BW=allowed_BW)

    def _level(self, sampling: Sampling, constrained: bool) -> int:
        needs = Needs.of([sampling], allowed=constrained)
        return next(number for number, level in enumerate(self._program.levels) if covers(level, needs))

    def _particular(self, seated: Sequence[DecodeRow | None]) -> tuple[Counts, np.ndarray]:
        """What the level of all stages looks at."""
        prompts: list[list[int]] = [[] for _ in seated]
        texts: list[list[int]] = [[] for _ in seated]
        allowed_BW = np.full((len(seated), self._words), -1, np.int32)
        for number, row in enumerate(seated):
            if row is None:
                continue
            length = len(row.sample.job.request.prompt_ids)
            prompts[number], texts[number] = row.sample.ids[:length], row.sample.ids[length:]
            if row.allowed is not None:
                allowed_BW[number] = row.allowed[: self._words]
        return Counts.of(prompts, self._program.num_tokens, texts), allowed_BW


def _sampling_rows(seated: Sequence[DecodeRow | None]) -> SamplingRows:
    """The rows' sampling at the widths that programs are compiled for."""
    samplings, samples, starts, lasts = [], [], [], []
    for row in seated:
        request = None if row is None else row.sample.job.request
        samplings.append(GREEDY if request is None else request.sampling)
        samples.append(0 if row is None else row.sample.number)
        starts.append(0 if request is None else len(request.prompt_ids))
        lasts.append(0 if request is None else len(request.prompt_ids) + request.max_new_tokens - 1)
    made = SamplingRows.of(samplings, samples=samples, starts=starts, lasts=lasts)
    return replace(
        made,
        bias_id_BJ=_widened(made.bias_id_BJ, MAX_BIASED, 2**31 - 1),
        bias_BJ=_widened(made.bias_BJ, MAX_BIASED, 0),
        forced_BF=_widened(made.forced_BF, MAX_FORCED, -1),
    )


def _widened(array_BJ: Any, width: int, fill: int) -> np.ndarray:
    return np.pad(array_BJ, ((0, 0), (0, width - array_BJ.shape[1])), constant_values=fill)
