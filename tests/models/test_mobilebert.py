"""The bottleneck block and MobileBERT: sizes, costs, and what the block refuses."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from llmlab.models import mobilebert
from llmlab.nn.attention import Attention
from llmlab.nn.module import merge
from llmlab.nn.norms import LayerNorm
from llmlab.plan.cost import count
from tests.drawing import built

TINY: dict[str, Any] = {"embed_dim": 12, "num_layers": 3, "num_heads": 2, "width": 6, "hidden_dim": 10, "table_dim": 5}


def test_the_presets_have_the_published_sizes():
    # Table 1 of the paper, which does not say what it counts: here all but the pretraining head, whose second matrix
    # alone has 11.7 million.
    for name, millions in {"mobilebert": 25.3, "mobilebert-tiny": 15.1}.items():
        bare = replace(mobilebert.preset(name), head=None)
        assert bare.num_parameters() / 1e6 == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize("narrow_values", [False, True])
@pytest.mark.parametrize("num_ffns", [1, 3])
def test_the_flop_formula_equals_the_count_of_the_program(narrow_values, num_ffns):
    model = mobilebert.mobilebert(**TINY, num_ffns=num_ffns, narrow_values=narrow_values, vocab_size=29)
    block = model.pattern[0]
    assert isinstance(block.mixer, Attention)
    model = replace(model, pattern=(replace(block, mixer=replace(block.mixer, kernel="reference")),))
    graphdef, params, _ = model.abstract()
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)

    def forward(params: Any, input_ids: jax.Array) -> Any:
        output = merge(graphdef, params)(input_ids)
        return jnp.sum(jnp.square(output.logits)) + jnp.sum(jnp.square(output.seq_relationship_logits))

    shapes = {"input_ids": (2, 9)}
    assert count(forward, params, tokens).matmul_flops == model.flops(shapes, training=False)
    assert count(jax.grad(forward), params, tokens).matmul_flops == model.flops(shapes)


def test_dropout_is_active_with_a_key():
    model: Any = built(mobilebert.mobilebert(**TINY, vocab_size=29, dropout=0.5))
    ids = jnp.arange(8)[None]
    plain, dropped = model(ids).logits, model(ids, key=jax.random.key(0)).logits
    assert not jnp.array_equal(plain, dropped)


def test_what_the_block_or_the_family_cannot_be_is_refused():
    model = mobilebert.mobilebert(**TINY, vocab_size=29)
    block = model.pattern[0]
    windowed = replace(model, pattern=(replace(block, mixer=Attention(num_heads=2, head_dim=3, window=3)),))
    with pytest.raises(ValueError, match="plain Attention"):
        windowed.build(nnx.Rngs(0))
    with pytest.raises(ValueError, match="cannot express"):
        mobilebert.to_hf(replace(model, pattern=(replace(block, norm=LayerNorm()),)))
