"""On a mesh, what is remembered is split by rows and heads, and decoding gives what one device gives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.nn.cache import MemoryCache, RollingCache, Stored
from llmlab.nn.favor import FavorState
from llmlab.nn.module import Params, logical_axes, merge
from llmlab.sharding import Mesh, activate
from tests.infer.test_cached import CASES, decoded, prepared

# What the layers of a family keep: kind, and the share (rows, heads, slots, width) of a device of 2 x 2. Four rows, so
# two of them, and half of the heads (two key/value heads of Llama and Mistral, four heads of Performer and T5).
KEPT: dict[str, dict[type, list[tuple[int, ...]]]] = {
    "Llama": {Stored: [(2, 1, 8, 4), (2, 1, 8)]},  # int8, with scales
    "Mistral": {RollingCache: [(2, 1, 3, 4), (2, 1, 3, 4), (2, 3)]},
    "Performer": {FavorState: [(2, 2, 8, 5), (2, 2, 5), (2, 2)]},
    "T5": {MemoryCache: [(2, 2, 4, 8), (2, 2, 4, 8)], Stored: [(2, 2, 8, 8)]},
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.scale
def test_caches_are_split_over_rows_and_heads_and_decode_the_same(name: str) -> None:
    case, dtype = CASES[name], jnp.int8 if name == "Llama" else jnp.float32
    steps, params = prepared(case)
    want, want_after, _ = jax.jit(lambda params, places: decoded(case, steps, params, places, dtype))(
        params, case.positions
    )

    def run(params: Params, position_BS: jax.Array) -> Any:  # not the same function: a mesh is traced into it
        return decoded(case, steps, params, position_BS, dtype)

    placement = Mesh(data=2, tensor=2).build(jax.devices()[:4])
    with activate(placement):
        placed = jax.device_put(params, placement.shardings(logical_axes(merge(steps.graphdef, params)), params))
        got, after, state = jax.jit(run)(placed, case.positions)
        begun = steps.new_state(4, 8, dtype, case.inputs_of(jnp.zeros((4, 1), int), first=True))

    tolerance = 1e-5 * float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    np.testing.assert_allclose(after, want_after, rtol=0, atol=tolerance)
    for caches in (begun.caches, state.caches):
        for kind, shapes in KEPT[name].items():
            for leaf, shape in zip(jax.tree.leaves(_first(caches, kind)), shapes, strict=True):
                assert leaf.sharding.shard_shape(leaf.shape) == shape, (kind, leaf.sharding)
                assert len(leaf.sharding.device_set) == 4


def _first(tree: Any, kind: type) -> Any:
    """The first node of this class."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return next(node for node in nodes if isinstance(node, kind))
