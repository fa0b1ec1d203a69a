"""What makes blockwise attention worth having: memory linear in the sequence, and no visit to blocks in vain."""

import jax
import jax.numpy as jnp
import pytest

from llmlab.nn.kernels import Scoring
from llmlab.nn.kernels.blockwise import Blocks, blockwise, pairs
from llmlab.nn.kernels.reference import reference
from llmlab.nn.masks import Causal, Full, Mask, SlidingWindow
from tests.optimised import compiled


def temporary_bytes(length: int, kernel: str) -> int:
    """Temporary memory of the gradient, as compiled."""
    q = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        scoring = Scoring(mask=Causal(), scale=0.25)
        o = blockwise(q, k, v, scoring, block=128) if kernel == "blockwise" else reference(q, k, v, scoring)
        return jnp.sum(o**2)

    memory = compiled(jax.grad(loss, argnums=(0, 1, 2)), q, q, q).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.scale
def test_memory_is_linear_in_the_sequence_forward_and_backward() -> None:
    assert temporary_bytes(4096, "blockwise") < 2.2 * temporary_bytes(2048, "blockwise")
    assert temporary_bytes(4096, "blockwise") < 4 * 4096**2 / 4  # far below one matrix of weights
    assert temporary_bytes(4096, "reference") > 3.8 * temporary_bytes(2048, "reference")  # the gauge can tell


@pytest.mark.parametrize(
    ("mask", "visited"),
    [
        (Full(), 8 * 8),
        (Causal(), 8 * 9 // 2),  # half the work: at twice the length 3.8 times as many, not 4
        (Causal() & SlidingWindow(left=64), 8 + 7),  # each block and the one before
        (SlidingWindow(left=64, right=64), 8 + 7 + 7),
    ],
    ids=str,
)
def test_only_blocks_that_the_mask_leaves_are_visited(mask: Mask, visited: int) -> None:
    query_blocks, kv_blocks, first = pairs(Blocks(64, 64, 500, 500), Scoring(mask=mask, scale=1.0))
    assert len(query_blocks) == len(kv_blocks) == visited
    assert int(first.sum()) == 8  # every block of queries starts once


def test_trip_counts_are_static_so_that_costs_can_be_counted() -> None:
    x = jnp.zeros((1, 300, 2, 8))
    jaxpr = jax.make_jaxpr(lambda q: blockwise(q, q, q, Scoring(mask=Causal(), scale=1.0), block=64))(x)
    text = str(jaxpr)
    assert "length=15" in text  # 5 * 6 / 2
    assert "while[" not in text
