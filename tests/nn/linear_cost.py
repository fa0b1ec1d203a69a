"""What it means that a computation costs what its length says: FLOPs, memory and time at twice the length."""

import time
from collections.abc import Sequence
from typing import Any

import jax

from llmlab.plan.cost import count
from tests.optimised import compiled


def assert_linear(short: Sequence[Any], long: Sequence[Any]) -> None:
    """FLOPs and temporary memory at most 2.2 times, time at most 2.6 times as much at twice the length.

    Args:
        short: a function and its arguments.
        long: the same at twice the length.
    """
    flops = [count(*call).flops for call in (short, long)]
    assert flops[1] < 2.2 * flops[0]
    programs = [compiled(function, *arguments) for function, *arguments in (short, long)]
    analyses: list[Any] = [program.memory_analysis() for program in programs]
    memory = [analysis.temp_size_in_bytes for analysis in analyses]
    assert memory[1] < 2.2 * memory[0]
    # The best of several runs, short and long in turn: others disturb caches, too.
    times = [[_seconds(p, call[1:]) for p, call in zip(programs, (short, long), strict=True)] for _ in range(8)]
    assert min(long for _, long in times) < 2.6 * min(short for short, _ in times)


def _seconds(program: Any, arguments: Sequence[Any]) -> float:
    """Time that this process computed: a wall clock would count what else the machine does."""
    start = time.process_time()
    jax.block_until_ready(program(*arguments))
    return time.process_time() - start
