"""The engine: many requests on one model, each as if it were alone.

    engine = Engine(model, tokenizer, EngineConfig(max_rows=16))
    engine.warm_up()
    with engine:                                  # its own thread, until the end of the block
        handle = engine.submit(Request(tokenizer.encode("Once"), max_new_tokens=64))
        for event in handle.events():
            print(event.text, end="")

One step of the engine asks the scheduler for a plan (scheduler.py), has the device carry it out (device.py), and tells
the requests what came of it. Throughput comes from rows that are never idle while someone waits; it is paid for with
the copies of paging (paged.py), with a few milliseconds of bookkeeping between decoding calls, and with the tokens that
a row's call drew beyond its end: `steps_per_call` weighs them against each other.

Deterministic mode. What a request gets is, to the bit, what it would get from an engine that serves nothing else: its
tokens, text and log-probabilities do not depend on who else is there, on prefixes that were found, on preemption. Sums
of floating-point numbers depend on their order, and libraries choose that by shape; so every shape is fixed:

- decoding runs one program: all rows, whether anyone is in them, and windows of full length. In it no operation mixes
  rows, and a row gets what the stages that it needs itself make of its scores, whoever else needs others;
- prompts go in whole chunks, cut at multiples of `prefill_chunk` from their first token, each padded to a chunk. Only
  what whole chunks of a prompt stored is found again by others, so a found prefix has the numbers that would have been
  computed; what decoding stored is not offered, for it has other last bits;
- preempted rows are swapped, not computed again.

It holds for one engine configuration, device and version of the software. The price: attention reads `max_length`
positions for every token, and few rows cost as much as all.

Failures. What goes wrong with one request (its callback, its constraint, scores that are no numbers) ends that request
with an event that says so. A failure of the device ends those that run; the engine goes on with empty blocks.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import cast

import jax
from flax import nnx

from llmlab.infer.constraints import Matcher, matcher
from llmlab.infer.engine.config import EngineConfig, Stats
from llmlab.infer.engine.device import Device
from llmlab.infer.engine.jobs import Job, Phase, Plan, Sample
from llmlab.infer.engine.programs import Drawn
from llmlab.infer.engine.request import EngineClosed, Event, FinishReason, Handle, Request, RequestRefused
from llmlab.infer.engine.rows import DecodeRow
from llmlab.infer.engine.scheduler import Scheduler
from llmlab.infer.engine.work import Work
from llmlab.infer.sampling import check_vocabulary
from llmlab.sharding.rules import Placement
from llmlab.tokenizers import Tokenizer

_logger = logging.getLogger(__name__)


News = list[tuple[Job, Event]]


class Engine:
    """See the module's docstring; every method but `step` may be called from any thread.

    Args:
        model: a decoder, its parameters where they are to stay.
        tokenizer: the one it was trained with.
        config: how much at once, and where things are kept.
        placement: the mesh that the parameters are on; None for one device.

    Raises:
        ValueError: the model cannot be served from blocks, or there is no memory for them.
    """

    def __init__(
        self,
        model: nnx.Module,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        placement: Placement | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._device = Device(model, tokenizer.vocab_size, config or EngineConfig(), placement)
        self.config = self._device.config
        """As given, with nothing left to choose."""
        self._scheduler = Scheduler(self.config)
        self._works: dict[Job, Work] = {}
        self._cancelled: list[Handle] = []
        self._finished: Counter[str] = Counter()
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._refusing = ""  # why no request is taken, if that is so
        self._closing = False

    # --- for those who ask ---

    def submit(self, request: Request) -> Handle:
        """Take a request; it is served when its turn comes.

        Raises:
            RequestRefused: it can never be served, too many wait, or the engine takes none any more.
        """
        matchers = self._checked(request)
        with self._changed:
            if self._refusing:
                raise EngineClosed(self._refusing)
            job = self._scheduler.add(request)
            handle = Handle(request, lambda: self._cancel(handle))
            self._works[job] = Work.of(handle, self.tokenizer, self._scheduler.max_length, matchers)
            self._changed.notify_all()
        return handle

    def stats(self) -> Stats:
        """Where the engine is."""
        with self._changed:
            scheduler = self._scheduler
            return Stats(
                running=len(scheduler.running),
                waiting=len(scheduler.queue) + len(scheduler.preempted),
                blocks_total=scheduler.blocks.num_blocks,
                blocks_free=scheduler.blocks.num_free,
                blocks_cached=scheduler.blocks.num_cached,
                prefix_hit_tokens=scheduler.counters.prefix_hit_tokens,
                preemptions=scheduler.counters.preemptions,
                prompt_tokens=scheduler.counters.prompt_tokens,
                generated_tokens=scheduler.counters.generated_tokens,
                finished=dict(self._finished),
                compilations=self._device.compilations,
            )

    @property
    def cache_bytes(self) -> int:
        """Memory of all blocks."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._device.pools))

    # --- its life ---

    def warm_up(self, progress: Callable[[str], None] | None = None) -> None:
        """Compile all programs, so that no request waits for it. Call it before `start`.

        Args:
            progress: called with what is compiled next.
        """
        self._device.warm_up(progress)

    def start(self) -> None:
        """Serve from a thread of its own."""
        with self._changed:
            if self._refusing:
                raise RuntimeError(f"the engine cannot start: {self._refusing}")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="llmlab-engine", daemon=True)
                self._thread.start()

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and serve those that are there.

        Args:
            timeout: seconds to wait at most; None for no limit.

        Returns:
            Whether all have ended.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            self._refusing = self._refusing or "the engine is shutting down and takes no more requests"
        if self._thread is None:
            while (deadline is None or time.monotonic() < deadline) and self.step():
                pass
        with self._changed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            return self._changed.wait_for(lambda: not self._works, left)

    def close(self) -> None:
        """Stop; requests that have not ended are cancelled."""
        with self._changed:
            self._refusing = "the engine is closed"
            self._closing = True
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        with self._changed:
            news = [one for job in list(self._works) for one in self._end(job, "cancelled")]
        self._deliver(news)

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._cancelled or not self._scheduler.idle)
                if self._closing:
                    return
            try:
                self.step()
            except Exception as error:  # whatever it is, nobody may wait for ever
                _logger.exception("the engine stops")
                self._give_up(f"the engine has failed: {error}")
                return

    def _give_up(self, message: str) -> None:
        """After a mistake of the engine's own: its books may be wrong, so they are not touched."""
        with self._changed:
            self._refusing = message
            news = [
                (job, Event(sample=number, finish_reason="error", message=message))
                for job, work in self._works.items()
                for number in work.handle.unfinished
            ]
        self._deliver(news)

    # --- one step ---

    def step(self) -> bool:
        """One scheduling step, for whoever drives the engine by hand; False when there was nothing to do."""
        with self._changed:
            news = self._end_cancelled()
            plan = self._scheduler.plan()
            rows, failed = self._decode_rows(plan)
            news += failed
            idle = self._scheduler.idle
        self._deliver(news)
        if not plan:
            return bool(news) or not idle
        try:
            drawn = self._carry_out(plan, rows)
        except Exception as error:  # out of memory, a lost device: which exceptions these are is the platform's affair
            _logger.exception("a step of the engine failed")
            with self._changed:
                news = self._start_again(error)
        else:
            with self._changed:
                news = self._record(rows, drawn)
        self._deliver(news)
        return True

    def _carry_out(self, plan: Plan, rows: Sequence[DecodeRow]) -> Drawn | None:
        device = self._device
        device.move(plan.moves)
        for chunk in plan.chunks:
            hidden_BSD = device.prefill(chunk)
            sample, request = chunk.sample, chunk.sample.job.request
            if request.prompt_logprobs and sample.num_new == 0:
                next_ids = sample.ids[chunk.start + 1 : chunk.stop + 1]
                scores = device.score(hidden_BSD, next_ids)
                with self._changed:
                    if (work := self._works.get(sample.job)) is not None:
                        work.score(chunk.start, next_ids, scores)
        device.copy(plan.copies)
        return device.decode(rows, plan.steps) if rows else None

    def _decode_rows(self, plan: Plan) -> tuple[list[DecodeRow], News]:
        """The rows of the decoding call, and what is to be told of those whose constraint failed."""
        rows: list[DecodeRow] = []
        news: News = []
        for sample in plan.decode:
            request, row = sample.job.request, self._works[sample.job].rows[sample.number]
            left = request.max_new_tokens - sample.num_new
            room = min(plan.steps, left, self._scheduler.max_length - sample.table.length)
            try:
                allowed = None if row.matcher is None else row.matcher.allowed()
            except Exception as error:  # a library's, on a schema of the caller's
                news += self._end(sample.job, "error", f"the constraint cannot be followed: {error}")
                continue
            rows.append(DecodeRow(sample, room, sorted(row.limits.stop_ids), allowed))
        return [row for row in rows if row.sample.phase is not Phase.DONE], news

    def _record(self, rows: Sequence[DecodeRow], drawn: Drawn | None) -> News:
        """What the drawn tokens mean to their requests."""
        news: News = []
        if drawn is None:
            return news
        for number, row in enumerate(rows):
            if row.sample.phase is Phase.DONE:
                continue
            try:
                news += self._push(row.sample, number, drawn)
            except Exception as error:  # of the tokenizer or a constraint: this request's alone
                news += self._end(row.sample.job, "error", f"{type(error).__name__}: {error}")
        return news

    def _push(self, sample: Sample, column: int, drawn: Drawn) -> News:
        work = self._works[sample.job]
        row, known = work.rows[sample.number], len(work.rows[sample.number].tokens)
        self._scheduler.decoded(sample, work.take(sample.number, column, drawn))
        if row.reason:
            event = work.event(sample.number, known, finish_reason=row.reason, stop=row.stop)
        elif not drawn.finite_B[column]:
            message = "the model's scores are not finite numbers; its parameters, or their precision, cannot do this"
            event = work.event(sample.number, known, finish_reason="error", message=message)
        else:
            return [(sample.job, work.event(sample.number, known))]
        self._finish(sample, cast(FinishReason, event.finish_reason))
        return [(sample.job, event)]

    # --- requests end ---

    def _cancel(self, handle: Handle) -> None:
        with self._changed:
            self._cancelled.append(handle)
            self._changed.notify_all()

    def _end_cancelled(self) -> News:
        handles, self._cancelled = self._cancelled, []
        jobs = [job for job, work in self._works.items() if work.handle in handles] if handles else []
        return [one for job in jobs for one in self._end(job, "cancelled")]

    def _end(self, job: Job, reason: FinishReason, message: str = "") -> News:
        """End all samples of a request that have not."""
        news: News = []
        for sample in job.samples:
            if sample.phase is not Phase.DONE:
                news.append((job, Event(sample=sample.number, finish_reason=reason, message=message)))
                self._finish(sample, reason)
        return news

    def _finish(self, sample: Sample, reason: FinishReason) -> None:
        self._scheduler.finish(sample)
        self._device.host.pop(sample, None)
        self._finished[reason] += 1

    def _start_again(self, error: Exception) -> News:
        """After a failure of the device: what was stored on it cannot be trusted to be there."""
        lost = {sample.job: None for sample in self._scheduler.running}  # a set that keeps the order
        for sample in self._scheduler.preempted:
            if sample.phase is Phase.SWAPPED and sample not in self._device.host:
                lost[sample.job] = None
        news = [one for job in lost for one in self._end(job, "error", f"the device failed: {error}")]
        self._scheduler.blocks.forget()
        self._device.reset()
        return news

    def _deliver(self, news: News) -> None:
        """Tell requests what is new; no lock is held, for a callback may take a while or ask for something."""
        while news:
            job, event = news.pop(0)
            work = self._works[job]
            try:
                work.handle.put(event)
            except Exception as error:  # a callback's: this request's alone
                _logger.exception("a callback failed")
                with self._changed:
                    news += self._end(job, "error", f"a callback failed: {type(error).__name__}: {error}")
            if work.handle.finished:
                with self._changed:
                    self._works.pop(job, None)
                    self._changed.notify_all()

    # --- requests begin ---

    def _checked(self, request: Request) -> list[Matcher | None]:
        """What follows the constraint of each sample. Raises RequestRefused for what cannot be served."""
        wrong = [index for index in request.prompt_ids if not 0 <= index < self.tokenizer.vocab_size]
        if wrong:
            raise RequestRefused(
                f"token {wrong[0]} of the prompt is not in the vocabulary; ids run from 0 to "
                f"{self.tokenizer.vocab_size - 1}"
            )
        self._device.check(request)
        try:
            check_vocabulary(request.sampling, self.tokenizer.vocab_size)
            first = None if request.constraint is None else matcher(request.constraint, self.tokenizer)
        except (ValueError, ImportError) as error:
            raise RequestRefused(str(error)) from error
        return [None if first is None else first.copy() for _ in range(request.n)]
