"""Modules with every parameter drawn, for tests: biases of zero and gains of one would hide mistakes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmlab.nn.module import Params, merge, split


def drawn(build: Callable[[], nnx.Module], seed: int = 0, *, std: float = 0.3) -> Any:
    """What `build` builds, its parameters normal with this spread, norms' gains around one.

    NumPy draws them: jax would compile its initialisers for every shape, which takes longer than most tests.
    """
    return _filled(*split(nnx.eval_shape(build)), seed, std)


def built(config: Any, seed: int = 0, *, std: float = 0.3) -> Any:
    """The model of this config, drawn like that."""
    graphdef, shapes, _ = config.abstract()
    return _filled(graphdef, shapes, seed, std)


def _filled(graphdef: nnx.GraphDef, shapes: Params, seed: int, std: float) -> Any:
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        noise = std * rng.standard_normal(leaf.shape)
        return jnp.asarray(1.0 + noise if str(path[-1].key) == "scale" else noise, leaf.dtype)

    return merge(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))
