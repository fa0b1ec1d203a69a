"""Which hardware a program is being traced for, and which this machine is."""

import hashlib
import platform as host
from pathlib import Path

import jax

from llmlab.sharding.rules import active_mesh


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the active mesh's devices, or else JAX's default.

    Layers that have a formulation per platform ask this while they are traced. The mesh comes first because a program
    may be compiled ahead of time for devices that this machine does not have. `jax.lax.platform_dependent` would
    trace every formulation and, under differentiation, keep the residuals of all of them.
    """
    mesh = active_mesh()
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "gpu" if name in ("cuda", "rocm") else name


def processor() -> str:
    """A short name for this kind of CPU: the instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description = next(line for line in lines if line.lower().startswith(("flags", "features")))
    except (OSError, StopIteration):
        description = host.processor()
    return f"{host.machine()}-{hashlib.sha256(description.encode()).hexdigest()[:8]}"
