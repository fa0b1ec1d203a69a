"""Each wiring is its equation, and the stack applies blocks in order however it is stored or executed."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.config import Block, Context, Wiring
from llmlab.nn.feed_forward import MLP
from llmlab.nn.masks import Causal
from llmlab.nn.module import logical_axes, merge, split
from llmlab.nn.norms import LayerNorm, RMSNorm
from llmlab.nn.stack import Execution, Stack
from llmlab.nn.wiring import LayerScale, NoResidual, Parallel, PostNorm, PreNorm, ReZero, Sandwich
from tests.drawing import drawn

DIM = 16
# float32, a dozen operations deep
assert_close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def block(wiring: Wiring, **changes) -> Block:
    return replace(
        Block(mixer=Attention(num_heads=2), ffn=MLP(hidden_dim=24), norm=LayerNorm(), wiring=wiring), **changes
    )


def context(batch: int = 2, length: int = 6) -> Context:
    return Context(mask=Causal(), position_ids=jnp.broadcast_to(jnp.arange(length), (batch, length)))


def x_of(seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, 6, DIM))


@pytest.mark.parametrize("wiring", [PreNorm(), PostNorm(), Sandwich(), ReZero(), LayerScale()], ids=repr)
def test_serial_wiring_is_its_equation(wiring):
    layer = drawn(lambda: block(wiring).build(DIM, rngs=nnx.Rngs(0)))
    x = x_of()

    def branch(f, parts, x):
        h = f(parts.norm_input(x)) if isinstance(wiring, PreNorm | Sandwich | ReZero | LayerScale) else f(x)
        if isinstance(wiring, Sandwich):
            h = parts.norm_output(h)
        if isinstance(wiring, ReZero | LayerScale):
            h = parts.scale[...] * h
        return parts.norm_sum(x + h) if isinstance(wiring, PostNorm) else x + h

    mixed = branch(lambda h: layer.mixer(h, context())[0], layer.mixer_branch, x)
    expected = branch(lambda h: layer.ffn(h)[0], layer.ffn_branch, mixed)
    assert_close(layer(x, context())[0], expected)


def test_without_residuals_a_layer_is_the_composition_of_its_parts():
    layer = drawn(lambda: block(NoResidual()).build(DIM, rngs=nnx.Rngs(0)))
    x = x_of()
    mixed = layer.mixer(layer.mixer_branch.norm_input(x), context())[0]
    assert_close(layer(x, context())[0], layer.ffn(layer.ffn_branch.norm_input(mixed))[0])


def test_without_residuals_the_last_matrices_start_alike_in_stacks_of_any_depth():
    one, many = (block(NoResidual()).build(DIM, rngs=nnx.Rngs(0), depth=depth) for depth in (1, 32))
    for part in ("mixer.output.kernel", "ffn.down.kernel"):
        first, second = (nnx.to_flat_state(nnx.state(layer)) for layer in (one, many))
        path = tuple(part.split("."))
        np.testing.assert_array_equal(dict(first)[path][...], dict(second)[path][...])


@pytest.mark.parametrize("shared", [True, False])
def test_parallel_wiring_adds_both_branches_at_once(shared):
    layer = drawn(lambda: block(Parallel(shared_norm=shared)).build(DIM, rngs=nnx.Rngs(0)))
    x = x_of()
    second = layer.norm_mixer if shared else layer.norm_ffn
    expected = x + layer.mixer(layer.norm_mixer(x), context())[0] + layer.ffn(second(x))[0]
    assert_close(layer(x, context())[0], expected)
    assert (layer.norm_ffn is None) == shared


def test_rezero_starts_as_the_identity():
    layer = block(ReZero(), norm=None).build(DIM, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x_of(), context())[0], x_of())


def test_layer_scale_starts_at_the_stated_gain():
    layer: Any = block(LayerScale(initial=1e-3)).build(DIM, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer.ffn_branch.scale[...], np.full(DIM, 1e-3, np.float32))


def test_residual_dropout_zeroes_whole_entries_of_each_branch():
    layer = block(PreNorm(), dropout=0.5).build(DIM, rngs=nnx.Rngs(0))
    plain, *_ = layer(x_of(), context())
    dropped, *_ = layer(x_of(), context(), jax.random.key(0))
    again, *_ = layer(x_of(), context(), jax.random.key(0))
    np.testing.assert_array_equal(dropped, again)
    assert not np.allclose(plain, dropped)


def test_cross_attention_reads_the_encoder_and_only_that():
    cross = block(PreNorm(), cross=CrossAttention(num_heads=2))
    layer = drawn(lambda: cross.build(DIM, rngs=nnx.Rngs(0)))
    memory = jax.random.normal(jax.random.key(5), (2, 9, DIM))
    with_memory = replace(context(), memory=memory)
    x = layer.mixer_branch(lambda h: layer.mixer(h, context()), x_of(), None)[0]
    q = jnp.einsum("BSD,DNH->BSNH", layer.cross_branch.norm_input(x), layer.cross.query.kernel[...])
    k = jnp.einsum("BTD,DNH->BTNH", memory, layer.cross.key.kernel[...])
    v = jnp.einsum("BTD,DNH->BTNH", memory, layer.cross.value.kernel[...])
    weights = jax.nn.softmax(jnp.einsum("BSNH,BTNH->BNST", q, k) / np.sqrt(DIM / 2))
    x = x + jnp.einsum("BNST,BTNH,NHD->BSD", weights, v, layer.cross.output.kernel[...])
    expected = x + layer.ffn(layer.ffn_branch.norm_input(x))[0]
    assert_close(layer(x_of(), with_memory)[0], expected)


def test_cross_attention_without_an_encoder_says_what_is_missing():
    layer = block(PreNorm(), cross=CrossAttention(num_heads=2)).build(DIM, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="encoder states"):
        layer(x_of(), context())


PATTERN = (block(PreNorm()), block(Sandwich(), norm=RMSNorm()))


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5])
def test_stack_is_its_layers_one_after_the_other(num_layers):
    stack = drawn(lambda: Stack(PATTERN, num_layers, DIM, Execution(mode="scan"), rngs=nnx.Rngs(0)))
    x, *_ = stack(x_of(), context())
    expected, repeats = x_of(), num_layers // 2
    for number in range(num_layers):
        if number < 2 * repeats:
            graphdef, params = split(stack.blocks[number % 2])
            layer = merge(graphdef, jax.tree.map(lambda p, r=number // 2: p[r], params))
        else:
            layer = stack.remainder[number - 2 * repeats]
        expected, *_ = layer(expected, context())
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)  # fused differently, five layers deep


def test_every_stacked_layer_starts_with_weights_of_its_own():
    stack = Stack(PATTERN, 6, DIM, Execution(), rngs=nnx.Rngs(0))
    first: Any = stack.blocks[0]
    kernel = first.mixer.query.kernel[...]
    assert kernel.shape == (3, DIM, 2, DIM // 2)
    assert len({float(layer.sum()) for layer in kernel}) == 3


def test_stacked_parameters_have_layers_as_their_first_axis():
    axes = logical_axes(Stack(PATTERN, 5, DIM, Execution(), rngs=nnx.Rngs(0)))
    assert axes["blocks"]["0"]["mixer"]["query"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert axes["remainder"]["0"]["mixer"]["query"]["kernel"] == ("embed", "heads", "head_dim")


@pytest.mark.scale
@pytest.mark.parametrize("remat", ["none", "full", "dots", "offload"])
@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_execution_changes_neither_values_nor_gradients(mode, remat):
    pattern = tuple(replace(b, dropout=0.2) for b in PATTERN)

    def results(execution: Execution):
        graphdef, params = split(drawn(lambda: Stack(pattern, 5, DIM, execution, rngs=nnx.Rngs(0))))
        loss = lambda p, x: jnp.sum(jnp.sin(merge(graphdef, p)(x, context(), jax.random.key(7))[0]))  # noqa: E731  one line
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x_of())

    ours = jax.tree.leaves(results(Execution(mode=mode, remat=remat)))
    plain = jax.tree.leaves(results(Execution(mode="unroll")))
    for a, b in zip(ours, plain, strict=True):
        # the same operations fused differently; gradients sum over five layers and 96 outputs
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))))


def test_layer_drop_skips_whole_layers_and_only_in_training():
    execution = Execution(layer_drop=0.5)
    stack = drawn(lambda: Stack(PATTERN[:1], 1, DIM, execution, rngs=nnx.Rngs(0)))
    plain, *_ = stack(x_of(), context())
    outcomes = {"kept": 0, "dropped": 0}
    for seed in range(40):
        y, *_ = stack(x_of(), context(), jax.random.key(seed))
        kept = np.allclose(y, plain)
        assert kept or np.array_equal(y, x_of())
        outcomes["kept" if kept else "dropped"] += 1
    # binomial(40, 1/2): outside [8, 32] with probability below 1e-4
    assert 8 <= outcomes["kept"] <= 32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(num_heads=6, num_kv_heads=4), r"num_heads=6 .* num_kv_heads=4; use one of \[1, 2, 3, 6\]"),
        (lambda: Attention(num_heads=5).build(16, rngs=nnx.Rngs(0)), "embed_dim=16 .* num_heads=5; use 15 or 20"),
        (lambda: Attention(num_heads=2, window=0), "window=0"),
        (lambda: Attention(num_heads=2, dropout=1.0), "dropout=1.0"),
        (lambda: Execution(layer_drop=-0.1), "layer_drop=-0.1"),
        (lambda: MLP(hidden_dim=0), "hidden_dim=0"),
    ],
)
def test_impossible_sizes_say_what_is_possible(make, message):
    with pytest.raises(ValueError, match=message):
        make()
