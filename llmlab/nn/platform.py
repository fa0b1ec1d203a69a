"""Which hardware a program is being traced for."""

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
