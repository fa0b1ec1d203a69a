"""Preparing the next batches in the background, while the device works on the present one."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def prefetch(
    batch: Callable[[int], dict[str, np.ndarray]],
    start: int,
    place: Callable[[dict[str, np.ndarray]], T],
    *,
    stop: int | None = None,
    depth: int = 2,
) -> Generator[T, None, None]:
    """The batches of steps start, start + 1, ..., made and placed by a thread that is ahead of the consumer.

        batches = prefetch(dataset.train.batch, step, place, stop=total_steps)
        with contextlib.closing(batches):
            for batch in batches:
                ...

    Args:
        batch: Makes the batch of a step.
        start: First step.
        place: Puts a batch on the device; runs in the thread as well.
        stop: The step after the last; None to go on for ever.
        depth: Batches kept ready. 0 makes each when it is asked for, without a thread.

    Yields:
        What `place` returned, in the order of steps. An error in the thread is raised here, when its step is due.

    Closing the generator (or leaving it to the garbage collector) ends the thread: at most the batch in work is
    finished, and it is waited for.
    """
    if depth < 0:
        raise ValueError(f"depth={depth} must not be negative; 0 makes batches without a thread")
    steps = iter(count(start) if stop is None else range(start, stop))
    if depth == 0:
        return (place(batch(step)) for step in steps)
    return _prefetch(lambda step: place(batch(step)), steps, depth)


def _prefetch(make: Callable[[int], T], steps: Iterator[int], depth: int) -> Generator[T, None, None]:
    ready: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        while True:
            while len(ready) < depth and (step := next(steps, None)) is not None:
                ready.append(pool.submit(make, step))
            if not ready:
                return
            yield ready.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
