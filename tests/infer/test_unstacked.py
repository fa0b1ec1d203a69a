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

from llmlab.infer import joined
from llmlab.infer import unstacked as unstacked_module
from llmlab.infer.cache import new_cache
from llmlab.infer.joined import JoinedAttention, RowsDense
from llmlab.infer.unstacked import unstacked
from llmlab.models import gemma, gpt2, llama, mixtral, palm, t5
from llmlab.nn.kernels import cpu
from llmlab.nn.module import merge, num_parameters, split
from llmlab.nn.stack import Stack
from tests.drawing import built
from tests.selection import at_scale_but

SIZES: dict[str, Any] = {"embed_dim": 32, "num_heads": 2, "vocab_size": 17}
LLAMA = llama.llama(**SIZES, num_layers=2, hidden_dim=24, num_kv_heads=1)
LOCAL = dataclasses.replace(LLAMA.pattern[0], mixer=dataclasses.replace(LLAMA.pattern[0].mixer, window=3))
DECODERS = {
    "llama": LLAMA,
    "two kinds of layers and a rest": dataclasses.replace(LLAMA, num_layers=3, pattern=(LOCAL, LLAMA.pattern[0])),
    "gpt2": gpt2.gpt2(**SIZES, num_layers=2, max_length=16),
    "gemma": gemma.gemma(**SIZES, num_layers=2, hidden_dim=24, head_dim=16),
    "palm": palm.palm(**SIZES, num_layers=2),
    "mixtral": mixtral.mixtral(**SIZES, num_layers=2, hidden_dim=24, num_experts=2),
}
IDS = jnp.array([[5, 9, 2, 7, 1, 3], [3, 1, 8, 8, 4, 2]])


def stacks(model: nnx.Module) -> list[Stack]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]


@pytest.mark.parametrize("kernels", ["gpu", "cpu", "none"])
@pytest.mark.parametrize("name", at_scale_but(["llama", "gpt2", "mixtral"], list(DECODERS)))
def test_it_computes_what_the_model_does(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With matrices joined and the kernels of a GPU or CPU, or on a CPU without; compared is a cached step."""
    monkeypatch.setattr(joined, "platform", lambda: "gpu" if kernels == "gpu" else "cpu")
    if kernels == "none":
        monkeypatch.setattr(cpu, "lacks", lambda: "there is no compiler")
    elif kernels == "cpu" and cpu.lacks() is not None:
        pytest.skip(str(cpu.lacks()))
    model = built(DECODERS[name])
    graphdef, params = unstacked(model)
    assert all(not stack.blocks for stack in stacks(merge(graphdef, params)))
    assert num_parameters(params) == num_parameters(split(model)[1])
    attention = merge(graphdef, params).stack.remainder[0].mixer
    assert isinstance(attention, JoinedAttention) == (kernels != "none")
    assert isinstance(attention.output if kernels == "none" else attention.last, RowsDense)

    def stepped(params: Any) -> jax.Array:
        """All but the last token, then that, which is what kernels are for."""
        merged, caches = merge(graphdef, params), new_cache(DECODERS[name], 2, 8)
        first = merged(IDS[:, :5], cache=caches)
        last = merged(IDS[:, 5:], position_ids=jnp.full((2, 1), 5), cache=first.cache)
        return jnp.concatenate([first.logits, last.logits], axis=1)

    got = jax.jit(stepped)(params)
    want = jax.jit(lambda params: merge(split(model)[0], params)(IDS).logits)(split(model)[1])
    # the same sums, which other fusions may take in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_both_stacks_of_an_encoder_decoder_are_taken_apart() -> None:
    config = t5.t5(embed_dim=16, num_layers=2, num_heads=2, head_dim=8, hidden_dim=24, vocab_size=17, num_buckets=8)
    model = built(config)
    graphdef, params = unstacked(model)
    got = merge(graphdef, params)
    assert [(len(stack.blocks), len(stack.remainder)) for stack in stacks(got)] == [(0, 2), (0, 2)]

    def logits(graphdef: Any, params: Any) -> jax.Array:
        return jax.jit(lambda params: merge(graphdef, params)(IDS, decoder_input_ids=IDS[:, :3]).logits)(params)

    want = logits(*split(model))
    np.testing.assert_allclose(logits(graphdef, params), want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))


def test_it_is_made_once_and_again_where_the_arrays_are_others() -> None:
    model = built(LLAMA)
    once, again = unstacked(model)[1], unstacked(model)[1]
    assert all(a is b for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True))
    block: Any = model.stack.blocks[0]
    block.ffn.down.kernel.set_value(jnp.ones((2, 24, 32)))
    np.testing.assert_array_equal(unstacked(model)[1]["stack"]["remainder"]["1"]["ffn"]["down"]["kernel"], 1.0)


def test_it_goes_with_the_model() -> None:
    model = built(LLAMA)
    unstacked(model)
    kept = len(unstacked_module._copies)
    del model
    gc.collect()
    assert len(unstacked_module._copies) < kept


def test_a_model_on_several_devices_and_one_that_is_traced_are_left_as_they_are() -> None:
    graphdef, params = split(built(LLAMA))
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    assert unstacked(merge(graphdef, spread))[0] == graphdef

    @jax.jit
    def traced(params: Any) -> Any:
        got, own = unstacked(merge(graphdef, params))
        assert got == graphdef
        return own

    traced(params)


def test_a_copy_that_is_made_inside_of_a_trace_is_there_after_it() -> None:
    model = built(LLAMA)
    scale = jax.jit(lambda x: x * jax.tree.leaves(unstacked(model)[1])[0])(2.0)
    graphdef, params = unstacked(model)
    np.testing.assert_array_equal(scale, 2.0 * jax.tree.leaves(params)[0])
    np.testing.assert_allclose(merge(graphdef, params)(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-5)
