"""The permutation language model: what a target may not see, what memory and packing may not change, what it costs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.models.losses import mean_cross_entropy
from llmlab.models.permutation import PermutationTransformer
from llmlab.models.xlnet import xlnet
from llmlab.nn.feed_forward import GatedMLP
from llmlab.nn.module import merge, split
from llmlab.nn.stack import Execution
from llmlab.plan.cost import count

VOCAB, LENGTH, TARGETS = 23, 12, 3
TINY = xlnet(embed_dim=16, num_layers=2, num_heads=2, hidden_dim=20, vocab_size=VOCAB)
CAUSAL = dataclasses.replace(TINY, bidirectional=False)
# Two orders of the same float32 operations; values are of size 1, a few dozen operations deep.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def randomised(config: PermutationTransformer, seed: int = 0) -> Any:
    graphdef, shapes, _ = config.abstract()
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    drawn = [jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), jnp.float32) for leaf in leaves]
    return Compiled(merge(graphdef, jax.tree.unflatten(treedef, drawn)))


class Compiled:
    """A model whose calls are compiled."""

    def __init__(self, model: Any) -> None:
        self.model = model
        graphdef, self._params = split(model)
        self._call = jax.jit(
            lambda params, inputs, use_mems: merge(graphdef, params)(use_mems=use_mems, **inputs), static_argnums=2
        )

    def __call__(self, input_ids: Any, use_mems: bool = False, **inputs: Any) -> Any:
        return self._call(self._params, {"input_ids": input_ids, **inputs}, use_mems)


def batch(rows: int = 2, seed: int = 0) -> dict[str, Any]:
    """Tokens in a random order, whose last are predicted."""
    rng = np.random.default_rng(seed)
    when = np.argsort(rng.random((rows, LENGTH)), axis=1)
    late = np.argsort(-when, axis=1)[:, :TARGETS]
    ids = rng.integers(0, VOCAB, (rows, LENGTH)).astype(np.int32)
    return {
        "input_ids": jnp.asarray(ids),
        "perm_mask": jnp.asarray(when[:, :, None] <= when[:, None, :], jnp.float32),
        "target_mapping": jnp.asarray(np.eye(LENGTH, dtype=np.float32)[late]),
        "labels": jnp.asarray(np.take_along_axis(ids, late, 1)),
    }


def test_a_prediction_depends_on_no_token_that_its_place_may_not_see() -> None:
    model, inputs = randomised(TINY), batch(rows=1)
    before = model(**inputs).logits
    hidden = np.asarray(inputs["target_mapping"] @ inputs["perm_mask"])[0]  # of each prediction, by token
    for token in range(LENGTH):
        changed = inputs["input_ids"].at[0, token].add(1)
        same = np.all(np.asarray(model(**inputs | {"input_ids": changed % VOCAB}).logits[0] == before[0]), axis=-1)
        np.testing.assert_array_equal(same, hidden[:, token] == 1)


def test_a_query_state_for_some_places_is_that_of_a_query_stream_for_all() -> None:
    model, inputs = randomised(TINY), batch()
    every = inputs | {"target_mapping": jnp.broadcast_to(jnp.eye(LENGTH), (2, LENGTH, LENGTH))}
    del every["labels"]
    chosen = jnp.einsum("bps,bsv->bpv", inputs["target_mapping"], model(**every).logits)
    np.testing.assert_allclose(model(**inputs).logits, chosen, **CLOSE)


def test_the_objectives_two_methods_give_the_logits_and_the_loss_of_a_call() -> None:
    model, inputs = randomised(TINY), batch()
    labels = inputs.pop("labels")
    hidden = jax.jit(model.model.hidden_states)(**inputs)
    assert hidden.states.shape == (2, TARGETS, 16)
    output = model(**inputs, labels=labels)
    np.testing.assert_allclose(model.model.project(hidden.states), output.logits, **CLOSE)
    np.testing.assert_allclose(output.loss, mean_cross_entropy(output.logits, labels), **CLOSE)


def test_packed_documents_compute_what_each_computes_alone() -> None:
    model = randomised(TINY)
    ids = batch(rows=1)["input_ids"]
    segments = jnp.array([[1] * 7 + [2] * 5])
    packed = model(ids, segment_ids=segments).logits
    alone = jnp.concatenate([model(ids[:, :7]).logits, model(ids[:, 7:]).logits], axis=1)
    np.testing.assert_allclose(packed, alone, **CLOSE)


def test_padding_on_either_side_changes_no_real_token() -> None:
    model = randomised(TINY)
    ids = batch(rows=1)["input_ids"]
    for real in (slice(0, 8), slice(4, 12)):
        mask = jnp.zeros((1, LENGTH)).at[:, real].set(1)
        for name, given in (("attention_mask", mask), ("input_mask", 1 - mask)):
            np.testing.assert_allclose(model(ids, **{name: given}).logits[:, real], model(ids[:, real]).logits, **CLOSE)


def test_a_causal_model_reads_two_segments_with_memory_as_one() -> None:
    model = randomised(CAUSAL)
    ids = batch()["input_ids"]
    whole = model(ids).logits
    first = model(ids[:, :7], use_mems=True)
    second = model(ids[:, 7:], mems=first.mems)
    np.testing.assert_allclose(jnp.concatenate([first.logits, second.logits], axis=1), whole, **CLOSE)
    assert second.mems.shape == (2, 2, LENGTH, 16)


def test_memory_is_cut_to_its_length_and_has_no_gradient() -> None:
    config = dataclasses.replace(TINY, memory_length=5, reuse_length=3)
    model, inputs = randomised(config), batch()
    first = model(**inputs, use_mems=True).mems
    assert first.shape == (2, 2, 3, 16)
    second = model(**inputs, mems=first).mems
    assert second.shape == (2, 2, 5, 16)
    np.testing.assert_array_equal(second[:, :, :2], first[:, :, 1:])
    gradient = jax.jit(jax.grad(lambda mems: jnp.sum(model.model(**inputs, mems=mems).logits)))(first)
    assert not np.any(gradient)


def loss_and_gradient(config: PermutationTransformer, params: Any) -> Any:
    graphdef, inputs = config.abstract()[0], batch()
    return jax.jit(jax.value_and_grad(lambda params: merge(graphdef, params)(**inputs).loss))(params)


@pytest.mark.parametrize("execution", [Execution(mode="scan"), Execution(mode="scan", remat="full")])
def test_no_way_to_apply_the_stack_changes_loss_or_gradient(execution: Execution) -> None:
    params = split(randomised(TINY).model)[1]
    plain = loss_and_gradient(dataclasses.replace(TINY, execution=Execution(mode="unroll")), params)
    other = loss_and_gradient(dataclasses.replace(TINY, execution=execution), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, other)


def test_dropout_needs_a_key_and_draws_by_it() -> None:
    model, inputs = randomised(xlnet(embed_dim=8, num_layers=1, num_heads=1, vocab_size=VOCAB, dropout=0.3)), batch()
    plain = model(**inputs).logits
    first, same, second = (model(**inputs, key=jax.random.key(n)).logits for n in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, plain)
    assert not np.allclose(first, second)


@pytest.mark.parametrize("config", [TINY, CAUSAL], ids=["both-ways", "causal"])
@pytest.mark.parametrize(
    "names", [(), ("target_mapping",), ("target_mapping", "mems")], ids=lambda names: "+".join(names)
)
def test_the_flop_formula_equals_the_count_of_the_program(
    config: PermutationTransformer, names: tuple[str, ...]
) -> None:
    config = dataclasses.replace(config, execution=Execution(mode="unroll"))
    graphdef, params, _ = config.abstract()
    mems = jax.ShapeDtypeStruct((2, 2, 4, 16), jnp.float32)
    inputs = {"input_ids": batch()["input_ids"], "target_mapping": batch()["target_mapping"], "mems": mems}
    inputs = {name: inputs[name] for name in ("input_ids", *names)}
    shapes = {name: value.shape for name, value in inputs.items()}

    def forward(params: Any, inputs: dict[str, Any]) -> jax.Array:
        return merge(graphdef, params)(**inputs).logits

    def loss(params: Any, inputs: dict[str, Any]) -> jax.Array:
        return jnp.sum(jnp.square(forward(params, inputs)))

    assert count(forward, params, inputs).matmul_flops == config.flops(shapes, training=False)
    # The distances and the memory are no results of the model: no gradient goes through them to what made them.
    spared = count(jax.grad(loss), params, inputs).matmul_flops / config.flops(shapes)
    assert 0.95 < spared <= 1.0


IDS, ONES = jnp.zeros((3, 4), jnp.int32), jnp.ones((3, 4), jnp.int32)


@pytest.mark.parametrize(
    ("changes", "inputs", "message"),
    [
        ({"clamp_length": 0}, {}, "clamp_length=0 is not positive"),
        ({"dropout": 1.0}, {}, "dropout=1.0 is not a probability"),
        ({}, {"attention_mask": ONES, "input_mask": ONES}, "give one of them"),
        ({"backward_half": True}, {}, "a batch of 3 rows has no second half"),
        ({}, {"segment_ids": ONES, "mems": jnp.zeros((2, 3, 3, 16))}, "a packed row has no memory"),
    ],
)
def test_errors_name_value_and_way_out(changes: dict[str, Any], inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        randomised(dataclasses.replace(TINY, **changes)).model(IDS, **inputs)


def test_feed_forwards_are_swapped_like_in_any_stack() -> None:
    (block,) = TINY.pattern
    gated = dataclasses.replace(TINY, pattern=(dataclasses.replace(block, ffn=GatedMLP(hidden_dim=8)),))
    assert np.all(np.isfinite(randomised(gated)(**batch()).loss))
