"""What the engine does next: continuous batching as bookkeeping, without a device.

A batch that is decoded to the end of its longest row leaves the rows of shorter ones idle, about half of all work when
lengths differ. Here rows are free to change between any two calls (Orca: Yu et al. 2022): whoever has finished leaves
and whoever waits comes in. A plan of one step is, in this order,

    decode     every row that has its prompt stored gets blocks for the tokens of the next call. Where there are none,
               the least important row is preempted (lowest priority, then latest arrival): its blocks are given back,
               and it comes in again before those who wait, its keys and values computed anew or swapped in
    admit      who waits gets a row and blocks for the whole prompt, as long as there are both; nobody overtakes who is
               next, so that a long prompt is not passed by short ones for ever. Nothing is admitted in a step that
               preempted someone
    prefill    chunks of the prompts that came in, within a budget of tokens, so that rows that are being decoded do not
               wait for a long prompt (Sarathi: Agrawal et al. 2023, 2308.16369)

The last token of a prompt is not part of its prefill: it is the first to be decoded, and so the only place where tokens
are chosen is the decoding call. Samples of one prompt come in together, share what the prefill stored, and part then.

The most important row is never preempted and its request fits the blocks (or was refused), so it ends; then the next
one is the most important. Nobody waits for ever but for requests of a higher priority.
"""

from dataclasses import dataclass

from llmlab.infer.engine.blocks import Blocks, Copy, OutOfBlocks, Table, keys_of
from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.fair import FairQueue
from llmlab.infer.engine.jobs import Chunk, Job, Move, Phase, Plan, Sample, SwapIn, SwapOut
from llmlab.infer.engine.request import EngineBusy, Request, RequestRefused


@dataclass
class Counters:
    """What has happened so far."""

    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Scheduler:
    """See the module's docstring. What it plans counts as done: a plan is carried out before the next one is made.

    Args:
        config: how much at once; `num_blocks` and `max_length` are given.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert config.num_blocks is not None
        assert config.max_length is not None
        self.config, self.max_length = config, config.max_length
        self.blocks = Blocks(config.num_blocks, config.block_size)
        self.queue = FairQueue()
        self.running: list[Sample] = []
        self.preempted: list[Sample] = []
        self.counters = Counters()
        self._arrivals = 0
        self._moves: list[Move] = []

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not (self.running or self.preempted or len(self.queue))

    # --- requests come and go ---

    def check(self, request: Request) -> None:
        """Raises RequestRefused where a request could never be served."""
        length = len(request.prompt_ids)
        if length >= self.max_length:
            raise RequestRefused(
                f"the prompt has {length} tokens and there are {self.max_length} positions; "
                f"shorten it to at most {self.max_length - 1}"
            )
        if request.n > self.config.max_rows:
            raise RequestRefused(f"n={request.n} samples do not fit the engine's {self.config.max_rows} rows")
        most = max(self._blocks(self.last_length(request)), self._first_blocks(request, length - 1, request.n))
        if most > self.blocks.num_blocks:
            raise RequestRefused(
                f"a prompt of {length} tokens, max_new_tokens={request.max_new_tokens} and n={request.n} need {most} "
                f"blocks of {self.config.block_size} positions and there are {self.blocks.num_blocks}; ask for less, "
                "or give the engine more num_blocks"
            )

    def last_length(self, request: Request) -> int:
        """Positions that a sample may come to store; its last new token is not among them."""
        return min(len(request.prompt_ids) + request.max_new_tokens - 1, self.max_length)

    def add(self, request: Request) -> Job:
        """A request that waits from now on. Raises RequestRefused where it cannot be served or too many wait."""
        self.check(request)
        if len(self.queue) >= self.config.max_waiting:
            raise EngineBusy(f"{len(self.queue)} requests are waiting, which is max_waiting; try again later")
        job = Job(request, self._arrivals)
        self._arrivals += 1
        job.samples = [
            Sample(job, number, Table(self.blocks, request.cache_salt), list(request.prompt_ids))
            for number in range(request.n)
        ]
        self.queue.arrive(job)
        return job

    def decoded(self, sample: Sample, new_ids: list[int]) -> None:
        """The decoding call drew these tokens; all but the last of them, and the one before them, are stored."""
        sample.ids += new_ids
        sample.table.length += len(new_ids)
        self._keep(sample)
        self.counters.generated_tokens += len(new_ids)
        self.queue.serve(sample.job, new_tokens=len(new_ids))

    def finish(self, sample: Sample) -> None:
        """A sample has ended: its blocks are free, those of others apart."""
        if sample.phase is Phase.DONE:
            return
        for place in (self.running, self.preempted):
            if sample in place:
                place.remove(sample)
        sample.phase = Phase.DONE
        sample.table.free()
        if sample.job.done:
            if sample.job.queued:
                self.queue.remove(sample.job)
                sample.job.queued = False
            self.queue.leave(sample.job)

    def finish_all(self, job: Job) -> None:
        """A request has ended."""
        for sample in job.samples:
            self.finish(sample)

    # --- what to do next ---

    def plan(self) -> Plan:
        """The next step."""
        self._moves = []
        single = any(sample.job.request.constraint is not None for sample in self.running)
        steps = 1 if single else self.config.steps_per_call
        before = self.counters.preemptions
        decode = self._growing(steps)
        if self.counters.preemptions == before:
            self._admit()
        chunks = self._chunks()
        moves, self._moves = self._moves, []
        for sample in self.running:  # whose prompt this step stores decodes at once, if nobody has to go for it
            if sample.phase is Phase.DECODE and sample not in decode and self._grow(sample, steps):
                decode.append(sample)
        if any(sample.job.request.constraint is not None for sample in decode):
            steps = 1
        copies = tuple(move for move in self._moves if isinstance(move, Copy))
        return Plan(tuple(moves), tuple(chunks), copies, tuple(decode), steps)

    def _growing(self, steps: int) -> list[Sample]:
        """The rows that are being decoded, with blocks for the next tokens."""
        decode = []
        for sample in sorted((s for s in self.running if s.phase is Phase.DECODE), key=lambda s: s.importance):
            while sample.phase is Phase.DECODE and not self._grow(sample, steps):
                self._preempt(max(self.running, key=lambda s: s.importance))
            if sample.phase is Phase.DECODE:
                decode.append(sample)
        return decode

    def _grow(self, sample: Sample, steps: int) -> bool:
        try:
            self._moves += sample.table.grow(self._until(sample.job.request, sample.table.length, steps))
        except OutOfBlocks:
            return False
        return True

    def _preempt(self, sample: Sample) -> None:
        self.counters.preemptions += 1
        self.running.remove(sample)
        self.preempted.append(sample)
        # What a prefill has stored is computed again at the same boundaries: no need to swap it.
        if sample.phase is Phase.DECODE and self.config.swaps:
            used = sample.table.blocks[: self._blocks(sample.table.length)]
            self._moves.append(SwapOut(sample, tuple(used)))
            sample.swapped_length, sample.phase = sample.table.length, Phase.SWAPPED
        else:
            sample.phase = Phase.PREEMPTED
        sample.table.free()

    def _admit(self) -> None:
        while True:
            back = min(self.preempted, key=lambda s: s.importance, default=None)
            job = self.queue.first()
            if back is not None and (job is None or back.job.priority >= job.priority):
                if not self._enter(back):
                    return
                self.preempted.remove(back)
            elif job is not None:
                if not self._enter(job.samples[0]):
                    return
                self.queue.remove(job)
                job.queued = False
            else:
                return

    def _enter(self, sample: Sample) -> bool:
        """Give a sample, and those that will share its prefill, a row and blocks; False where there are not enough."""
        request, headroom = sample.job.request, len(self.running)
        together = 1 + len(self._followers(sample))
        taken = headroom + sum(len(self._followers(s)) for s in self.running if s.phase is Phase.PREFILL)
        if taken + together > self.config.max_rows:
            return False
        if sample.phase is Phase.SWAPPED:
            until = self._until(request, sample.swapped_length, self.config.steps_per_call)
            if self._blocks(until) + headroom > self.blocks.num_free:
                return False
            self._swap_in(sample)
            return True
        stored = len(sample.ids) - 1
        keys = self._known(sample)
        found = self.blocks.find(keys)
        if self.config.deterministic:  # only whole chunks, so that what is left is cut as it is without the prefix
            found = found[: len(found) - len(found) % (self.config.prefill_chunk // self.config.block_size)]
        in_use = sum(self.blocks.count(block) > 0 for block in found)
        if self._first_blocks(request, stored, together) - in_use + headroom > self.blocks.num_free:
            return False
        sample.table.adopt(found, keys[: len(found)])
        sample.table.grow(stored)
        if sample.num_new == 0 and sample.phase is Phase.WAITING:
            self.counters.prompt_tokens += stored + 1
            self.counters.prefix_hit_tokens += sample.table.length
            self.queue.serve(sample.job, prompt_tokens=stored + 1 - sample.table.length)
        sample.phase = Phase.PREFILL
        self.running.append(sample)
        if sample.table.length == stored:
            self._stored(sample)
        return True

    def _swap_in(self, sample: Sample) -> None:
        sample.table.grow(sample.swapped_length)
        sample.table.length = sample.swapped_length
        self._moves.append(SwapIn(sample, tuple(sample.table.blocks)))
        sample.phase = Phase.DECODE
        self.running.append(sample)

    def _chunks(self) -> list[Chunk]:
        """What to store of the prompts that came in."""
        chunk = self.config.prefill_chunk
        budget = self.config.prefill_budget or 2 * chunk
        chunks = []
        for sample in sorted((s for s in self.running if s.phase is Phase.PREFILL), key=lambda s: s.importance):
            stored = len(sample.ids) - 1
            while budget > 0 and sample.table.length < stored:
                start = sample.table.length
                stop = min((start // chunk + 1) * chunk, stored)
                chunks.append(Chunk(sample, start, stop, tuple(sample.table.blocks[: self._blocks(stop)])))
                sample.table.length = stop
                budget -= stop - start
            if sample.table.length == stored:
                self._stored(sample)
        return chunks

    def _stored(self, sample: Sample) -> None:
        """A sample's tokens are stored: it decodes, and so do those that waited for it."""
        self._keep(sample)
        sample.phase = Phase.DECODE
        for follower in self._followers(sample):
            follower.table, follower.phase = sample.table.fork(), Phase.DECODE
            self.running.append(follower)

    def _followers(self, sample: Sample) -> list[Sample]:
        """The samples that share this one's prefill and wait for it."""
        return [s for s in sample.job.samples if s is not sample and s.phase is Phase.WAITING]

    # --- blocks ---

    def _blocks(self, length: int) -> int:
        return -(-length // self.config.block_size)

    def _until(self, request: Request, length: int, steps: int) -> int:
        """Positions that a row needs for a call of this many steps."""
        return min(length + steps, self.last_length(request))

    def _first_blocks(self, request: Request, stored: int, together: int) -> int:
        """Blocks that samples need for what they share and for their first call."""
        all_of_one = self._blocks(self._until(request, stored, self.config.steps_per_call))
        return all_of_one + (together - 1) * (all_of_one - stored // self.config.block_size)

    def _known(self, sample: Sample) -> list[bytes]:
        """Keys under which what a sample stores may be found."""
        request = sample.job.request
        scored = request.prompt_logprobs and sample.num_new == 0  # needs the hidden states of the whole prompt
        if not self.config.prefix_caching or scored:
            return []
        return keys_of(sample.ids[:-1], self.config.block_size, request.cache_salt)

    def _keep(self, sample: Sample) -> None:
        """Let what a sample has stored be found by others."""
        if not self.config.prefix_caching:
            return
        stop = sample.table.length
        if self.config.deterministic:  # what whole chunks of the prompt stored, and nobody else would store otherwise
            chunk = self.config.prefill_chunk
            stop = (len(sample.job.request.prompt_ids) - 1) // chunk * chunk
        sample.table.keep(sample.ids, stop)
