"""The encoder and its heads: packing, padding, losses, costs."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models.config import Untied
from llmlab.models.encoder import Encoder, Factorised, default_positions
from llmlab.models.heads import (
    EncoderHead,
    MaskedLM,
    Pooler,
    PreTraining,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
    Transform,
)
from llmlab.nn.attention import Attention
from llmlab.nn.config import Block
from llmlab.nn.feed_forward import MLP
from llmlab.nn.module import merge
from llmlab.nn.norms import LayerNorm
from llmlab.nn.positions import Learned
from llmlab.nn.wiring import PostNorm
from llmlab.objectives import MaskedToken
from llmlab.objectives.cross_entropy import chunked_cross_entropy
from llmlab.plan.cost import count
from tests.drawing import drawn

VOCAB, DIM, BATCH, LENGTH = 29, 12, 2, 10


def encoder(**changes: Any) -> Encoder:
    block = Block(
        mixer=Attention(num_heads=2, bias=True, output_bias=True, kernel="reference"),
        ffn=MLP(hidden_dim=20),
        norm=LayerNorm(),
        wiring=PostNorm(),
    )
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "embed_dim": DIM,
        "num_layers": 2,
        "pattern": (block,),
        "position": Learned(16),
        "num_token_types": 2,
        "embedding_norm": LayerNorm(),
        "pooler": Pooler(),
        "head": MaskedLM(),
    }
    return Encoder(**options | changes)


def built(seed: int = 0, **changes: Any) -> Any:
    """A model whose every parameter is drawn: zero biases would hide mistakes."""
    return drawn(lambda: encoder(**changes).build(nnx.Rngs(0)), seed)


def ids(seed: int = 0, shape: tuple[int, ...] = (BATCH, LENGTH), high: int = VOCAB) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, high, shape), jnp.int32)


HEADS: dict[str, EncoderHead | None] = {
    "masked": MaskedLM(),
    "masked-untied": MaskedLM(transform=None, decoder=Untied(), bias=False),
    "pretraining": PreTraining(),
    "sequence": SequenceClassification(num_labels=3),
    "sequence-own-pooler": SequenceClassification(num_labels=3, pooler=Pooler(dim=7, activation="relu")),
    "tokens": TokenClassification(num_labels=4),
    "spans": QuestionAnswering(),
    "none": None,
}
FACTORISED = {"plain": None, "narrow": Factorised(dim=5), "trigram": Factorised(dim=5, neighbours=1)}


@pytest.mark.parametrize("factorised", FACTORISED)
def test_packed_documents_compute_what_they_compute_alone(factorised):
    model = built(factorised=FACTORISED[factorised], head=MaskedLM())
    lengths = (4, 3)
    documents = [ids(seed, (1, length)) for seed, length in enumerate(lengths)]
    types = [ids(seed, (1, length), high=2) for seed, length in enumerate(lengths)]
    padding = jnp.zeros((1, LENGTH - sum(lengths)), jnp.int32)
    packed = model(
        jnp.concatenate([*documents, padding + 9], axis=1),
        token_type_ids=jnp.concatenate([*types, padding], axis=1),
        position_ids=jnp.concatenate([jnp.arange(4), jnp.arange(3), jnp.zeros(3, jnp.int32)])[None],
        segment_ids=jnp.asarray([[1] * 4 + [2] * 3 + [0] * 3]),
    )
    start = 0
    for document, kinds in zip(documents, types, strict=True):
        alone = model(document, token_type_ids=kinds)
        stop = start + document.shape[1]
        np.testing.assert_allclose(packed.logits[:, start:stop], alone.logits, atol=2e-6)
        start = stop


def test_padding_changes_nothing_on_either_side():
    model = built()
    tokens = ids(1, (1, 6))
    alone = model(tokens).logits
    right = model(jnp.pad(tokens, ((0, 0), (0, 3))), attention_mask=jnp.asarray([[1] * 6 + [0] * 3]))
    np.testing.assert_allclose(right.logits[:, :6], alone, atol=2e-6)
    left = model(
        jnp.pad(tokens, ((0, 0), (3, 0))),
        attention_mask=jnp.asarray([[0] * 3 + [1] * 6]),
        position_ids=jnp.maximum(jnp.arange(9) - 3, 0)[None],
    )
    np.testing.assert_allclose(left.logits[:, 3:], alone, atol=2e-6)


def test_every_token_sees_both_sides():
    model, tokens = built(), ids(1, (1, 6))
    before = model(tokens).logits
    for place in range(6):
        after = model(tokens.at[0, place].add(1) % VOCAB).logits
        assert np.all(np.max(np.abs(after - before), axis=-1) > 1e-4)


def test_positions_skip_the_token_that_is_not_counted():
    tokens = jnp.asarray([[1, 1, 5, 6, 7], [5, 6, 1, 1, 1], [5, 1, 6, 1, 7]])
    expected = [[-1, -1, 0, 1, 2], [0, 1, -1, -1, -1], [0, -1, 1, -1, 2]]
    np.testing.assert_array_equal(default_positions(tokens, 1), expected)
    np.testing.assert_array_equal(default_positions(tokens), [[0, 1, 2, 3, 4]] * 3)


@pytest.mark.parametrize(
    ("name", "factorised"), [*((name, "plain") for name in HEADS), ("masked", "trigram"), ("none", "narrow")]
)
def test_the_flop_formula_equals_the_count_of_the_program(name, factorised):
    config = encoder(head=HEADS[name], factorised=FACTORISED[factorised])
    graphdef, params, _ = config.abstract()
    shapes = {"input_ids": (BATCH, LENGTH)}

    def forward(params: Any, input_ids: jax.Array) -> Any:
        output = merge(graphdef, params)(input_ids)
        if name == "spans":
            return output.start_logits + output.end_logits
        if name == "pretraining":
            return jnp.sum(output.logits) + jnp.sum(output.seq_relationship_logits)
        return output.pooled if name == "none" else output.logits

    def gradient(params: Any, input_ids: jax.Array) -> Any:
        return jax.grad(lambda params: jnp.sum(jnp.square(forward(params, input_ids))))(params)

    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
    assert count(forward, params, tokens).matmul_flops == config.flops(shapes, training=False)
    assert count(gradient, params, tokens).matmul_flops == config.flops(shapes)


def test_places_that_the_objective_does_not_score_cost_no_head():
    config = encoder(head=MaskedLM())
    shapes = {"input_ids": (BATCH, LENGTH), "labels": (BATCH, LENGTH), "masked_positions": (BATCH, 3)}
    graphdef, params, _ = config.abstract()
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}

    def loss(params: Any, batch: Any) -> jax.Array:
        return MaskedToken().loss(merge(graphdef, params), batch).total

    assert count(jax.grad(loss), params, batch).matmul_flops == config.flops(shapes)


@pytest.mark.parametrize("name", ["masked", "masked-untied", "pretraining", "tokens"])
def test_chunked_cross_entropy_of_the_states_equals_the_loss_of_a_call(name):
    model, tokens = built(head=HEADS[name]), ids()
    labels = jnp.where(ids(5, high=2) == 0, ids(6, high=4), -100)
    hidden = model.hidden_states(tokens)
    parts = chunked_cross_entropy(hidden.states, model.project, labels, chunk=3)
    output = model(tokens, labels=labels)
    np.testing.assert_allclose(parts.total / parts.count, output.loss, rtol=1e-6)
    np.testing.assert_array_equal(output.last_hidden_state, hidden.states)


def test_pretraining_adds_the_losses_that_have_targets():
    model, tokens = built(head=PreTraining()), ids()
    labels, follows = ids(3), jnp.asarray([0, 1])
    words = model(tokens, labels=labels)
    sentences = model(tokens, next_sentence_label=follows)
    both = model(tokens, labels=labels, next_sentence_label=follows)
    np.testing.assert_allclose(both.loss, words.loss + sentences.loss, rtol=1e-6)
    logits = np.asarray(both.seq_relationship_logits, np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(2), np.asarray(follows)]
    np.testing.assert_allclose(sentences.loss, nll.mean(), rtol=1e-5)
    np.testing.assert_array_equal(model.relate(both.last_hidden_state), both.seq_relationship_logits)


def test_losses_of_sequence_classification_by_problem_type():
    def logits_and_loss(labels: jax.Array, **options: Any) -> tuple[np.ndarray, float]:
        output = built(head=SequenceClassification(**options))(ids(), labels=labels)
        return np.asarray(output.logits, np.float64), float(output.loss)

    numbers, classes, flags = jnp.asarray([0.3, -2.0]), jnp.asarray([2, 0]), ids(1, (2, 3), high=2).astype(jnp.float32)
    logits, loss = logits_and_loss(numbers, num_labels=1)
    np.testing.assert_allclose(loss, np.mean((logits[:, 0] - np.asarray(numbers)) ** 2), rtol=1e-5)
    logits, loss = logits_and_loss(classes, num_labels=3)
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(2), np.asarray(classes)]
    np.testing.assert_allclose(loss, nll.mean(), rtol=1e-5)
    logits, loss = logits_and_loss(flags, num_labels=3)
    chance = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.where(np.asarray(flags) == 1, np.log(chance), np.log(1 - chance)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    _, asked = logits_and_loss(flags.astype(jnp.int32), num_labels=3, problem_type="multi_label_classification")
    np.testing.assert_allclose(asked, expected, rtol=1e-5)


def test_answers_beyond_the_row_are_not_counted():
    model = built(head=QuestionAnswering())
    starts, ends = jnp.asarray([2, LENGTH + 3]), jnp.asarray([4, LENGTH])
    both = model(ids(), start_positions=starts, end_positions=ends)
    first = model(ids()[:1], start_positions=starts[:1], end_positions=ends[:1])
    np.testing.assert_allclose(both.loss, first.loss, rtol=1e-5)


def test_the_first_token_stands_for_the_row_where_there_is_no_pooler():
    output = built(pooler=None, head=SequenceClassification())(ids())
    np.testing.assert_array_equal(output.pooled, output.last_hidden_state[:, 0])


def test_a_head_is_where_dropout_can_be_too():
    model, tokens = built(head=SequenceClassification(dropout=0.5, pooler=Pooler(dropout=0.5))), ids()
    plain = model(tokens)
    first, again, other = (model(tokens, key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.logits, again.logits)
    assert not np.array_equal(first.logits, other.logits)
    assert not np.array_equal(first.logits, plain.logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooler": None, "head": PreTraining()}, "pooler=None"),
        ({"head": SequenceClassification(num_labels=3), "pattern": ()}, "pattern is empty"),
        ({"head": MaskedLM(transform=Transform(dim=5)), "factorised": Factorised(dim=6)}, "use Transform"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        encoder(**changes).build(nnx.Rngs(0))


def test_token_types_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="token_type_ids"):
        built(num_token_types=0)(ids(), token_type_ids=ids(high=2))


def test_labels_have_names_or_none():
    with pytest.raises(ValueError, match="give one to each"):
        replace(TokenClassification(num_labels=3), names=("a",))
