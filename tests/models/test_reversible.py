"""The model on a reversible stack: padding, packing, costs, what the config refuses."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models import reformer
from llmlab.models.config import named
from llmlab.models.heads import MaskedLM, QuestionAnswering, SequenceClassification
from llmlab.models.reversible import ReversibleTransformer
from llmlab.nn.axial import Axial
from llmlab.nn.lsh import LocalAttention, LSHAttention
from llmlab.nn.module import merge, split
from llmlab.nn.wiring import PreNorm
from llmlab.objectives import NextToken
from llmlab.plan.cost import count

VOCAB, ROWS = 31, 2


def config(**changes: Any) -> ReversibleTransformer:
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "embed_dim": 8,
        "layers": ("local", "lsh"),
        "local": LocalAttention(num_heads=2, chunk=4),
        "lsh": LSHAttention(num_heads=2, chunk=8, num_buckets=4, num_hashes=2),
        "hidden_dim": 12,
        "position": Axial((4, 16), (3, 5)),
    }
    return reformer.reformer(**options | changes)


def built(seed: int = 0, **changes: Any) -> Any:
    return config(**changes).build(nnx.Rngs(params=seed))


def ids(length: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, VOCAB, (ROWS, length)), jnp.int32)


def logits(model: Any, input_ids: jax.Array, **more: Any) -> np.ndarray:
    graphdef, params = split(model)
    return np.asarray(jax.jit(lambda p, x, more: merge(graphdef, p)(x, **more).logits)(params, input_ids, more))


def test_a_later_token_changes_nothing_before_it_where_it_is_hashed_alike():
    # In one chunk nothing is sorted, so that causality is exact; between chunks a token's bucket moves where others'
    # chunks are cut, which is the approximation.
    model, x = built(lsh=LSHAttention(num_heads=2, chunk=16), local=LocalAttention(num_heads=2, chunk=16)), ids(12)
    before, after = logits(model, x), logits(model, x.at[:, 7].set(0))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert not np.allclose(before[:, 7:], after[:, 7:])


def test_a_sequence_is_padded_to_whole_chunks_of_all_mixers_once_it_exceeds_the_shortest():
    model = config()
    assert [model.padded(n) for n in (3, 4, 5, 8, 9, 16)] == [3, 4, 8, 8, 16, 16]
    assert config(layers=("local",)).padded(5) == 8
    x = ids(11)
    whole = logits(built(), jnp.pad(x, ((0, 0), (0, 5))), attention_mask=jnp.broadcast_to(jnp.arange(16) < 11, (2, 16)))
    np.testing.assert_allclose(logits(built(), x), whole[:, :11], atol=1e-6)  # two programs: rounding


def test_documents_of_a_packed_row_are_refused_and_rows_without_segments_train():
    model, x = built(), ids(16)
    with pytest.raises(ValueError, match="a row of its own"):
        model(x, segment_ids=jnp.ones_like(x))
    graphdef, params = split(model)
    batch = {"input_ids": x, "labels": jnp.roll(x, -1, axis=1)}

    def loss(params: Any) -> Any:
        parts = NextToken().loss(merge(graphdef, params), batch)
        return parts.total / parts.count, merge(graphdef, params)(**batch).loss

    (ours, expected), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    "head", [MaskedLM(transform=None), SequenceClassification(num_labels=3), QuestionAnswering(), None]
)
def test_flops_are_those_of_the_program(head):
    # 3 layers, of which the third is a pattern begun; 13 tokens, padded to 16
    if isinstance(head, MaskedLM):
        head = reformer.LANGUAGE_MODEL
    model = config(layers=("local", "lsh", "local"), head=head, causal=False)
    graphdef, params, _ = model.abstract()
    x = jax.ShapeDtypeStruct((ROWS, 13), jnp.int32)
    counted = count(lambda p, x: merge(graphdef, p)(x), params, x).matmul_flops
    assert counted == model.flops({"input_ids": (ROWS, 13)}, training=False)


def test_dropout_draws_by_the_key():
    model, x = built(dropout=0.3), ids(8)
    graphdef, params = split(model)
    run = jax.jit(lambda p, key: merge(graphdef, p)(x, key=key).logits)
    first, again, other = (np.asarray(run(params, jax.random.key(n))) for n in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_what_a_reversible_model_is_not_made_of_is_refused():
    plain = config()
    with pytest.raises(ValueError, match="are all Reversible"):
        replace(plain, pattern=(replace(plain.pattern[0], wiring=PreNorm()),))
    with pytest.raises(ValueError, match="vocab_size is None"):
        replace(plain, vocab_size=None).build(nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="65 positions and the model 64"):
        built()(ids(65))


def test_reformer_configs_report_all_that_is_wrong_at_once():
    good = reformer.to_hf(named(reformer.PRESETS, "enwik8"))
    assert reformer.from_hf(good) == named(reformer.PRESETS, "enwik8")
    bad = {
        **good,
        "num_buckets": [4, 3],
        "axial_pos_shape": [2, 2, 2],
        "attn_layers": ["global"],
        "is_decoder": False,
        "tie_word_embeddings": True,
    }
    with pytest.raises(ValueError, match="does not implement") as error:
        reformer.from_hf(bad)
    for part in ("num_buckets", "axial_pos_shape", "attn_layers", "is_decoder=False", "tie_word_embeddings"):
        assert part in str(error.value)


def test_layers_that_differ_in_more_than_kind_have_no_hugging_face_config():
    model = config(layers=("local",) * 2)
    narrow = replace(model.pattern[0], mixer=LocalAttention(num_heads=2, chunk=2))
    with pytest.raises(ValueError, match=r"pattern\.1\.mixer|mixer\.chunk|chunk"):
        reformer.to_hf(replace(model, pattern=(model.pattern[0], narrow)))
    with pytest.raises(ValueError, match="reformer is made of"):
        reformer.to_hf(replace(model, position=None))
