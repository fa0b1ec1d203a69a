"""The type of the arithmetic. Parameters are float32 between steps, and cast at the top of what is differentiated."""

from typing import Literal

import jax
import jax.numpy as jnp

from llmlab.nn.module import Params

Precision = Literal["float32", "bfloat16", "float16"]


def cast(params: Params, precision: Precision) -> Params:
    """The parameters in the type of the arithmetic; gradients through it come back in float32."""
    dtype = jnp.dtype(precision)
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)
