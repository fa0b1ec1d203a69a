import contextlib
import threading
import time

import numpy as np
import pytest

from llmlab.data.prefetch import prefetch


def batch(step: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.full((1, 1), step)}


def number(placed: dict[str, np.ndarray]) -> int:
    return int(placed["input_ids"][0, 0])


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_batches_come_in_order_from_the_start_given_to_the_stop_given(depth: int) -> None:
    assert list(prefetch(batch, 5, number, stop=11, depth=depth)) == [5, 6, 7, 8, 9, 10]
    assert list(prefetch(batch, 5, number, stop=5, depth=depth)) == []


def test_the_thread_is_ahead_by_the_depth_and_no_further() -> None:
    made: list[int] = []

    def note(placed: dict[str, np.ndarray]) -> int:
        made.append(number(placed))
        return made[-1]

    with contextlib.closing(prefetch(batch, 0, note, depth=3)) as batches:
        assert next(batches) == 0
        deadline = time.monotonic() + 10
        while len(made) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2]


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_comes_out_at_its_own_step_with_its_own_traceback(depth: int) -> None:
    def fails_at_2(step: int) -> dict[str, np.ndarray]:
        if step == 2:
            raise OSError("the disk is gone")
        return batch(step)

    batches = prefetch(fails_at_2, 0, number, depth=depth)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone") as raised:
        next(batches)
    assert any(entry.name == "fails_at_2" for entry in raised.traceback)
    assert not prefetch_threads()


def test_closing_ends_the_thread_whether_read_or_not() -> None:
    for reads in (0, 1, 2):
        batches = prefetch(batch, 0, number, depth=2)
        for _ in range(reads):
            next(batches)
        batches.close()
        assert not prefetch_threads()


def test_an_abandoned_iterator_leaves_no_thread() -> None:
    for value in prefetch(batch, 0, number, depth=2):
        if value == 3:
            break
    assert not prefetch_threads()


def test_negative_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="depth=-1"):
        prefetch(batch, 0, number, depth=-1)
