"""A model out of its stacks computes the same, is made once, and follows the arrays that it was made of."""

import dataclasses
import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from llmlab.infer import unstacked as unstacked_module
from llmlab.infer.unstacked import unstacked
from llmlab.models import gemma, gpt2, llama, mixtral, palm, t5
from llmlab.nn.module import merge, num_parameters, split
from llmlab.nn.stack import Stack

SIZES: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "vocab_size": 17}
LLAMA = llama.llama(**SIZES, num_layers=3, hidden_dim=24, num_kv_heads=1)
LOCAL = dataclasses.replace(LLAMA.pattern[0], mixer=dataclasses.replace(LLAMA.pattern[0].mixer, window=3))
DECODERS = {
    "llama": LLAMA,
    "two kinds of layers and a rest": dataclasses.replace(LLAMA, num_layers=5, pattern=(LOCAL, LLAMA.pattern[0])),
    "gpt2": gpt2.gpt2(**SIZES, num_layers=2, max_length=16),
    "gemma": gemma.preset("gemma-nano").with_vocabulary(17),
    "palm": palm.preset("palm-nano").with_vocabulary(17),
    "mixtral": mixtral.preset("mixtral-nano").with_vocabulary(17),
}
IDS = jnp.array([[5, 9, 2, 7, 1, 3], [3, 1, 8, 8, 4, 2]])


def stacks(model: nnx.Module) -> list[Stack]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]


@pytest.mark.parametrize("name", DECODERS)
def test_it_computes_what_the_model_does(name: str) -> None:
    model = DECODERS[name].build(nnx.Rngs(params=0))
    graphdef, params = unstacked(model)
    assert all(not stack.blocks for stack in stacks(merge(graphdef, params)))
    assert num_parameters(params) == num_parameters(split(model)[1])
    got = jax.jit(lambda params: merge(graphdef, params)(IDS).logits)(params)
    want = jax.jit(lambda params: merge(split(model)[0], params)(IDS).logits)(split(model)[1])
    # the same sums, which other fusions may take in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(jnp.abs(want).max()))


def test_both_stacks_of_an_encoder_decoder_are_taken_apart() -> None:
    config = t5.t5(embed_dim=16, num_layers=2, num_heads=2, head_dim=8, hidden_dim=24, vocab_size=17, num_buckets=8)
    model = config.build(nnx.Rngs(params=0))
    graphdef, params = unstacked(model)
    got = merge(graphdef, params)
    assert [(len(stack.blocks), len(stack.remainder)) for stack in stacks(got)] == [(0, 2), (0, 2)]
    want = model(IDS, decoder_input_ids=IDS[:, :3]).logits
    np.testing.assert_allclose(got(IDS, decoder_input_ids=IDS[:, :3]).logits, want, rtol=0, atol=1e-5)


def test_it_is_made_once_and_again_where_the_arrays_are_others() -> None:
    model = LLAMA.build(nnx.Rngs(params=0))
    once, again = unstacked(model)[1], unstacked(model)[1]
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True))
    model.stack.blocks[0].ffn.up.kernel.set_value(jnp.ones((3, 16, 24)))
    np.testing.assert_array_equal(unstacked(model)[1]["stack"]["remainder"]["1"]["ffn"]["up"]["kernel"], 1.0)


def test_it_goes_with_the_model() -> None:
    model = LLAMA.build(nnx.Rngs(params=0))
    unstacked(model)
    kept = len(unstacked_module._copies)
    del model
    gc.collect()
    assert len(unstacked_module._copies) < kept


def test_a_model_on_several_devices_and_one_that_is_traced_are_left_as_they_are() -> None:
    graphdef, params = split(LLAMA.build(nnx.Rngs(params=0)))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert unstacked(merge(graphdef, spread))[0] == graphdef

    @jax.jit
    def traced(params: Any) -> Any:
        got, own = unstacked(merge(graphdef, params))
        assert got == graphdef
        return own

    traced(params)
