"""What a stack reports of its layers equals the layers run by hand, however the stack is applied."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.interpret.attention import attention_weights
from llmlab.models import bert, llama, palm
from llmlab.models.config import Tied
from llmlab.nn.capture import capturing
from llmlab.nn.module import merge, split
from llmlab.nn.stack import Execution, cut_by
from tests.drawing import built

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 6)), jnp.int32)
SEGMENTS = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]], jnp.int32)
LLAMA = llama.llama(embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=24, head=Tied(), vocab_size=17)


def captured(model: Any, *what: Any, **inputs: Any) -> dict[str, Any]:
    """By a jitted pure function, so that arrays come out as return values or not at all."""
    graphdef, params = split(model)

    @jax.jit
    def run(params: Any) -> Any:
        with capturing(*what):
            hidden = merge(graphdef, params).hidden_states(**inputs)
        return hidden.auxiliary | {"last": hidden.states}

    return {name.removeprefix("capture/"): np.asarray(x) for name, x in run(params).items()}


def by_hand(model: Any, **inputs: Any) -> list[np.ndarray]:
    """The stack's input and the output of each layer, the layers called one after the other."""
    states: list[Any] = []

    def look(stack: Any, x: Any, context: Any, key: Any) -> Any:
        states.append(x)
        layers = [*stack.repeats.layers([nnx.split(block)[1] for block in stack.blocks]), *stack.remainder]
        for layer in layers:
            x, _, _ = layer(x, context, None, None)
            states.append(x)
        return x, []

    model.stack.remainder, rest = nnx.List([]), model.stack.remainder
    with cut_by(lambda stack, x, context, key: look(_with(stack, rest), x, context, key)):
        model.hidden_states(**inputs)
    model.stack.remainder = rest
    return [np.asarray(x) for x in states]


class _with:
    """A stack whose remainder is looked at here and not run again."""

    def __init__(self, stack: Any, remainder: Any) -> None:
        self.repeats, self.blocks, self.remainder = stack.repeats, stack.blocks, remainder


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("pattern", [1, 2])
def test_states_are_those_of_the_layers_in_their_order(mode: Any, pattern: int) -> None:
    config = replace(LLAMA, execution=Execution(mode=mode, remat="full" if mode == "scan" else "none"))
    if pattern == 2:  # two repeats of two different blocks and one layer more
        (block,) = config.pattern
        local = replace(block, mixer=replace(block.mixer, window=2))
        config = replace(config, pattern=(local, block), num_layers=5)
    model = built(config)
    found = captured(model, "state", "input", input_ids=IDS, segment_ids=SEGMENTS)
    expected = by_hand(model, input_ids=IDS, segment_ids=SEGMENTS)
    np.testing.assert_allclose(found["input"][0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found["state"], np.stack(expected[1:]), rtol=2e-4, atol=2e-5)


def test_attention_is_what_attention_weighs_by_and_projections_have_their_heads() -> None:
    model = built(LLAMA)
    found = captured(model, "attention", "scores", "query", "key", "value", "allowed", input_ids=IDS)
    expected = attention_weights(model, input_ids=IDS)
    np.testing.assert_allclose(np.exp(found["attention"]), np.stack(expected), rtol=1e-5, atol=1e-7)
    assert found["query"].shape == (3, 2, 6, 4, 4)
    assert found["key"].shape == found["value"].shape == (3, 2, 6, 2, 4)
    causal = np.tril(np.ones((6, 6), bool))
    np.testing.assert_array_equal(found["allowed"], np.broadcast_to(causal, (3, 1, 1, 6, 6)))
    assert not np.any(found["scores"][..., ~causal])
    keys = np.repeat(found["key"], 2, axis=-2)
    products = np.einsum("lbsnh,lbtnh->lbnst", found["query"], keys) / 2.0
    np.testing.assert_allclose(found["scores"], np.where(causal, products, 0.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        bert.bert(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=24, max_length=8, vocab_size=17),
        palm.palm(embed_dim=16, num_layers=2, num_heads=2, head_dim=8, hidden_dim=24, vocab_size=17),
    ],
    ids=["post-norm", "parallel"],
)
def test_every_wiring_with_attention_is_captured(config: Any) -> None:
    found = captured(built(config), "attention", "value", input_ids=IDS)
    np.testing.assert_allclose(np.exp(found["attention"]).sum(-1), 1.0, rtol=1e-5)
    assert found["value"].shape[:3] == (2, 2, 6)


def test_capturing_changes_no_output_and_nothing_is_captured_outside() -> None:
    model = built(LLAMA)
    inside = captured(model, "state", input_ids=IDS)
    outside = captured(model, input_ids=IDS)
    np.testing.assert_allclose(inside["last"], outside["last"], rtol=1e-6)
    assert set(outside) == {"last"}
