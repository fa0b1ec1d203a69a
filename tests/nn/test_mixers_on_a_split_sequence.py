"""Every mixer computes the same where the mesh splits the sequence: attention by a ring or by an exchange of heads,
the others as XLA partitions them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.nn.attention import Attention, CrossAttention
from llmlab.nn.big_bird import BigBirdAttention
from llmlab.nn.config import Context, Mixer
from llmlab.nn.favor import FavorAttention
from llmlab.nn.linformer import LinformerAttention
from llmlab.nn.longformer import LongformerAttention
from llmlab.nn.lsh import LocalAttention, LSHAttention
from llmlab.nn.masks import Causal, Full, Mask, Padding
from llmlab.nn.positions import Rotary
from llmlab.nn.two_stream import Stream, TwoStreamAttention, TwoStreamContext, encoded_distances
from llmlab.sharding import Mesh, activate
from llmlab.sharding.rules import active_sharding

pytestmark = pytest.mark.scale

ROWS, LENGTH, DIM = 2, 64, 16

MIXERS: Mapping[str, tuple[Mixer, Mask]] = {
    "attention": (Attention(num_heads=4, num_kv_heads=2, position=Rotary(), dropout=0.1), Causal()),
    "cross-attention": (CrossAttention(num_heads=4, dropout=0.1), Full()),
    "longformer": (LongformerAttention(num_heads=4, reach=6, max_global=2, dropout=0.1), Full()),
    "big bird": (BigBirdAttention(num_heads=4, block_size=4, num_random_blocks=1, dropout=0.1), Full()),
    "favor": (FavorAttention(num_heads=4, num_features=8), Full()),
    "causal favor": (FavorAttention(num_heads=4, num_features=8, causal=True, chunk=16), Causal()),
    "linformer": (LinformerAttention(num_heads=4, max_length=LENGTH, projected=8, dropout=0.1), Full()),
    "lsh": (LSHAttention(num_heads=4, chunk=8, num_buckets=4, num_hashes=2, dropout=0.1), Causal()),
    "local": (LocalAttention(num_heads=4, chunk=8, dropout=0.1), Causal()),
    "two streams": (TwoStreamAttention(num_heads=4, dropout=0.1), Full()),
}


def context(name: str, mask: Mask) -> Context:
    real = jnp.asarray(np.arange(LENGTH) < [[LENGTH], [LENGTH - 9]])
    found = Context(
        mask=mask & Padding(real),
        position_ids=jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH)),
        valid=real,
        global_tokens=jnp.asarray(np.arange(LENGTH) < [[2], [1]]),
        memory=jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 32, DIM)), jnp.float32),
        memory_mask=Padding(real[:, 32:]),
    )
    if name != "two streams":
        return found
    distances = encoded_distances(LENGTH, LENGTH, DIM)[None]
    stream = Stream(first_BQ=None, allowed_BQT=jnp.broadcast_to(real[:, None], (ROWS, LENGTH, LENGTH)), other_BQT=None)
    return TwoStreamContext(
        mask=Full(), position_ids=found.position_ids, distances_GRD=jnp.asarray(distances), content=stream, query=None
    )


# Those that call the attention kernel also with heads exchanged for tokens; the others know nothing of the ring either.
CASES = [("ring", name) for name in MIXERS] + [("all_to_all", name) for name in ("attention", "cross-attention")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_mixer_on_a_split_sequence_equals_one_device(kind: Any, name: str) -> None:
    mixer, mask = MIXERS[name]
    layer = mixer.build(DIM, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    surroundings = context(name, mask)
    x_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(ROWS, LENGTH, DIM)), jnp.float32)

    def solve(x_BSD: jax.Array) -> Any:
        def loss(params: Any, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
            y_BSD = nnx.merge(graphdef, params)(x_BSD, surroundings, jax.random.key(3))[0]
            return jnp.sum(jnp.sin(y_BSD)), y_BSD

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x_BSD)

    wanted = solve(x_BSD)
    with activate(replace(Mesh(data=2, sequence=2, tensor=2), context=kind).build(jax.devices())):
        found = solve(jax.device_put(x_BSD, active_sharding(x_BSD.shape, "batch", "residual", None)))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # float32 sums in another order: 1e-5 of the largest value.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(np.abs(other).max()))
