"""The gradient's norm layer by layer, against norms of gradients that were taken apart by hand."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.llama import llama
from llmlab.models.t5 import t5
from llmlab.nn.module import logical_axes, split
from llmlab.objectives import NextToken
from llmlab.optim import SGD
from llmlab.training.gradients import norms_by_layer
from llmlab.training.state import new_state
from llmlab.training.step import make_train_step
from tests.drawing import built


def norm(*trees: Any) -> float:
    leaves = [np.asarray(leaf, np.float64) for tree in trees for leaf in jax.tree.leaves(tree)]
    return float(np.sqrt(sum(np.square(leaf).sum() for leaf in leaves)))


def noise(shapes: Any) -> Any:
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), shapes)


def test_layers_of_a_pattern_are_numbered_through_the_stack_and_its_remainder() -> None:
    model = llama(vocab_size=32, embed_dim=8, num_layers=5, num_heads=2, hidden_dim=16)
    wide = replace(model.pattern[0], ffn=replace(model.pattern[0].ffn, hidden_dim=24))
    gradient = noise(replace(model, pattern=(model.pattern[0], wide)).abstract()[1])
    found = norms_by_layer(gradient)
    blocks, remainder = gradient["stack"]["blocks"], gradient["stack"]["remainder"]
    layers = [jax.tree.map(lambda x, r=i // 2: x[r], blocks[str(i % 2)]) for i in range(4)] + [remainder["0"]]
    expected = {f"gradient_norm/layer.{i}": norm(layer) for i, layer in enumerate(layers)}
    expected |= {f"gradient_norm/{name}": norm(gradient[name]) for name in ("embedding", "final_norm", "head")}
    assert {*found} == {*expected}
    for name, value in expected.items():
        assert float(found[name]) == pytest.approx(value, rel=1e-6), name
    assert norm(list(found.values())) == pytest.approx(norm(gradient), rel=1e-6)


def test_every_stack_of_an_encoder_decoder_has_layers_of_its_own() -> None:
    model = t5(embed_dim=8, num_layers=2, num_heads=2, head_dim=4, hidden_dim=16, vocab_size=32)
    gradient = noise(model.abstract()[1])
    found = norms_by_layer(gradient)
    for side in ("encoder", "decoder"):
        stacked = gradient[side]["stack"]["blocks"]["0"]
        for i in range(2):
            expected = norm(jax.tree.map(lambda x, i=i: x[i], stacked))
            assert float(found[f"gradient_norm/{side}.layer.{i}"]) == pytest.approx(expected, rel=1e-6)
    assert norm(list(found.values())) == pytest.approx(norm(gradient), rel=1e-6)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_a_step_reports_the_norms_of_its_own_gradient(num_layers: int) -> None:
    config = llama(vocab_size=32, embed_dim=8, num_layers=num_layers, num_heads=2, hidden_dim=16)
    model = built(config)
    graphdef, params = split(model)
    # At rate 1 and without clipping the step is the gradient, and the norms are those before clipping.
    before = jax.tree.map(np.asarray, params)
    optimizer = SGD(peak_lr=1.0, clip_norm=None).build(logical_axes(model), 3)
    step = make_train_step(graphdef, NextToken(), optimizer, gradients_by_layer=True)
    tokens = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)
    state, metrics = step(new_state(params, optimizer), {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]})
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    for i in range(num_layers):
        layer = norm(jax.tree.map(lambda x, i=i: x[i], gradient["stack"]["blocks"]["0"]))
        assert float(metrics[f"gradient_norm/layer.{i}"]) == pytest.approx(layer, rel=1e-3)  # 1 - g rounds at 6e-8
    parts = [value for name, value in metrics.items() if name.startswith("gradient_norm/")]
    assert norm(parts) == pytest.approx(float(metrics["gradient_norm"]), rel=1e-5)
