"""Prefill and steps give the hidden states of the whole model, whatever the model's kind and however rows are cut."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.steps import prepare
from llmlab.models import bert, gpt2, llama, t5
from llmlab.nn.module import merge
from tests.drawing import built

IDS = jnp.array([[5, 9, 2, 7, 1, 3], [3, 1, 8, 8, 4, 2]])
SOURCE = {
    "input_ids": jnp.array([[4, 4, 9, 1], [6, 2, 0, 0]]),
    "attention_mask": jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
}
MODELS: dict[str, tuple[Any, Any]] = {
    "gpt2": (gpt2.gpt2(embed_dim=16, num_layers=2, num_heads=2, max_length=16, vocab_size=17), None),
    "llama": (llama.llama(embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=24, vocab_size=17), None),
    "t5": (
        t5.t5(embed_dim=16, num_layers=2, num_heads=2, head_dim=8, hidden_dim=24, vocab_size=17, num_buckets=8),
        SOURCE,
    ),
}


@pytest.mark.scale
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", [1, 4])
def test_prefill_and_steps_give_the_states_of_the_whole_model(name, given):
    config, inputs = MODELS[name]
    steps, params = prepare(built(config))
    position_BS = jnp.broadcast_to(jnp.arange(6), (2, 6))

    @jax.jit
    def both(params: Any) -> Any:
        model = merge(steps.graphdef, params)
        if inputs is None:
            whole = model.hidden_states(IDS).states
        else:
            whole = model.hidden_states(inputs["input_ids"], inputs["attention_mask"], IDS).states
        state = steps.new_state(2, 8, inputs=inputs)
        first, state = steps.prefill(params, state, IDS[:, :given], position_BS[:, :given], inputs)
        pieces = [first]
        for at in range(given, 6):
            state = state.take(jnp.array([1, 0]))  # the rows change places and are named by their new ones
            order = [1, 0] if (at - given) % 2 == 0 else [0, 1]
            piece, state = steps.step(params, state, IDS[order, at : at + 1], position_BS[:, at : at + 1])
            pieces.append(piece[jnp.array(order)])
        return whole, jnp.concatenate(pieces, axis=1)

    whole, pieces = both(params)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * float(jnp.abs(whole).max()))


def test_what_a_model_cannot_be_given_is_refused():
    steps, params = prepare(built(MODELS["gpt2"][0]))
    with pytest.raises(ValueError, match="tokens alone, not pixel_values"):
        steps.prefill(params, steps.new_state(1, 8), IDS[:1], IDS[:1], {"pixel_values": jnp.zeros((1, 2, 2, 1))})
    with pytest.raises(ValueError, match="needs a source"):
        prepare(built(MODELS["t5"][0]))[0].new_state(1, 8)


def test_an_encoder_does_not_write():
    model = built(bert.preset("bert-nano").with_vocabulary(32))
    with pytest.raises(ValueError, match="Encoder does not write text"):
        prepare(model)


def test_the_same_structure_is_the_same_static_argument():
    config = MODELS["llama"][0]
    one, two = (prepare(built(config, seed))[0] for seed in (0, 1))
    assert hash(one) == hash(two)
    assert one == two
