"""Workers of one machine as processes of their own, started and stopped together.

Ctrl-C in a terminal reaches every process of the foreground; the workers are kept out of it and told once, by the
process that started them, so that each saves its checkpoint. When that process is gone, however it went, their standard
input ends, and they save and leave as well: nobody's machine is kept busy by what was forgotten.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from llmlab.study.work import Place
from llmlab.training.faults import Interrupted, Interruption

LOGS = "logs"
"""Below a study's folder: what each local worker printed."""

_POLL_SECONDS = 0.2
_MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # of a GPU, that a process takes at its start
_USABLE = 0.9
_STOP_SECONDS = 120  # to finish a step and save; a step of a large model takes its time


class Crew:
    """Local worker processes.

    Args:
        size: how many.
        place: of the study.
        task: what they work on, as `llmlab.study.worker` reads it.
    """

    def __init__(self, size: int, place: Place, task: Mapping[str, Any]) -> None:
        self._size = size
        self._place = place
        self._order = json.dumps({"place": place.to_json(), "task": dict(task)}) + "\n"
        self._processes: list[subprocess.Popen[str]] = []

    def work(self, settled: Callable[[], bool]) -> None:
        """Returns when all workers are done.

        Raises:
            Interrupted: Ctrl-C or SIGTERM; the workers have saved and left.
            RuntimeError: all are gone, and there is work left.
        """
        logs = self._place.folder / LOGS
        logs.mkdir(parents=True, exist_ok=True)
        with Interruption() as interruption:
            try:
                for index in range(self._size):
                    with interruption.deferred():
                        self._start(index, logs / f"worker-{index}.log")
                while any(process.poll() is None for process in self._processes):
                    time.sleep(_POLL_SECONDS)
            except Interrupted as error:
                with interruption.deferred():
                    self._stop(error.signal)
                raise
            except BaseException:
                self._stop(signal.SIGTERM)
                raise
        if not settled():
            codes = ", ".join(str(process.returncode) for process in self._processes)
            raise RuntimeError(
                f"all {self._size} workers ended (exit codes {codes}) with work left; what they said is in {logs}:\n"
                f"{_end_of(logs / 'worker-0.log')}\nthe same command goes on"
            )

    def _start(self, index: int, log: Path) -> None:
        with log.open("a", encoding="utf-8") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "llmlab.study.worker"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=os.environ | compiled_programs() | devices(index, self._size),
            )
        self._processes.append(process)
        assert process.stdin is not None
        _tell(process.stdin, self._order)  # not on the command line: the address of the storage may hold a password

    def _stop(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)
        until = time.monotonic() + _STOP_SECONDS
        for process in self._processes:
            try:
                process.wait(timeout=max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:  # its trial will be retried from its checkpoint
                process.kill()
                process.wait()


def _tell(pipe: IO[str], order: str) -> None:
    try:
        pipe.write(order)
        pipe.flush()
    except BrokenPipeError:
        pass  # it died at once; its log says why, and its exit code is looked at


def _end_of(path: Path) -> str:
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]) if path.exists() else ""


def compiled_programs() -> dict[str, str]:
    """Where this process keeps compiled programs, for its workers to use the same."""
    import jax

    directory = jax.config.values["jax_compilation_cache_dir"]
    if directory is None or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return {}
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(seconds),
    }


def devices(index: int, size: int, gpus: Sequence[str] | None = None) -> dict[str, str]:
    """Variables that give one of several workers its share of the GPUs.

    With fewer GPUs than workers, some share one, and each of these takes its part of the memory: jax would otherwise
    take most of it for the first.

    Args:
        index: of the worker.
        size: number of workers.
        gpus: names of the GPUs; None for those of CUDA_VISIBLE_DEVICES, or of this machine.
    """
    if gpus is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is not None:
            gpus = [name for name in visible.split(",") if name]
        else:
            gpus = [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    if not gpus or size == 1:
        return {}
    if len(gpus) >= size:
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[index::size])}
    sharers = -(-size // len(gpus))
    own = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]}
    return own if _MEMORY in os.environ else own | {_MEMORY: f"{_USABLE / sharers:.3f}"}
