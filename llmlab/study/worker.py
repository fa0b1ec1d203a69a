"""`python -m llmlab.study.worker`: one local worker of a study, started by `llmlab.study.crew`.

Its order is the first line of its standard input. When that input ends, whoever started it is gone, and it saves and
leaves.
"""

import functools
import json
import os
import signal
import sys
import threading
from typing import Any

from llmlab.study.queue import Queue
from llmlab.study.work import FixedWork, Place, Work, load_job, work
from llmlab.training.faults import Interrupted, exit_if_busy


def main() -> int:
    """Works as the order says; returns the exit code."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_the_starter, name="starter", daemon=True).start()
    place = Place.from_json(order["place"])
    store = place.open()
    try:
        work(_work(place, store, order["task"]))
    except Interrupted as error:
        return exit_if_busy(error.exit_code)
    finally:
        store.close()
    return 0


def _work(place: Place, store: Any, task: dict[str, Any]) -> Work:
    load = functools.partial(load_job, place.folder, file=place.file)
    if task["design"] == "fixed":
        queue = Queue(store, task["jobs"], metric=place.metric, direction=place.direction)
        return FixedWork(place, queue, load, pruner=task["pruner"], seeds_together=task["seeds_together"])
    from llmlab.study.search import SampledWork, Search
    from llmlab.study.sweep import read_sweep

    assert place.file is not None  # a space is Python: it is read from its file
    return SampledWork(place, store, load(task["base"]), read_sweep(place.file).space, Search(**task["search"]))


def _leave_with_the_starter() -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not sys.stdin.read: its lock, held at exit, would be a fatal error
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
