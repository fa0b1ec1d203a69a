"""A worker of tests: the queue of real workers, and a training that takes a moment and leaves a line.

    python tests/study/workers.py ORDER     ORDER: JSON with url, study, folder, jobs {hash: name}, seconds

A line "<hash> <pid>" in <folder>/begun/<pid> says that it began, in <folder>/ended/<pid> that it ended.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from llmlab.study.queue import Claim, Queue
from llmlab.study.storage import open_study
from llmlab.study.trials import Status, Trial
from llmlab.study.work import work


class FakeWork:
    """Work on a queue, without training."""

    def __init__(self, queue: Queue, folder: Path, seconds: float) -> None:
        self.queue = queue
        self._folder = folder
        self._seconds = seconds

    def take(self) -> Claim | None:
        return self.queue.take()

    def settled(self) -> bool:
        return self.queue.settled()

    def run(self, claim: Claim) -> None:
        with self.queue.alive(claim):
            self._note("begun", claim)
            time.sleep(self._seconds)
            self._note("ended", claim)
            summary = {"step": 1, "validation/loss": 1.0, "seconds": {"total": self._seconds}}
            trial = Trial(directory=self._folder, hash=claim.hash, status=Status.FINISHED, summary=summary)
            self.queue.finish(claim, trial)

    def _note(self, what: str, claim: Claim) -> None:
        import os

        (self._folder / what).mkdir(exist_ok=True)
        with (self._folder / what / str(os.getpid())).open("a", encoding="utf-8") as file:
            file.write(claim.hash + "\n")


def main(order: dict[str, Any]) -> None:
    folder = Path(order["folder"])
    store = open_study(order["url"], order["study"])
    queue = Queue(store, order["jobs"], metric="validation/loss", direction="lower")
    queue.enqueue()
    work(FakeWork(queue, folder, order["seconds"]))
    store.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
