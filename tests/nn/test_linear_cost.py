"""Attention that claims to be linear in the length of the sequence is: FLOPs, memory and time, forward and backward."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llmlab.nn.config import Context, Mixer
from llmlab.nn.favor import FavorAttention
from llmlab.nn.linformer import LinformerAttention
from llmlab.nn.lsh import LocalAttention, LSHAttention
from llmlab.nn.masks import Causal, Full, Mask
from llmlab.plan.cost import count

# Small enough for less than 32 MB at both lengths: beyond, glibc asks the system for the pages of every buffer anew,
# and the time would jump once (by 1.3), whatever the algorithm.
SHORT, LONG, DIM, HEADS = 4096, 8192, 32, 2

MIXERS: Mapping[str, tuple[Mixer, Mask]] = {
    "favor": (FavorAttention(num_heads=HEADS, num_features=32), Full()),
    "favor, causal": (FavorAttention(num_heads=HEADS, num_features=32, causal=True), Causal()),
    "lsh": (LSHAttention(num_heads=HEADS, chunk=16, num_hashes=2, num_buckets=(16, 32)), Full()),
    "lsh, causal, default buckets": (LSHAttention(num_heads=HEADS, chunk=32, max_length=LONG), Causal()),
    "local": (LocalAttention(num_heads=HEADS, chunk=32), Causal()),
    "linformer": (LinformerAttention(num_heads=HEADS, max_length=LONG, projected=64), Full()),
}


def forward(mixer: Mixer, mask: Mask, length: int) -> tuple[Callable[..., Any], Any, Any]:
    """The layer as a function of parameters and a row, and both."""
    graphdef, params = nnx.split(mixer.build(DIM, rngs=nnx.Rngs(params=0)))
    context = Context(mask=mask, position_ids=jnp.arange(length)[None])
    return lambda p, x: nnx.merge(graphdef, p)(x, context)[0], params, jnp.ones((1, length, DIM))


def step(mixer: Mixer, mask: Mask, length: int) -> tuple[Callable[..., Any], Any, Any]:
    """Value and gradients of the layer's output, summed."""
    layer, params, x = forward(mixer, mask, length)
    return jax.value_and_grad(lambda p, x: jnp.sum(layer(p, x) ** 2), argnums=(0, 1)), params, x


def seconds(compiled: Any, params: Any, x: Any) -> float:
    """Time that this process computed, on all its threads: a wall clock would count what else the machine does."""
    start = time.process_time()
    jax.block_until_ready(compiled(params, x))
    return time.process_time() - start


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.scale
def test_cost_is_linear_in_the_length(name):
    steps = [step(*MIXERS[name], length) for length in (SHORT, LONG)]
    flops = [count(*arguments).flops for arguments in steps]
    assert flops[1] <= 2.2 * flops[0]
    programs = [(jax.jit(function).lower(p, x).compile(), p, x) for function, p, x in steps]
    analyses: list[Any] = [program.memory_analysis() for program, _, _ in programs]
    memory = [analysis.temp_size_in_bytes for analysis in analyses]
    assert memory[1] <= 2.2 * memory[0]
    # Of neighbours in time, for others take the processor's caches and its clock, and the best of the short ones may
    # have had a moment that no long one has. A quadratic cost would be 4.
    times = [[seconds(*program) for program in programs] for _ in range(15)]
    assert statistics.median(long / short for short, long in times) <= 2.6


@pytest.mark.parametrize("name", MIXERS)
def test_context_flops_are_those_of_the_program_beside_the_projections(name):
    mixer, mask = MIXERS[name]
    for length in (96, 1024):
        layer, params, x = forward(mixer, mask, length)
        projections = (3 if isinstance(mixer, LSHAttention) else 4) * 2 * DIM * DIM * length
        assert count(layer, params, x).matmul_flops - projections == mixer.context_flops(DIM, length) * length
