"""A model small enough to compile in a blink, with everything that training looks at: axes, dropout, a wide head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models.outputs import Hidden
from llmlab.nn.dropout import dropout


class Tiny(nnx.Module):
    """Mean of the tokens so far, one hidden layer, an untied head."""

    def __init__(self, vocab_size: int, dim: int, rate: float, *, rngs: nnx.Rngs) -> None:
        def init(*shape: int) -> jax.Array:
            return jax.random.normal(rngs.params(), shape) / np.sqrt(shape[0])

        self.rate = rate
        self.table = nnx.Param(init(vocab_size, dim), axes=("vocab", "embed"))
        self.up = nnx.Param(init(dim, 4 * dim), axes=("embed", "mlp"))
        self.down = nnx.Param(init(4 * dim, dim), axes=("mlp", "embed"))
        self.scale = nnx.Param(jnp.ones(dim), axes=("embed",))
        self.head = nnx.Param(init(dim, vocab_size), axes=("embed", "vocab"))

    def hidden_states(
        self,
        input_ids: jax.Array,
        attention_mask: Any = None,
        position_ids: Any = None,
        segment_ids: Any = None,
        key: jax.Array | None = None,
    ) -> Hidden:
        x = self.table[...][input_ids]
        lengths = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
        x = x + jnp.cumsum(x, axis=1) / lengths[:, None]
        h = dropout(jnp.tanh(x @ self.up[...]), self.rate, key)
        return Hidden(states=(x + h @ self.down[...]) * self.scale[...])

    def auxiliary_losses(self, auxiliary: Any) -> dict[str, jax.Array]:
        return {}

    def project(self, hidden: jax.Array) -> jax.Array:
        return (hidden @ self.head[...]).astype(jnp.float32)


@pytest.fixture
def make_model() -> Any:
    """Function (dropout rate) -> model with 32 tokens and width 8."""
    return lambda rate=0.0: Tiny(32, 8, rate, rngs=nnx.Rngs(params=0))


@pytest.fixture
def make_batch() -> Any:
    """Function (seed) -> batch of 16 rows of 6 tokens; rows count different numbers of them, one counts none."""

    def make(seed: int = 0, rows: int = 16) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, 32, (rows, 7)).astype(np.int32)
        labels = tokens[:, 1:].copy()
        for row in range(rows):
            labels[row, int(rng.integers(0, 7)) :] = -100
        labels[rows // 2] = -100
        return {"input_ids": tokens[:, :-1].copy(), "labels": labels}

    return make
