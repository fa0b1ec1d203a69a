"""The scheduler, driven without a device: every request ends, nobody starves, blocks never exceed what there is."""

from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llmlab.infer.engine.blocks import Copy
from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.jobs import Job, Phase, Plan, Sample, SwapIn, SwapOut
from llmlab.infer.engine.request import Request, RequestRefused
from llmlab.infer.engine.scheduler import Scheduler

CONFIG = EngineConfig(
    block_size=4, num_blocks=20, max_rows=4, max_length=48, prefill_chunk=8, steps_per_call=3, max_waiting=64
)


class Simulation:
    """Carries plans out on lists of tokens in place of a device, and checks that what is read is what was written."""

    def __init__(self, config: EngineConfig) -> None:
        self.scheduler = Scheduler(config)
        self.size = config.block_size
        self.memory: dict[int, list[int]] = {b: [-1] * self.size for b in range(self.scheduler.blocks.num_blocks)}
        self.host: dict[Sample, list[list[int]]] = {}
        self.lengths: dict[Sample, int] = {}
        self.jobs: list[Job] = []
        self.finished: list[Job] = []

    def submit(self, request: Request, lengths: list[int]) -> Job:
        """A request whose samples will write so many tokens each."""
        job = self.scheduler.add(request)
        self.jobs.append(job)
        for sample, length in zip(job.samples, lengths, strict=True):
            self.lengths[sample] = min(length, request.max_new_tokens)
        return job

    def step(self) -> bool:
        plan = self.scheduler.plan()
        rows = self.scheduler.running
        assert len(rows) <= self.scheduler.config.max_rows
        assert sum(self.scheduler.blocks.count(b) > 0 for b in self.memory) <= self.scheduler.blocks.num_blocks
        self.carry_out(plan)
        for sample in plan.decode:
            self.decode(sample, plan.steps)
        return bool(plan)

    def carry_out(self, plan: Plan) -> None:
        for move in plan.moves:
            match move:
                case Copy(source, target):
                    self.memory[target] = list(self.memory[source])
                case SwapOut(sample, blocks):
                    self.host[sample] = [list(self.memory[block]) for block in blocks]
                case SwapIn(sample, blocks):
                    for block, content in zip(blocks, self.host.pop(sample), strict=False):
                        self.memory[block] = content
        for chunk in plan.chunks:
            assert chunk.start // 8 == (chunk.stop - 1) // 8, "a chunk crosses a multiple of its length"
            for position in range(chunk.start, chunk.stop):
                self.memory[chunk.blocks[position // self.size]][position % self.size] = chunk.sample.ids[position]
            self.check(chunk.sample, chunk.stop, chunk.blocks)
        for copy in plan.copies:
            self.memory[copy.target] = list(self.memory[copy.source])

    def check(self, sample: Sample, length: int, blocks: tuple[int, ...] | list[int]) -> None:
        stored = [token for block in blocks for token in self.memory[block]]
        assert stored[:length] == sample.ids[:length]

    def decode(self, sample: Sample, steps: int) -> None:
        """Draws tokens as a device does, which only notices at the end of the call that a sample has ended."""
        table = sample.table
        assert table.length == len(sample.ids) - 1
        self.check(sample, table.length, table.blocks)
        left = self.lengths[sample] - sample.num_new
        new = [1000 * sample.job.arrival + 100 * sample.number + sample.num_new + i for i in range(min(steps, left))]
        for position, token in zip(range(table.length, table.length + len(new)), [sample.ids[-1], *new], strict=False):
            block = table.blocks[position // self.size]
            assert self.scheduler.blocks.count(block) == 1, "a shared block is written to"
            self.memory[block][position % self.size] = token
        self.scheduler.decoded(sample, new)
        if sample.num_new == self.lengths[sample]:
            self.scheduler.finish(sample)
            if sample.job.done:
                self.finished.append(sample.job)

    def run(self, limit: int = 2000) -> int:
        for number in range(limit):
            if not self.step():
                assert self.scheduler.idle
                return number
        raise AssertionError(f"not idle after {limit} steps")


requests = st.tuples(
    st.lists(st.integers(0, 1), min_size=1, max_size=30),
    st.integers(1, 14),  # new tokens
    st.integers(1, 3),  # samples
    st.integers(-1, 1),  # priority
    st.sampled_from([None, "a", "b"]),
    st.integers(0, 6),  # steps until the next one comes
    st.booleans(),  # cancelled when that one comes
)


@settings(max_examples=80, deadline=None)
@given(
    arrivals=st.lists(requests, max_size=14),
    preemption=st.sampled_from(["recompute", "swap"]),
    num_blocks=st.integers(14, 24),
    deterministic=st.booleans(),
)
def test_every_request_ends_and_every_block_comes_back(arrivals, preemption, num_blocks, deterministic):
    preemption = "swap" if deterministic else preemption
    config = replace(CONFIG, num_blocks=num_blocks, preemption=preemption, deterministic=deterministic)
    simulation = Simulation(config)
    cancelled = 0
    for prompt, new, n, priority, user, pause, cancel in arrivals:
        request = Request(tuple(prompt), max_new_tokens=new, n=n, priority=priority, user=user)
        job = simulation.submit(request, [max(1, new - i) for i in range(n)])
        for _ in range(pause):
            simulation.step()
        if cancel and not job.done:
            simulation.scheduler.finish_all(job)
            cancelled += 1
    simulation.run()
    scheduler = simulation.scheduler
    assert len(simulation.finished) + cancelled == len(arrivals)
    for job in simulation.finished:
        assert [s.num_new for s in job.samples] == [simulation.lengths[s] for s in job.samples]
    assert scheduler.blocks.num_free == num_blocks
    assert all(scheduler.blocks.count(block) == 0 for block in range(num_blocks))
    assert not scheduler.queue._present  # counters of users are not kept for ever
    assert not scheduler.queue._served


def test_users_are_served_alike_however_much_they_ask_for():
    simulation = Simulation(replace(CONFIG, max_rows=2, num_blocks=64))
    for number in range(30):
        simulation.submit(Request((0, number), max_new_tokens=6, user="many"), [6])
    few = [simulation.submit(Request((1, number), max_new_tokens=6, user="few"), [6]) for number in range(6)]
    while not all(job.done for job in few):
        simulation.step()
    done = Counter(job.user for job in simulation.finished)
    assert done["few"] == 6
    assert done["many"] <= 8  # one row each; not the 30 that came before


def test_a_user_who_was_away_has_saved_nothing_up():
    simulation = Simulation(replace(CONFIG, max_rows=1, num_blocks=64))
    for number in range(12):
        simulation.submit(Request((0, number), max_new_tokens=6, user="here"), [6])
    while len(simulation.finished) < 4:
        simulation.step()
    for number in range(8):
        simulation.submit(Request((1, number), max_new_tokens=6, user="back"), [6])
    while len(simulation.finished) < 12:
        simulation.step()
    late = Counter(job.user for job in simulation.finished[4:])
    assert abs(late["here"] - late["back"]) <= 1


def test_a_long_prompt_is_not_overtaken_for_ever():
    simulation = Simulation(replace(CONFIG, num_blocks=14))
    simulation.submit(Request((0,) * 20, max_new_tokens=10), [10])
    long = simulation.submit(Request((1,) * 40, max_new_tokens=4), [4])
    short = [simulation.submit(Request((2, number), max_new_tokens=4), [4]) for number in range(20)]
    simulation.run()
    assert simulation.finished.index(long) < min(simulation.finished.index(job) for job in short[4:])


def test_a_higher_priority_goes_first_and_is_preempted_last():
    simulation = Simulation(replace(CONFIG, max_rows=2, num_blocks=13))
    low = [simulation.submit(Request((0, n, *[0] * 14), max_new_tokens=20), [20]) for n in range(3)]
    simulation.step()
    high = simulation.submit(Request((1,) * 16, max_new_tokens=20, priority=1), [20])
    simulation.run()
    assert simulation.finished.index(high) < simulation.finished.index(low[2])
    assert simulation.scheduler.counters.preemptions > 0


def test_prefill_goes_on_between_decoding_calls():
    simulation = Simulation(replace(CONFIG, prefill_budget=8, num_blocks=40))
    first = simulation.submit(Request((0, 1), max_new_tokens=20), [20])
    simulation.step()
    second = simulation.submit(Request(tuple(range(40)), max_new_tokens=2), [2])
    seen = []
    for _ in range(4):
        simulation.step()
        seen.append((first.samples[0].num_new, second.samples[0].table.length))
    assert seen == [(6, 8), (9, 16), (12, 24), (15, 32)]


def test_samples_share_the_prompt():
    simulation = Simulation(CONFIG)
    job = simulation.submit(Request(tuple(range(23)), max_new_tokens=2, n=3), [2, 2, 2])
    simulation.scheduler.config = replace(CONFIG, steps_per_call=1)
    plan = simulation.scheduler.plan()
    simulation.carry_out(plan)
    plan = simulation.scheduler.plan()
    simulation.carry_out(plan)
    assert [s.phase for s in job.samples] == [Phase.DECODE] * 3
    tables = [s.table.blocks for s in job.samples]
    assert tables[0][:5] == tables[1][:5] == tables[2][:5]
    assert len({table[5] for table in tables}) == 3
    assert len(plan.copies) == 2


def test_deterministic_prefixes_are_whole_chunks_of_prompts_and_nothing_that_decoding_stored():
    simulation = Simulation(replace(CONFIG, deterministic=True, num_blocks=30))
    scheduler = simulation.scheduler
    first = simulation.submit(Request(tuple(range(21)), max_new_tokens=14), [14])
    simulation.run()
    simulation.submit(Request(tuple(first.samples[0].ids), max_new_tokens=2), [2])
    simulation.run()
    assert scheduler.counters.prefix_hit_tokens == 16  # of 34 that are stored, 20 of them the prompt's
    taken = scheduler.blocks.take(scheduler.blocks.num_free - 3)  # the last block of the second chunk is forgotten
    scheduler.blocks.release(taken)
    simulation.submit(Request(tuple(range(21)), max_new_tokens=2), [2])
    simulation.run()
    assert scheduler.counters.prefix_hit_tokens == 16 + 8


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request((0,) * 48), "48 tokens and there are 48 positions; shorten it to at most 47"),
        (Request((0,), n=5), "n=5 samples do not fit the engine's 4 rows"),
        (Request((0,) * 47, n=4, max_new_tokens=8), "need 15 blocks of 4 positions and there are 14"),
    ],
)
def test_what_can_never_be_served_is_refused(request_, reason):
    scheduler = Scheduler(replace(CONFIG, num_blocks=14))
    with pytest.raises(RequestRefused, match=reason):
        scheduler.add(request_)


def test_a_full_queue_refuses():
    scheduler = Scheduler(replace(CONFIG, max_waiting=2))
    for _ in range(2):
        scheduler.add(Request((0,)))
    with pytest.raises(RequestRefused, match="2 requests are waiting"):
        scheduler.add(Request((0,)))
