"""Modules with every parameter drawn, for tests: biases of zero and gains of one would hide mistakes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmlab.nn.module import NoNumbers, merge, split


def drawn(build: Callable[[], nnx.Module], seed: int = 0, *, std: float = 0.3) -> Any:
    """What `build` builds, its parameters normal with this spread, norms' gains around one.

    NumPy draws them: jax would compile its initialisers for every shape, which takes longer than most tests.
    """
    graphdef, shapes = split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        noise = std * rng.standard_normal(leaf.shape)
        return jnp.asarray(1.0 + noise if str(path[-1].key) == "scale" else noise, leaf.dtype)

    return merge(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


def built(config: Any, seed: int = 0, *, std: float = 0.3) -> Any:
    """The model of this config, drawn like that."""
    return drawn(lambda: config.build(NoNumbers(jax.random.key(0))), seed, std=std)
