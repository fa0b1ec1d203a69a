"""Programs compiled as users' are, for tests that measure time or memory: conftest.py has others compiled faster."""

from collections.abc import Callable
from typing import Any

import jax

_OPTIONS: dict[str, str | bool] = {"xla_backend_optimization_level": "3", "xla_cpu_use_fusion_emitters": True}


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled function for arguments of these shapes."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=_OPTIONS)
