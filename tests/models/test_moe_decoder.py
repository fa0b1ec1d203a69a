"""Decoders with mixtures of experts: however they are applied, split or cut up, they compute the same."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llmlab.models.config import Transformer
from llmlab.models.llama import llama
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.module import logical_axes, merge, split
from llmlab.nn.moe import Capacity, LoadBalance, MixtureOfExperts, TopK
from llmlab.nn.moe.blocked import pieces
from llmlab.nn.stack import Execution
from llmlab.objectives import NextToken
from llmlab.optim import SGD
from llmlab.plan.cost import count
from llmlab.training.state import new_state
from llmlab.training.step import make_train_step
from tests.drawing import drawn

VOCAB, EXPERTS, K = 29, 4, 2
SMALL: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "hidden_dim": 20, "vocab_size": VOCAB}


def model(
    num_layers: int = 3, router: TopK | None = None, *, alternate: bool = False, z_loss: float = 0.1
) -> Transformer:
    """A Llama whose feed-forwards, or every second one, are mixtures."""
    plain = llama(num_layers=num_layers, **SMALL)
    mixture = MixtureOfExperts(
        num_experts=EXPERTS,
        experts_per_token=K,
        expert=GatedMLP(hidden_dim=12),
        router=router or TopK(balance=LoadBalance(over="model")),
        z_loss=z_loss,
    )
    block = dataclasses.replace(plain.pattern[0], ffn=mixture)
    return dataclasses.replace(plain, pattern=(plain.pattern[0], block) if alternate else (block,))


def tokens(length: int = 11) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (4, length), 0, VOCAB)


def called(built: Any, **inputs: Any) -> Any:
    graphdef, params = split(built)
    arrays = {name: jnp.asarray(value) for name, value in inputs.items()}
    return jax.jit(lambda params, inputs: merge(graphdef, params)(**inputs))(params, arrays)


def solve(config: Transformer, params: Any) -> tuple[Any, Any]:
    """Loss, auxiliary losses among it, and its gradient, on rows with padding."""
    graphdef = config.abstract()[0]
    ids = tokens()
    mask = jnp.arange(11) < jnp.array([[11], [7], [11], [4]])
    labels = jnp.where(mask, ids, -100)

    def loss(params: Any) -> jax.Array:
        return merge(graphdef, params)(ids, attention_mask=mask, labels=labels).loss

    return jax.jit(jax.value_and_grad(loss))(params)


def test_execution_changes_neither_the_loss_nor_its_gradient() -> None:
    config = dataclasses.replace(model(), num_layers=2)
    params = split(drawn(lambda: config.build(nnx.Rngs(params=0))))[1]
    want = solve(dataclasses.replace(config, execution=Execution(mode="unroll")), params)
    got = solve(dataclasses.replace(config, execution=Execution(mode="scan", remat="full")), params)
    for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=1e-4, atol=1e-6)


def test_the_loss_has_the_routers_terms() -> None:
    config = model()
    built = drawn(lambda: config.build(nnx.Rngs(params=0)))
    ids = tokens()
    out = called(built, input_ids=ids, labels=ids)
    terms = built.auxiliary_losses(out.auxiliary)
    assert terms.keys() == {"load_balance", "router_z"}
    nll = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out.logits), ids[..., None], -1))
    np.testing.assert_allclose(out.loss, nll + sum(terms.values()), rtol=1e-6)
    assert out.auxiliary["router_assigned"].shape == (3, EXPERTS)
    np.testing.assert_allclose(out.auxiliary["router_assigned"].sum(1), ids.size * K)


def test_padding_leaves_loss_and_statistics_as_they_are() -> None:
    """Capacities and statistics included: a padded batch is the batch without padding."""
    config = model(router=TopK(capacity=Capacity(factor=0.9)))
    built = drawn(lambda: config.build(nnx.Rngs(params=0)))
    ids = tokens(length=8)
    padded, mask = np.pad(ids, ((0, 0), (0, 5))), np.pad(np.ones_like(ids), ((0, 0), (0, 5)))
    want = called(built, input_ids=ids, labels=ids)
    got = called(built, input_ids=padded, attention_mask=mask, labels=np.where(mask == 1, padded, -100))
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
    for name, statistic in want.auxiliary.items():
        np.testing.assert_allclose(got.auxiliary[name], statistic, rtol=1e-4, err_msg=name)
    assert want.auxiliary["router_dropped"].sum() > 0


def test_accumulated_parts_give_the_gradient_of_the_whole_batch() -> None:
    """Rows count different numbers of tokens. Load balance is no mean over tokens, so that each part has its own."""
    config = model(router=TopK(balance=None), z_loss=0.0)
    built = drawn(lambda: config.build(nnx.Rngs(params=0)))
    graphdef, params = split(built)
    ids = tokens()
    labels = np.where(np.arange(11) < np.array([[11], [3], [8], [1]]), ids, -100)
    transformation = SGD(peak_lr=1.0).build(logical_axes(built), total_steps=10)
    results = []
    for accumulation in (1, 2):
        step = make_train_step(graphdef, NextToken(), transformation, accumulation=accumulation)
        state = new_state(jax.tree.map(jnp.copy, params), transformation)
        state, metrics = step(state, {"input_ids": ids, "labels": labels})
        results.append((state.params, metrics["train/loss"]))
    for got in results[1:]:
        for mine, exact in zip(jax.tree.leaves(got), jax.tree.leaves(results[0]), strict=True):
            np.testing.assert_allclose(mine, exact, rtol=1e-5, atol=1e-6)


def test_only_active_experts_count_as_flops() -> None:
    """The formula of the config equals the count of the program, but for the rows that blocks compute in vain."""
    config = model(alternate=True)
    block = dataclasses.replace(
        config.pattern[0].mixer,
        kernel="reference",
        position=None,  # rotary goes through an identity matmul on CPU
    )
    pattern = tuple(dataclasses.replace(b, mixer=block) for b in config.pattern)
    config = dataclasses.replace(config, pattern=pattern, num_layers=4)
    graphdef, params, _ = config.abstract()
    ids = jax.ShapeDtypeStruct((4, 11), jnp.int32)

    def forward(params: Any, ids: Any) -> jax.Array:
        return jnp.sum(jnp.square(merge(graphdef, params)(ids).logits))

    in_vain = pieces(4 * 11 * 2, EXPERTS)[-1] - 1
    spare = 2 * 3 * EXPERTS * in_vain * 2 * 16 * 12  # two layers, three matrices
    flops = config.flops({"input_ids": (4, 11)}, training=False)
    assert count(forward, params, ids).matmul_flops == flops + spare
    assert count(jax.grad(forward), params, ids).matmul_flops == 3 * (flops + spare)
    dense = dataclasses.replace(config.pattern[1], ffn=GatedMLP(hidden_dim=K * 12))
    same = dataclasses.replace(config, pattern=(config.pattern[0], dense))
    router = 2 * 2 * 16 * EXPERTS
    assert config.flops_per_token(11, training=False) == same.flops_per_token(11, training=False) + router
