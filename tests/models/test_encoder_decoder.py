"""The encoder-decoder as a whole: sizes and costs against published numbers, and what may not change its results."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.models import bart, mbart, mt5, t5
from llmlab.models.config import Untied
from llmlab.models.encoder_decoder import EncoderDecoder, EncoderDecoderModel, Side, shift_right
from llmlab.models.outputs import EncoderDecoderOutput
from llmlab.nn.module import Params, merge, num_parameters, split
from llmlab.nn.stack import Execution
from llmlab.plan.cost import count
from tests.drawing import drawn

# Two orders of the same float32 operations; values are of size 1, a few dozen operations deep.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-5}

_T5: dict[str, Any] = {"embed_dim": 16, "num_layers": 1, "num_heads": 3, "head_dim": 5, "hidden_dim": 24}
TINY: dict[str, EncoderDecoder] = {
    "t5": t5.t5(**_T5, vocab_size=29, num_buckets=8, max_distance=7, num_decoder_layers=2),
    "bart": bart.bart(embed_dim=16, num_layers=1, num_heads=4, max_length=24, vocab_size=29, num_decoder_heads=2),
    "mbart": mbart.mbart(embed_dim=16, num_layers=1, num_heads=4, max_length=24, vocab_size=29),
}
families = pytest.mark.parametrize("family", ["t5", "bart"])  # in both norms' places, both kinds of positions


def randomised(config: EncoderDecoder, seed: int = 0) -> EncoderDecoderModel:
    """Every parameter drawn."""
    return drawn(lambda: config.build(nnx.Rngs(params=0)), seed)


def tokens(batch: int, length: int, seed: int = 3) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 2, 29)


@functools.cache
def compiled(graphdef: nnx.GraphDef) -> Callable[..., EncoderDecoderOutput]:
    return jax.jit(lambda params, inputs: merge(graphdef, params)(**inputs))


def outputs(
    model: EncoderDecoderModel, source: jax.Array, target: jax.Array | None, **inputs: Any
) -> EncoderDecoderOutput:
    """A compiled call."""
    graphdef, params = split(model)
    return compiled(graphdef)(params, {"input_ids": source, "decoder_input_ids": target, **inputs})


def logits(model: EncoderDecoderModel, source: jax.Array, target: jax.Array, **inputs: Any) -> jax.Array:
    return outputs(model, source, target, **inputs).logits


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # counts of the released checkpoints; those with a head of its own add it to what transformers 5 builds tied
        (t5.preset("small"), 60_506_624),
        (t5.preset("base"), 222_903_552),
        (t5.preset("large"), 737_668_096),
        (t5.preset("3b"), 2_851_598_336),
        (t5.preset("11b"), 11_307_321_344),
        (t5.preset("1.1-small"), 76_961_152),
        (t5.preset("1.1-base"), 247_577_856),
        (t5.preset("1.1-large"), 783_150_080),
        (t5.preset("1.1-xl"), 2_849_757_184),
        (t5.preset("1.1-xxl"), 11_135_332_352),
        (mt5.preset("small"), 300_176_768),
        (mt5.preset("base"), 582_401_280),
        (mt5.preset("large"), 1_229_581_312),
        (mt5.preset("xl"), 3_742_619_648),
        (mt5.preset("xxl"), 12_921_057_280),
        # and the vector that is added to the logits
        (bart.preset("base"), 139_420_416 + 50_265),
        (bart.preset("large"), 406_291_456 + 50_265),
        (mbart.preset("large"), 610_851_840 + 250_027),
        (mbart.preset("large-50"), 610_879_488 + 250_054),
    ],
)
def test_presets_have_the_published_number_of_parameters(config, published):
    assert config.num_parameters() == published


@pytest.mark.parametrize("family", TINY)
def test_the_count_from_the_config_is_that_of_the_built_model(family):
    assert TINY[family].num_parameters() == num_parameters(split(TINY[family].build(nnx.Rngs(params=0)))[1])


def test_flops_are_the_matmuls_written_out():
    config, source, target = t5.preset("1.1-base"), 512, 114
    d, f, layers, vocab = 768, 2048, 12, 32128
    encoder = layers * (2 * 4 * d * d + 2 * 3 * d * f + 4 * source * d)
    memory = layers * 2 * 2 * d * d  # keys and values that the decoder reads
    decoder = layers * (2 * 6 * d * d + 2 * 3 * d * f + 4 * (source + target) * d) + 2 * d * vocab
    shapes = {"input_ids": (8, source), "decoder_input_ids": (8, target), "labels": (8, target)}
    forward = 8 * (source * (encoder + memory) + target * decoder)
    assert config.flops(shapes, training=False) == forward
    assert config.flops(shapes) == 3 * forward
    assert config.num_tokens(shapes) == 8 * (source + target)


def with_reference_kernel(side: Side) -> Side:
    """The kernel that computes every score: the count of FLOPs is by convention that of the whole matrix."""
    (block,) = side.pattern
    parts = {name: getattr(block, name) for name in ("mixer", "cross")}
    parts = {name: part and dataclasses.replace(part, kernel="reference") for name, part in parts.items()}
    return dataclasses.replace(side, pattern=(dataclasses.replace(block, **parts),))


@families
@pytest.mark.parametrize("untied", [False, True])
def test_flops_are_those_of_the_program(family, untied):
    config = TINY[family]
    sides = {"encoder": with_reference_kernel(config.encoder), "decoder": with_reference_kernel(config.decoder)}
    config = dataclasses.replace(config, **sides, execution=Execution(mode="scan"))
    if untied:
        config = dataclasses.replace(config, shared_embedding=False, head=Untied())
    graphdef, params, _ = config.abstract()
    source, target = (jax.ShapeDtypeStruct((2, length), jnp.int32) for length in (11, 6))

    def forward(params: Params, source: jax.Array, target: jax.Array) -> jax.Array:
        return merge(graphdef, params)(source, decoder_input_ids=target).logits

    def gradient(params: Params, source: jax.Array, target: jax.Array) -> Params:
        return jax.grad(lambda params: jnp.sum(jnp.square(forward(params, source, target))))(params)

    shapes = {"input_ids": source.shape, "decoder_input_ids": target.shape}
    assert count(forward, params, source, target).matmul_flops == config.flops(shapes, training=False)
    assert count(gradient, params, source, target).matmul_flops == config.flops(shapes)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_source_changes_no_logits(family, side):
    model = randomised(TINY[family])
    source, target = tokens(2, 6), tokens(2, 5, seed=4)
    pad = (4, 0) if side == "left" else (0, 4)
    mask = jnp.pad(jnp.ones_like(source), ((0, 0), pad))
    positions = jnp.pad(jnp.broadcast_to(jnp.arange(6), source.shape), ((0, 0), pad))
    inputs = {"attention_mask": mask, "position_ids": positions}
    padded = logits(model, jnp.pad(source, ((0, 0), pad), constant_values=5), target, **inputs)
    np.testing.assert_allclose(padded, logits(model, source, target), **CLOSE)


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_target_changes_no_real_position(family, side):
    model = randomised(TINY[family])
    source, target = tokens(2, 6), tokens(2, 5, seed=4)
    pad, real = ((3, 0), slice(3, None)) if side == "left" else ((0, 3), slice(0, 5))
    mask = jnp.pad(jnp.ones_like(target), ((0, 0), pad))
    positions = jnp.pad(jnp.broadcast_to(jnp.arange(5), target.shape), ((0, 0), pad))
    inputs = {"decoder_attention_mask": mask, "decoder_position_ids": positions}
    padded = logits(model, source, jnp.pad(target, ((0, 0), pad), constant_values=7), **inputs)
    np.testing.assert_allclose(padded[:, real], logits(model, source, target), **CLOSE)


@families
def test_packed_pairs_are_what_they_are_alone(family):
    model = randomised(TINY[family])
    sources = [tokens(1, 7, seed=1), tokens(1, 5, seed=2)]
    targets = [tokens(1, 4, seed=3), tokens(1, 6, seed=4)]
    packed = logits(
        model,
        jnp.concatenate([*sources, jnp.zeros((1, 2), jnp.int32)], axis=1),
        jnp.concatenate(targets, axis=1),
        position_ids=jnp.array([[*range(7), *range(5), 0, 0]]),
        segment_ids=jnp.array([[1] * 7 + [2] * 5 + [0, 0]]),
        decoder_position_ids=jnp.array([[*range(4), *range(6)]]),
        decoder_segment_ids=jnp.array([[1] * 4 + [2] * 6]),
    )
    np.testing.assert_allclose(packed[:, :4], logits(model, sources[0], targets[0]), **CLOSE)
    np.testing.assert_allclose(packed[:, 4:], logits(model, sources[1], targets[1]), **CLOSE)


def test_segments_of_one_side_only_are_an_error():
    model = randomised(TINY["t5"])
    with pytest.raises(ValueError, match="only one of them"):
        model(tokens(1, 4), segment_ids=jnp.ones((1, 4), jnp.int32), decoder_input_ids=tokens(1, 3))


@families
def test_a_target_token_changes_its_own_and_later_positions_and_a_source_token_all(family):
    model = randomised(TINY[family])
    source, target = tokens(1, 8), tokens(1, 6, seed=4)
    before = logits(model, source, target)
    after = logits(model, source, target.at[0, 3].set(1))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.all(np.any(np.asarray(before != after)[0, 3:], axis=-1))
    after = logits(model, source.at[0, 7].set(1), target)
    assert np.all(np.any(np.asarray(before != after)[0], axis=-1))


@pytest.mark.scale
@pytest.mark.parametrize(
    ("family", "execution"),
    [("t5", Execution(mode="scan", remat="dots")), ("bart", Execution(mode="unroll", remat="full"))],
)
def test_execution_changes_neither_values_nor_gradients(family, execution):
    model = randomised(TINY[family])

    def loss_and_gradient(execution: Execution) -> Any:
        graphdef = dataclasses.replace(model.config, execution=execution).abstract()[0]

        def loss(params: Any) -> jax.Array:
            return merge(graphdef, params)(tokens(2, 7), labels=tokens(2, 5)).loss

        return jax.jit(jax.value_and_grad(loss))(split(model)[1])

    expected, gradient = loss_and_gradient(Execution(mode="unroll"))
    value, changed = loss_and_gradient(execution)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * largest), changed, gradient)


@families
def test_dropout_is_active_with_a_key_and_only_then(family):
    rates: dict[str, Any] = {"embedding_dropout": 0.2, "final_dropout": 0.2}
    model = randomised(dataclasses.replace(TINY[family], **rates))
    plain = merge(TINY[family].abstract()[0], split(model)[1])
    source, target = tokens(2, 6), tokens(2, 5)
    np.testing.assert_array_equal(logits(model, source, target), logits(plain, source, target))
    one, same, other = (logits(model, source, target, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other)
    assert not np.allclose(one, logits(plain, source, target))


@families
def test_a_call_is_encode_then_decode_then_project(family):
    model = randomised(TINY[family])
    source, target = tokens(2, 6), tokens(2, 5)
    mask = jnp.ones_like(source).at[0, 4:].set(0)
    out = outputs(model, source, target, attention_mask=mask)
    graphdef, params = split(model)

    @jax.jit
    def parts(params: Params) -> Any:
        model: EncoderDecoderModel = merge(graphdef, params)
        memory = model.encode(source, mask).states
        states = model.decode(target, memory, model.memory_mask(mask)).states
        return memory, states, model.project(states), model.hidden_states(source, mask, target).states

    memory, states, scores, whole = parts(params)
    np.testing.assert_allclose(memory, out.encoder_last_hidden_state, **CLOSE)
    np.testing.assert_allclose(states, out.last_hidden_state, **CLOSE)
    np.testing.assert_allclose(scores, out.logits, **CLOSE)
    np.testing.assert_allclose(whole, out.last_hidden_state, **CLOSE)


@pytest.mark.parametrize("family", TINY)
def test_labels_are_shifted_to_the_right_where_no_decoder_inputs_are_given(family):
    model = randomised(TINY[family])
    labels = tokens(2, 5).at[1, 3:].set(-100)
    start = model.config.decoder_start_id
    shifted = shift_right(labels, start, model.config.pad_id)
    first = [labels[0, 4], labels[1, 2]] if start is None else [start, start]  # mBART: the row's last token
    np.testing.assert_array_equal(shifted[:, 0], jnp.array(first))
    np.testing.assert_array_equal(shifted[0, 1:], labels[0, :-1])
    np.testing.assert_array_equal(shifted[1, 1:], [labels[1, 0], labels[1, 1], labels[1, 2], model.config.pad_id])
    source = tokens(2, 6)
    ours, theirs = (outputs(model, source, target, labels=labels) for target in (None, shifted))
    assert ours.loss is not None
    assert theirs.loss is not None
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)


def test_a_target_is_needed():
    with pytest.raises(ValueError, match="decoder_input_ids"):
        randomised(TINY["t5"])(tokens(1, 4))


def test_the_vector_added_to_the_logits_is_no_parameter_of_training():
    model = randomised(TINY["bart"])
    graphdef, params = split(model)
    source, target = tokens(1, 4), tokens(1, 3)

    def loss(params: Any) -> jax.Array:
        return merge(graphdef, params)(source, labels=target).loss

    assert not np.any(jax.jit(jax.grad(loss))(params)["logits_bias"])
    moved = {**params, "logits_bias": params["logits_bias"] + 1.0}
    np.testing.assert_allclose(
        logits(merge(graphdef, moved), source, target), logits(model, source, target) + 1.0, **CLOSE
    )


def test_sides_may_have_tables_of_their_own():
    config = dataclasses.replace(TINY["t5"], shared_embedding=False)
    assert config.num_parameters() == TINY["t5"].num_parameters() + 29 * 16
    model = randomised(config)
    graphdef, params = split(model)
    source, target = tokens(1, 4), tokens(1, 3)
    before = outputs(model, source, target)
    moved = merge(graphdef, {**params, "decoder_embedding": {"table": params["decoder_embedding"]["table"] * 1.5}})
    after = outputs(moved, source, target)
    np.testing.assert_array_equal(after.encoder_last_hidden_state, before.encoder_last_hidden_state)
    assert not np.allclose(after.logits, before.logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 18}, "embed_dim=18 is not divisible by num_heads=4"),
        ({"encoder": TINY["bart"].decoder}, "encoder.pattern"),
        ({"decoder": TINY["bart"].encoder}, "decoder.pattern"),
        ({"final_dropout": 1.0}, "final_dropout=1.0"),
    ],
)
def test_impossible_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY["bart"], **changes)


def test_a_source_longer_than_the_position_table_is_an_error():
    assert TINY["bart"].max_length == 24
    assert TINY["t5"].max_length is None
    with pytest.raises(ValueError, match="24"):
        randomised(TINY["bart"])(tokens(1, 25), decoder_input_ids=tokens(1, 3))


def test_a_batch_that_begins_its_targets_otherwise_than_decoding_would_is_refused():
    starts = np.array([[2, 7], [2, 8], [9, 9]])
    batch = {"decoder_input_ids": starts, "labels": np.array([[7, 1], [8, 1], [-100, -100]])}
    tiny = t5.t5(vocab_size=16, embed_dim=8, num_layers=1, num_heads=1, hidden_dim=8, decoder_start_id=2)
    tiny.check_batch(batch)  # the last row has no targets: what stands there begins nothing
    dataclasses.replace(tiny, decoder_start_id=None).check_batch(batch)
    with pytest.raises(ValueError, match=r"decoder_start_id=0, but .* token 2: .*; use decoder_start_id=2"):
        dataclasses.replace(tiny, decoder_start_id=0).check_batch(batch)
