"""Compiled programs on disk, so that the next run of the same shapes starts at once.

jax does the work; here it is told where. Programs for a CPU use the instructions of that CPU, so each kind of CPU has
a directory of its own: a home directory may be shared by many machines.
"""

import hashlib
import os
import platform
from pathlib import Path


def enable(root: Path) -> None:
    """Keeps compiled programs under `root`, unless jax was told where (JAX_COMPILATION_CACHE_DIR), or told not to
    (JAX_ENABLE_COMPILATION_CACHE=false)."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(root / "jax" / _cpu()))
    # The default of 1 s would leave out most programs of a small model, of which there are a dozen.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _cpu() -> str:
    """A short name for this kind of CPU: the instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        description = platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
