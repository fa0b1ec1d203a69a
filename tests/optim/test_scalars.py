"""Scalars of an optimizer may be traced: the compiled update is that of the plain numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.llama import llama
from llmlab.nn.module import draw
from llmlab.nn.mup import MuP
from llmlab.optim import LAMB, SGD, Adafactor, AdamW, Constant, Lion, Muon, Optimizer

OPTIMIZERS = [
    kind(peak_lr=0.03, weight_decay=0.2, schedule=Constant()) for kind in (SGD, AdamW, LAMB, Lion, Adafactor, Muon)
]


@pytest.mark.scale
@pytest.mark.parametrize("wide", [False, True], ids=["standard", "muP"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: type(optimizer).__name__)
def test_traced_rate_and_decay_give_the_update_of_the_numbers(optimizer: Optimizer, wide: bool) -> None:
    mup = MuP(base_width=8, base_head_dim=4) if wide else None
    model = dataclasses.replace(
        llama(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=32, vocab_size=32), mup=mup
    )
    _, _, axes = model.abstract()
    params: Any = draw(model.build, jax.random.key(0))
    gradients = jax.tree.map(lambda x: jnp.cos(7 * x + 1), params)

    def update(scalars: dict[str, Any]) -> Any:
        rule = optimizer.with_scalars(scalars).build(axes, 10, growth=model.width_growth)
        return rule.update(gradients, rule.init(params), params)[0]

    traced = jax.jit(update)({name: np.float32(value) for name, value in optimizer.scalars().items()})
    plain = jax.jit(lambda: update({}))()
    for one, other in zip(jax.tree.leaves(traced), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-9)
