"""The decoder as a whole: sizes and costs against published numbers, and what may not change its results."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models import bloom, glm, gpt2, llama, mistral, mixtral
from llmlab.models.config import Tied, Transformer, Untied
from llmlab.models.decoder import DecoderModel
from llmlab.models.outputs import CausalOutput
from llmlab.nn.attention import Attention
from llmlab.nn.module import Params, merge, num_parameters, split
from llmlab.nn.stack import Execution
from tests.drawing import drawn
from tests.selection import at_scale_but

# Two orders of the same float32 operations; values are of size 1, a few dozen operations deep.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}

TINY = {
    "gpt2": gpt2.gpt2(embed_dim=16, num_layers=3, num_heads=4, max_length=24, vocab_size=29),
    "llama": llama.llama(embed_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, hidden_dim=24, vocab_size=29),
}
families = pytest.mark.parametrize("family", TINY)


def randomised(config: Transformer, seed: int = 0) -> DecoderModel:
    """Every parameter drawn."""
    return drawn(lambda: config.build(nnx.Rngs(params=0)), seed)


def tokens(batch: int, length: int, seed: int = 3) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 29)


@functools.cache
def compiled(graphdef: nnx.GraphDef) -> Callable[..., CausalOutput]:
    return jax.jit(lambda params, inputs: merge(graphdef, params)(**inputs))


def outputs(model: DecoderModel, ids: jax.Array, **inputs: jax.Array) -> CausalOutput:
    """A compiled call."""
    graphdef, params = split(model)
    return compiled(graphdef)(params, {"input_ids": ids, **inputs})


def logits(model: DecoderModel, ids: jax.Array, **inputs: jax.Array) -> jax.Array:
    return outputs(model, ids, **inputs).logits


def with_execution(model: DecoderModel, execution: Execution) -> DecoderModel:
    return merge(dataclasses.replace(model.config, execution=execution).abstract()[0], split(model)[1])


def loss_and_gradient(model: DecoderModel, key: jax.Array | None = None) -> tuple[jax.Array, Params]:
    graphdef, params = split(model)
    ids = tokens(2, 10)

    def loss(params: Params) -> jax.Array:
        return jnp.mean(jnp.square(merge(graphdef, params)(ids, key=key).logits))

    return jax.jit(jax.value_and_grad(loss))(params)


def assert_trees_close(ours: Params, theirs: Params) -> None:
    """Within 1e-6 of the largest gradient: a key bias, which softmax cancels, has nothing but rounding errors."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(theirs))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # the released checkpoints' own counts
        (gpt2.preset("gpt2-124m"), 124_439_808),
        (gpt2.preset("gpt2-355m"), 354_823_168),
        (gpt2.preset("gpt2-774m"), 774_030_080),
        (gpt2.preset("gpt2-1.5b"), 1_557_611_200),
        (llama.preset("llama-1b"), 1_235_814_400),
        (llama.preset("llama-7b"), 6_738_415_616),
        (llama.preset("llama2-7b"), 6_738_415_616),
        (llama.preset("llama2-13b"), 13_015_864_320),
        (llama.preset("llama2-70b"), 68_976_648_192),
        (llama.preset("llama3-8b"), 8_030_261_248),
        (llama.preset("llama3.1-8b"), 8_030_261_248),
        (llama.preset("llama3-70b"), 70_553_706_496),
        (llama.preset("llama3.1-405b"), 405_853_388_800),
        (mistral.preset("mistral-7b"), 7_241_732_096),
        (mixtral.preset("mixtral-8x7b"), 46_702_792_704),
        (glm.preset("glm-4-9b"), 9_399_951_360),
        (bloom.preset("bloom-560m"), 559_214_592),
        (bloom.preset("bloom-7b1"), 7_069_016_064),
        (bloom.preset("bloom-176b"), 176_247_271_424),
    ],
)
def test_presets_have_the_published_number_of_parameters(config, published):
    assert config.num_parameters() == published


@families
def test_the_count_from_the_config_is_that_of_the_built_model(family):
    assert TINY[family].num_parameters() == num_parameters(split(TINY[family].build(nnx.Rngs(params=0)))[1])


def test_presets_are_found_with_and_without_their_family():
    assert gpt2.preset("nano") == gpt2.preset("gpt2-nano")
    assert llama.preset("3-8b" if "3-8b" in llama.PRESETS else "llama3-8b") == llama.PRESETS["llama3-8b"]
    with pytest.raises(ValueError, match="gpt2-124m"):
        gpt2.preset("gpt2-small")


def test_gpt2_flops_are_the_matmuls_written_out():
    config, length = gpt2.preset("gpt2-124m"), 1024
    d, layers, vocab = 768, 12, 50257
    attention = 2 * 4 * d * d + 2 * 2 * length * d  # four projections; scores and weighted sum
    forward = layers * (attention + 2 * 2 * d * 4 * d) + 2 * d * vocab
    assert config.flops_per_token(length, training=False) == forward
    assert config.flops_per_token(length) == 3 * forward


def test_llama_flops_are_the_matmuls_written_out():
    config, length = llama.preset("llama3-8b"), 8192
    d, f, heads, kv, h, layers, vocab = 4096, 14336, 32, 8, 128, 32, 128256
    attention = 2 * d * heads * h * 2 + 2 * d * kv * h * 2 + 2 * 2 * length * heads * h
    assert config.flops_per_token(length, training=False) == layers * (attention + 2 * 3 * d * f) + 2 * d * vocab


@families
def test_packed_documents_are_what_they_are_alone(family):
    model = randomised(TINY[family])
    first, second = tokens(1, 7, seed=1), tokens(1, 9, seed=2)
    packed = logits(
        model,
        jnp.concatenate([first, second], axis=1),
        position_ids=jnp.concatenate([jnp.arange(7), jnp.arange(9)])[None],
        segment_ids=jnp.array([[1] * 7 + [2] * 9]),
    )
    np.testing.assert_allclose(packed[:, :7], logits(model, first), **CLOSE)
    np.testing.assert_allclose(packed[:, 7:], logits(model, second), **CLOSE)


@families
def test_packed_documents_do_not_see_each_other(family):
    model = randomised(TINY[family])
    ids, segments = tokens(1, 16), jnp.array([[1] * 7 + [2] * 9])
    before = logits(model, ids, segment_ids=segments)
    after = logits(model, ids.at[0, 3].add(1), segment_ids=segments)
    np.testing.assert_array_equal(before[:, 7:], after[:, 7:])
    assert not np.array_equal(before[:, 3:7], after[:, 3:7])


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_real_token(family, side):
    model = randomised(TINY[family])
    ids = tokens(2, 6)
    pad = (4, 0) if side == "left" else (0, 4)
    real = slice(4, None) if side == "left" else slice(0, 6)
    mask = jnp.pad(jnp.ones_like(ids), ((0, 0), pad))
    positions = jnp.pad(jnp.broadcast_to(jnp.arange(6), ids.shape), ((0, 0), pad))
    padded = logits(model, jnp.pad(ids, ((0, 0), pad), constant_values=5), attention_mask=mask, position_ids=positions)
    np.testing.assert_allclose(padded[:, real], logits(model, ids), **CLOSE)


@families
def test_a_token_changes_its_own_and_later_positions_only(family):
    model = randomised(TINY[family])
    ids = tokens(1, 12)
    before, after = logits(model, ids), logits(model, ids.at[0, 5].set((ids[0, 5] + 1) % 29))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.any(np.asarray(before != after)[0, 5:], axis=-1))


@families
def test_rows_of_a_batch_do_not_see_each_other(family):
    model = randomised(TINY[family])
    ids = tokens(3, 8)
    together = logits(model, ids)
    for row in range(3):
        np.testing.assert_allclose(together[row], logits(model, ids[row : row + 1])[0], **CLOSE)


@families
@pytest.mark.parametrize(
    "execution",
    [Execution(mode="scan"), Execution(mode="scan", remat="dots"), Execution(mode="unroll", remat="full")],
)
def test_execution_changes_neither_values_nor_gradients(family, execution):
    model = randomised(TINY[family])
    expected, gradient = loss_and_gradient(with_execution(model, Execution(mode="unroll")))
    value, changed = loss_and_gradient(with_execution(model, execution))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_trees_close(changed, gradient)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
@pytest.mark.parametrize("num_layers", at_scale_but((3,), [1, 2, 3, 5]))
def test_a_pattern_with_remainder_is_its_layers_written_out(num_layers, mode):
    blocks = (TINY["llama"].pattern[0], TINY["gpt2"].pattern[0])  # they differ in every part
    config = dataclasses.replace(TINY["llama"], pattern=blocks, num_layers=num_layers, execution=Execution(mode=mode))
    model = randomised(config)
    explicit = dataclasses.replace(config, pattern=config.layers())
    params = split(model)[1]
    repeats = num_layers // 2
    layers = {}
    for i in range(num_layers):
        if i < 2 * repeats:
            layers[str(i)] = jax.tree.map(lambda leaf, i=i: leaf[i // 2][None], params["stack"]["blocks"][str(i % 2)])
        else:
            layers[str(i)] = jax.tree.map(lambda leaf: leaf[None], params["stack"]["remainder"]["0"])
    written_out = merge(explicit.abstract()[0], {**params, "stack": {"blocks": layers}})
    ids = tokens(2, 9)
    np.testing.assert_allclose(logits(model, ids), logits(written_out, ids), **CLOSE)


def dropping(family: str, rate: float = 0.3) -> Transformer:
    config = TINY[family]
    block = config.pattern[0]
    assert isinstance(block.mixer, Attention)
    mixer = dataclasses.replace(block.mixer, dropout=rate)
    block = dataclasses.replace(block, mixer=mixer, ffn=dataclasses.replace(block.ffn, dropout=rate), dropout=rate)
    return dataclasses.replace(config, pattern=(block,), num_layers=2, embedding_dropout=rate)


@families
def test_dropout_is_active_with_a_key_and_only_then(family):
    model = randomised(dropping(family))
    plain = merge(dataclasses.replace(TINY[family], num_layers=2).abstract()[0], split(model)[1])
    ids = tokens(2, 8)
    np.testing.assert_array_equal(logits(model, ids), logits(plain, ids))
    one, same, other = (logits(model, ids, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, logits(model, ids))
    assert not np.allclose(one, other)
    np.testing.assert_array_equal(logits(plain, ids, key=jax.random.key(1)), logits(plain, ids))


@pytest.mark.scale
@families
def test_dropout_draws_the_same_however_the_stack_is_applied(family):
    model = randomised(dropping(family))
    key = jax.random.key(4)
    expected, gradient = loss_and_gradient(with_execution(model, Execution(mode="unroll")), key)
    value, changed = loss_and_gradient(with_execution(model, Execution(mode="scan", remat="full")), key)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_trees_close(changed, gradient)


@pytest.mark.parametrize("mode", ["scan", "unroll"])
def test_layer_drop_gives_some_subset_of_the_layers(mode):
    config = dataclasses.replace(TINY["llama"], execution=Execution(mode=mode, layer_drop=0.5))
    model = randomised(config)
    ids = tokens(1, 8)
    params = split(model)[1]
    subsets = []
    for keep in np.ndindex(2, 2, 2):  # which of the three layers run
        kept = [i for i in range(3) if keep[i]]
        if not kept:
            assert model.final_norm is not None
            subsets.append(model.project(model.final_norm(model.embedding(ids, jnp.arange(8)[None]))))
            continue
        blocks = {"0": jax.tree.map(lambda leaf, kept=kept: leaf[jnp.array(kept)], params["stack"]["blocks"]["0"])}
        shallow = dataclasses.replace(TINY["llama"], num_layers=len(kept)).abstract()[0]
        subsets.append(logits(merge(shallow, {**params, "stack": {"blocks": blocks}}), ids))
    found: set[int] = set()
    for seed in range(24):
        drawn = logits(model, ids, key=jax.random.key(seed))
        matches = [i for i, subset in enumerate(subsets) if np.allclose(drawn, subset, **CLOSE)]
        assert len(matches) == 1
        found.add(matches[0])
    assert len(found) > 4  # the chance of fewer in 24 draws of 8 is below 1e-5
    np.testing.assert_allclose(logits(model, ids), subsets[-1], **CLOSE)  # without a key, all of them


@pytest.mark.parametrize("head", [Tied(), Untied(), Untied(bias=True)])
def test_the_head_scores_the_hidden_state(head):
    model = randomised(dataclasses.replace(TINY["llama"], head=head))
    out = outputs(model, tokens(1, 6))
    params = split(model)[1]
    kernel = params["embedding"]["tokens"]["table"].T if isinstance(head, Tied) else params["head"]["kernel"]
    bias = params["head"]["bias"] if isinstance(head, Untied) and head.bias else 0.0
    expected = np.asarray(out.last_hidden_state, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    np.testing.assert_allclose(out.logits, expected, **CLOSE)


def test_loss_is_the_mean_cross_entropy_of_the_counted_labels():
    model = randomised(TINY["llama"])
    ids = tokens(2, 6)
    labels = jnp.array([[3, -100, 4, -100, -100, -100], [0, 1, 2, 28, -100, 5]])
    out = outputs(model, ids, labels=labels)
    logits = np.asarray(out.logits, np.float64)
    log_probs = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    counted = [(b, s) for b in range(2) for s in range(6) if labels[b, s] != -100]
    expected = -np.mean([log_probs[b, s, labels[b, s]] for b, s in counted])
    assert out.loss is not None
    np.testing.assert_allclose(out.loss, expected, rtol=1e-5)


def test_a_sequence_longer_than_the_position_table_is_an_error():
    with pytest.raises(ValueError, match="24"):
        randomised(TINY["gpt2"])(tokens(1, 25))


def test_a_model_without_vocabulary_says_how_to_get_one():
    with pytest.raises(ValueError, match="vocab_size is None"):
        gpt2.preset("nano").build(nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ()}, "pattern is empty"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"embed_dim": 18}, "embed_dim=18 is not divisible by num_heads=4"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"embedding_dropout": 1.0}, "embedding_dropout=1.0"),
    ],
)
def test_impossible_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY["llama"], **changes)


def test_a_token_has_its_place_in_the_text_and_its_place_in_the_blank():
    config = glm.infilling(embed_dim=16, num_layers=1, num_heads=2, max_length=12, vocab_size=29)
    embedding: Any = randomised(config).embedding
    rng = np.random.default_rng(0)
    ids, places, blanks = (rng.integers(0, high, (2, 9)) for high in (29, 12, 12))
    tables = [np.asarray(t[...]) for t in (embedding.tokens.table, embedding.position.table)]
    inner = np.asarray(embedding.block_position.table[...])
    called = (jnp.asarray(ids), jnp.asarray(places), jnp.asarray(blanks))
    written_out = tables[0][ids] + tables[1][places] + inner[blanks]
    np.testing.assert_allclose(embedding(*called), written_out, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(embedding(*called[:2]), tables[0][ids] + tables[1][places] + inner[0], rtol=1e-6)


def test_blanks_written_in_another_order_have_the_scores_that_they_had_where_they_see_the_same():
    """Two-dimensional positions and the mask alone order the blanks: the first one sees the text and itself, so its
    scores do not depend on what follows, and equal those of a row in which it is the only one."""
    model = randomised(glm.infilling(embed_dim=16, num_layers=2, num_heads=2, max_length=12, vocab_size=29))
    ids = jnp.array([[5, 6, 7, 8, 1, 9, 2, 1, 4, 4]])  # a text of 4, a blank of 3, a blank of 3
    places, blanks = jnp.array([[0, 1, 2, 3, 1, 1, 1, 3, 3, 3]]), jnp.array([[0, 0, 0, 0, 1, 2, 3, 1, 2, 3]])

    def scores(order: list[int]) -> np.ndarray:
        at = np.array(order)
        called = {"position_ids": places[:, at], "block_position_ids": blanks[:, at], "prefix_length": jnp.array([4])}
        return np.asarray(outputs(model, ids[:, at], **called).logits)[0]

    text, first, second = [0, 1, 2, 3], [4, 5, 6], [7, 8, 9]
    both, swapped = scores(text + first + second), scores(text + second + first)
    np.testing.assert_allclose(both[:4], swapped[:4], **CLOSE)
    np.testing.assert_allclose(both[4:7], scores(text + first)[4:7], **CLOSE)
    np.testing.assert_allclose(swapped[4:7], scores(text + second)[4:7], **CLOSE)
    assert np.abs(both[4:7] - swapped[7:10]).max() > 1e-2  # behind the other blank it sees more
