"""Axial positions against the table they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab import config as files
from llmlab.nn.axial import Axial
from llmlab.nn.module import logical_axes


@pytest.mark.parametrize(("shape", "dims"), [((3, 4), (2, 5)), ((12,), (7,)), ((2, 3, 2), (1, 2, 4))])
def test_positions_are_those_of_the_grid(shape, dims):
    built = Axial(shape, dims).build(7, rngs=nnx.Rngs(params=0))
    tables = [np.asarray(table[...]) for table in built.tables]
    grid = np.zeros((*shape, 7))
    for place in np.ndindex(*shape):
        grid[place] = np.concatenate([table[i] for table, i in zip(tables, place, strict=True)])
    x = jax.random.normal(jax.random.key(0), (2, 12, 7))
    ids = np.stack([np.arange(12), np.arange(12)[::-1]])
    np.testing.assert_array_equal(built(x, jnp.asarray(ids)), np.asarray(x) + np.float32(grid.reshape(12, 7)[ids]))


def test_gradients_reach_the_tables():
    built = Axial((3, 4), (2, 5)).build(7, rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(built)
    x, ids = jnp.zeros((1, 10, 7)), jnp.arange(10)[None]
    slopes = jax.grad(lambda s: jnp.sum(nnx.merge(graphdef, s)(x, ids)))(state)
    rows, columns = jax.tree.leaves(slopes)
    np.testing.assert_array_equal(rows, np.outer([4, 4, 2], np.ones(2)))  # how many of 10 positions stand in each
    np.testing.assert_array_equal(columns, np.outer([3, 3, 2, 2], np.ones(5)))


def test_the_length_is_the_product_and_survives_a_file():
    axial = Axial((3, 4), (2, 5))
    assert axial.max_length == 12
    assert files.from_json(files.to_json(axial), Axial) == axial
    assert logical_axes(axial.build(7, rngs=nnx.Rngs(params=0)))["tables"]["1"] == ("position", "embed")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must be as many"):
        Axial((3, 4), (2,))
    with pytest.raises(ValueError, match="add up to 7, not to embed_dim=8"):
        Axial((3, 4), (2, 5)).build(8, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="13 positions and the model 12"):
        Axial((3, 4), (2, 5)).build(7, rngs=nnx.Rngs(params=0))(jnp.zeros((1, 13, 7)), jnp.arange(13)[None])
