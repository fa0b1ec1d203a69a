"""The reversible stack's gradient is that of the same layers differentiated plainly, at a memory that depth leaves
alone."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.config import Block, Context
from llmlab.nn.feed_forward import MLP
from llmlab.nn.lsh import LocalAttention, LSHAttention
from llmlab.nn.masks import Causal
from llmlab.nn.norms import LayerNorm
from llmlab.nn.reversible import Reversible, ReversibleStack
from llmlab.nn.stack import Execution, Stack
from tests.optimised import compiled
from tests.selection import at_scale_but

DIM, LENGTH, ROWS = 8, 24, 2


def block(mixer: Any, dropout: float = 0.0, hidden_dim: int = 16, chunk: int | None = None) -> Block:
    ffn = MLP(hidden_dim=hidden_dim, dropout=dropout)
    return Block(mixer=mixer, ffn=ffn, norm=LayerNorm(), wiring=Reversible(chunk=chunk), dropout=dropout)


LOCAL = LocalAttention(num_heads=2, chunk=4)
MIXED = (LOCAL, LSHAttention(num_heads=2, chunk=4, num_hashes=2))


def stack(
    num_layers: int, mode: Any = "unroll", mixers: Any = MIXED, layer_drop: float = 0.0, dropout: float = 0.0
) -> ReversibleStack:
    execution = Execution(mode=mode, layer_drop=layer_drop)
    blocks = tuple(block(mixer, dropout) for mixer in mixers)
    return ReversibleStack(blocks, num_layers, DIM, execution, rngs=nnx.Rngs(params=0))


def context(length: int = LENGTH) -> Context:
    return Context(mask=Causal(), position_ids=jnp.broadcast_to(jnp.arange(length), (ROWS, length)))


def plainly(stack: ReversibleStack, x: jax.Array, length: int = LENGTH) -> jax.Array:
    """The equations of the paper, layer after layer."""
    x1 = x2 = x
    period, repeats = max(len(stack.blocks), 1), len(stack.blocks) and stack.num_layers // len(stack.blocks)
    for number in range(stack.num_layers):
        layer: Any = None
        if number < repeats * period:
            graphdef, state = nnx.split(stack.blocks[number % period])
            layer = nnx.merge(graphdef, jax.tree.map(lambda p, repeat=number // period: p[repeat], state))
        else:
            layer = stack.remainder[number - repeats * period]
        x1 = x1 + layer.mixer(layer.norm_mixer(x2), context(length))[0]
        x2 = x2 + layer.ffn(layer.norm_ffn(x1), context(length))[0]
    return jnp.concatenate([x1, x2], axis=-1)


def inputs() -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    x, direction = random.normal(size=(ROWS, LENGTH, DIM)), random.normal(size=(ROWS, LENGTH, 2 * DIM))
    return jnp.float32(x), jnp.float32(direction)


@pytest.mark.parametrize("mode", at_scale_but(("scan",), ["scan", "unroll"]))
@pytest.mark.parametrize("num_layers", [5, 1])
def test_output_and_gradients_are_those_of_the_plain_layers(num_layers, mode):
    graphdef, state = nnx.split(stack(num_layers, mode))
    x, direction = inputs()

    def value(run):
        def total(state, x):
            y = run(nnx.merge(graphdef, state), x)
            return jnp.sum(y * direction), y

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(state, x)

    (_, ours), slopes = value(lambda stack, x: stack(x, context())[0])
    (_, theirs), expected = value(plainly)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for a, b in zip(jax.tree.leaves(slopes), jax.tree.leaves(expected), strict=True):
        # inputs of layers come back with the rounding of at most ten additions
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def test_dropout_and_dropped_layers_are_the_same_forward_and_backward():
    graphdef, state = nnx.split(stack(3, "scan", (LOCAL,), layer_drop=0.4, dropout=0.3))
    x, direction = inputs()
    key, other = jax.random.key(3), jax.random.key(4)

    def total(x, key):
        return jnp.sum(nnx.merge(graphdef, state)(x, context(), key)[0] * direction)

    valued = jax.jit(jax.value_and_grad(total))
    slope, along = np.asarray(valued(x, key)[1]), np.random.default_rng(1).normal(size=x.shape)
    moved = [float(valued(x + step * jnp.float32(along), key)[0]) for step in (1e-2, -1e-2)]
    # the error of central differences is of the order of h^2 = 1e-4 and 1e-6 / h of rounding
    assert (moved[0] - moved[1]) / 2e-2 == pytest.approx(np.sum(slope * along), rel=5e-3)
    assert valued(x, key)[0] != valued(x, other)[0]


def test_a_dropped_layer_changes_nothing():
    built = stack(4, "scan", (LOCAL,), layer_drop=0.999)
    x, _ = inputs()
    y = jax.jit(lambda x: built(x, context(), jax.random.key(0))[0])(x)
    np.testing.assert_array_equal(y, jnp.concatenate([x, x], axis=-1))


@pytest.mark.scale
def test_memory_does_not_grow_with_the_depth():
    def memory(num_layers: int, mode: str, reversible: bool = True) -> int:
        graphdef, state = nnx.split(nnx.eval_shape(lambda: stack(num_layers, mode, (LOCAL,))))

        def total(state, x):
            built = nnx.merge(graphdef, state)
            return jnp.sum((built(x, context(512))[0] if reversible else plainly(built, x, 512)) ** 2)

        x = jax.ShapeDtypeStruct((ROWS, 512, DIM), jnp.float32)
        program: Any = compiled(jax.grad(total), state, x)
        return program.memory_analysis().temp_size_in_bytes

    assert memory(12, "scan") == memory(4, "scan")
    plain = memory(4, "unroll", reversible=False) - memory(2, "unroll", reversible=False)
    grown = memory(4, "unroll") - memory(2, "unroll")
    assert grown < 0.06 * plain  # gradients of parameters wait to be stacked


@pytest.mark.scale
def test_a_feed_forward_in_chunks_is_the_same_for_less_memory():
    def gradient(chunk: int | None) -> tuple[Any, int]:
        mixer = LocalAttention(num_heads=1, chunk=4)
        layers = (block(mixer, hidden_dim=256, chunk=chunk),)
        graphdef, state = nnx.split(ReversibleStack(layers, 1, DIM, Execution(), rngs=nnx.Rngs(params=0)))

        def total(state, x):
            return jnp.sum(nnx.merge(graphdef, state)(x, context(x.shape[1]))[0] ** 2)

        x = jnp.float32(np.random.default_rng(0).normal(size=(ROWS, 500, DIM)))
        program: Any = compiled(jax.grad(total, argnums=(0, 1)), state, x)
        return program(state, x), program.memory_analysis().temp_size_in_bytes

    (whole, large), (parts, small) = gradient(None), gradient(64)  # 500 is no multiple of 64
    assert small < large / 2
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    with pytest.raises(ValueError, match="chunk=0 is not positive"):
        Reversible(chunk=0)


def test_what_it_cannot_do_is_refused():
    x, _ = inputs()
    plain = Stack((block(LOCAL),), 1, DIM, Execution(), rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="use ReversibleStack"):
        plain(x, context())
    with pytest.raises(ValueError, match="no gradient would reach"):
        stack(2)(x, replace(context(), memory=x))
    crossed = Block(
        mixer=Attention(num_heads=2),
        cross=CrossAttention(num_heads=2),
        ffn=MLP(hidden_dim=4),
        norm=None,
        wiring=Reversible(),
    )
    with pytest.raises(ValueError, match="no place for cross-attention"):
        crossed.build(DIM, rngs=nnx.Rngs(params=0))
