"""Compiled programs on disk, so that the next run of the same shapes starts at once.

jax does the work; here it is told where. Programs for a CPU use the instructions of that CPU, so each kind of CPU has
a directory of its own: a home directory may be shared by many machines.
"""

import os
from pathlib import Path

from llmlab.nn.platform import processor


def enable(root: Path) -> None:
    """Keeps compiled programs under `root`, unless jax was told where (JAX_COMPILATION_CACHE_DIR), or told not to
    (JAX_ENABLE_COMPILATION_CACHE=false)."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(root / "jax" / processor()))
    # The default of 1 s would leave out most programs of a small model, of which there are a dozen.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
