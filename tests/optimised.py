"""Programs compiled as users' are, for tests that measure time or memory: conftest.py has others compiled faster."""

from collections.abc import Callable
from typing import Any

import jax

from tests.xla_flags import OPTIMISED


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """The compiled function for arguments of these shapes."""
    return jax.jit(function).lower(*arguments).compile(compiler_options=OPTIMISED)
