"""Memory that a step frees is kept for the next one."""

import os
import platform
import subprocess
import sys

import pytest

from llmlab.training import host_memory

PROGRAM = """
import resource, threading
from llmlab.training import host_memory

told = host_memory.keep({}) if KEEP else None

def step():  # numpy's arrays are malloc's; four of 64 MB, every page of them written
    import numpy as np
    for _ in range(4):
        np.ones(2**24, np.float32)

def faults(number):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(number):
        thread = threading.Thread(target=step)  # as XLA's are: other threads have arenas of their own
        thread.start()
        thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(1)
print(told, faults(3))
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")


def told_and_faults(*, keep: bool) -> tuple[str, int]:
    """Whether malloc was told, and the pages that the system cleared for three steps."""
    program = PROGRAM.replace("KEEP", repr(keep))
    variables = ("LD_PRELOAD", "GLIBC_TUNABLES")
    environment = {
        name: value for name, value in os.environ.items() if name not in variables and not name.startswith("MALLOC_")
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    told, faults = done.stdout.split()
    return told, int(faults)


@glibc
def test_a_step_takes_the_memory_of_the_one_before() -> None:
    told, kept = told_and_faults(keep=True)
    _, returned = told_and_faults(keep=False)
    assert told == "True"
    assert returned > 10 * kept  # kept, a few of Python's own


@glibc
@pytest.mark.parametrize("name", ["LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_an_allocator_that_the_environment_chose_is_left_alone(name: str) -> None:
    assert not host_memory.keep({name: "1"})


def test_elsewhere_than_on_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not host_memory.keep({})
