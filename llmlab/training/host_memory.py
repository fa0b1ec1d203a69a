"""On a CPU, memory that one step frees is kept for the next.

A step on a CPU allocates its activations and temporary arrays anew and frees them at its end, hundreds of megabytes of
them. glibc's malloc gives blocks of that size back to the system at once, which clears every page of them when the
next step asks: 165,000 page faults and a tenth of the time in a step of GPT-2 with 14 million parameters on two cores,
more on simulated devices, which have their arrays each (experiments/benchmarks/results/mesh_cpu.md).

The price is that the process stays as large as it ever was, and that all threads allocate from one arena: of the
others, glibc returns what is free whatever it is told, so that without this part nothing is gained. XLA's arrays are
few and large, each thread has a cache of small blocks, and Python's own small objects do not go through malloc;
compiling took no longer. All of this was measured on two cores of one processor.
"""

import ctypes
import platform
from collections.abc import Mapping

# Parameters of mallopt(3), as glibc's malloc.h numbers them, and what they are set to.
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8
_SETTINGS = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}


def keep(environment: Mapping[str, str]) -> bool:
    """Tells glibc's malloc to keep what is freed, unless `environment` chooses an allocator or its settings
    (LD_PRELOAD, GLIBC_TUNABLES, MALLOC_*). To be called early: blocks that are mapped by then stay so until freed.

    Returns:
        Whether it was told: False elsewhere than on glibc, and where the environment has chosen.
    """
    chosen = any(name in ("LD_PRELOAD", "GLIBC_TUNABLES") or name.startswith("MALLOC_") for name in environment)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
