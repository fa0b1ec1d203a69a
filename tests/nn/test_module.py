"""Drawing parameters: each from a key of its own."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from llmlab.models.bert import FAMILY as BERT
from llmlab.models.clip import FAMILY as CLIP
from llmlab.models.config import Tied, Transformer, Untied
from llmlab.models.gpt2 import gpt2
from llmlab.models.llama import llama
from llmlab.models.t5 import FAMILY as T5
from llmlab.nn.module import NoNumbers, Params, draw, split
from llmlab.optim.parameters import flatten


def drawn(model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    params: Params = jax.jit(lambda key: draw(model.build, key))(jax.random.key(seed))
    return {path: np.asarray(value) for path, value in flatten(params)}


def decoder(**changes: Any) -> Transformer:
    return llama(**{"embed_dim": 32, "num_layers": 3, "num_heads": 4, "hidden_dim": 64, "vocab_size": 128, **changes})


@pytest.mark.parametrize("family", [BERT, T5, CLIP], ids=lambda family: family.name)
def test_parameters_have_the_shapes_and_spread_of_a_plain_build_and_no_two_are_equal(family: Any) -> None:
    preset = next(config for name, config in family.presets.items() if name.endswith("nano"))
    model = preset.with_vocabulary(128) if preset.vocab_size is None else preset
    plain = dict(flatten(jax.jit(lambda: split(model.build(nnx.Rngs(params=0)))[1])()))
    own = drawn(model)
    assert {path: value.shape for path, value in own.items()} == {path: value.shape for path, value in plain.items()}
    seen: dict[bytes, str] = {}
    for path, value in own.items():
        spread = np.std(np.asarray(plain[path]))
        assert abs(np.std(value) - spread) <= 6 * spread / np.sqrt(2 * value.size), path
        if spread > 0:
            first = value.reshape(-1)[:16] / np.std(value)  # equal keys would give equal numbers, up to a scale
            key = np.round(first, 3).tobytes()
            assert key not in seen, f"{path} was drawn as {seen[key]} was"
            seen[key] = path


@pytest.mark.parametrize("family", [BERT, T5, CLIP], ids=lambda family: family.name)
def test_shapes_without_numbers_are_those_of_a_model_with_numbers(family: Any) -> None:
    preset = next(config for name, config in family.presets.items() if name.endswith("nano"))
    model = preset.with_vocabulary(128) if preset.vocab_size is None else preset
    graphdef, params, _ = model.abstract()
    with_numbers = nnx.eval_shape(lambda: model.build(nnx.Rngs(params=0)))
    assert (graphdef, params) == split(with_numbers)
    drawing = str(jax.make_jaxpr(lambda: split(model.build(nnx.Rngs(params=0)))[1])())
    not_drawing = str(jax.make_jaxpr(lambda: split(model.build(NoNumbers(jax.random.key(0))))[1])())
    assert "random_bits" in drawing
    assert "random_bits" not in not_drawing


def test_models_that_differ_in_one_part_start_equal_in_all_others() -> None:
    grouped, multi = drawn(decoder(num_kv_heads=2)), drawn(decoder(num_kv_heads=4))
    differ = {path for path in grouped if not np.array_equal(grouped[path], multi[path])}
    assert differ
    assert all(path.endswith(("mixer.key.kernel", "mixer.value.kernel")) for path in differ)


def test_a_part_that_only_one_model_has_moves_no_other() -> None:
    tied, untied = drawn(decoder(head=Tied())), drawn(decoder(head=Untied()))
    assert untied.keys() > tied.keys()
    assert all(np.array_equal(tied[path], untied[path]) for path in tied)


def test_layers_that_are_added_do_not_change_those_before() -> None:
    settings: dict[str, Any] = {"embed_dim": 32, "num_heads": 4, "max_length": 16, "vocab_size": 128}
    shallow, deep = (drawn(gpt2(num_layers=layers, **settings)) for layers in (2, 4))
    path = next(path for path in shallow if path.endswith("mixer.query.kernel"))
    np.testing.assert_array_equal(shallow[path], deep[path][:2])


def test_seeds_draw_different_numbers_and_a_seed_the_same_again() -> None:
    one, again, two = drawn(decoder(), 1), drawn(decoder(), 1), drawn(decoder(), 2)
    kernels = [path for path in one if path.endswith("kernel")]
    assert all(np.array_equal(one[path], again[path]) for path in one)
    assert not any(np.array_equal(one[path], two[path]) for path in kernels)


def test_layers_of_a_stack_are_drawn_apart() -> None:
    params = drawn(dataclasses.replace(decoder(), num_layers=3))
    kernel = next(value for path, value in params.items() if path.endswith("mixer.query.kernel"))
    assert not np.array_equal(kernel[0], kernel[1])
