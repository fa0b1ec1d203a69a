"""Whatever a model remembers, decoding gives the logits of the whole forward pass: every family that writes text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.steps import State, Steps, prepare
from llmlab.models import (
    bart,
    bloom,
    clip,
    flamingo,
    gemma,
    glm,
    gpt2,
    llama,
    mbart,
    mistral,
    mixtral,
    paligemma,
    palm,
    performer,
    reformer,
    siglip,
    t5,
    xlnet,
)
from llmlab.models.catalog import FAMILIES
from llmlab.models.config import ModelConfig
from llmlab.models.encoder_decoder import EncoderDecoder
from llmlab.models.visual_decoder import VisualDecoder
from llmlab.nn.axial import Axial
from llmlab.nn.lsh import LocalAttention, LSHAttention
from llmlab.nn.module import Params, merge
from llmlab.nn.perceiver import Resampler
from llmlab.nn.wiring import Sandwich
from tests.drawing import built
from tests.selection import at_scale_but

VOCAB, IMAGE = 17, 16
SIZES: dict[str, Any] = {"embed_dim": 16, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
GROUPED: dict[str, Any] = {**SIZES, "num_kv_heads": 2, "hidden_dim": 24}
STEPS = 3
ROWS = ((5, 9, 2, 7, 1, 3, 11, 4), (3, 1, 8, 8, 4, 2, 0, 6))
SOURCE: dict[str, Any] = {
    "input_ids": jnp.array([[4, 4, 9, 1], [6, 2, 0, 0]]),
    "attention_mask": jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
}
PIXELS = jax.random.normal(jax.random.key(3), (2, 2, 4, 4, 1))  # two images of 2 x 2 patches for each row
SEEN = jnp.array([[[1, 0], [1, 0], [0, 0], [1, 0], [0, 1]], [[1, 1], [0, 0], [0, 1], [0, 0], [0, 0]]])


@dataclass(frozen=True)
class Case:
    """A model, what it is given besides tokens, and its two prompts: `STEPS` tokens follow each, one at a time.

    Both are decoded twice in one batch of four rows: padded on the right, and padded on the left.
    """

    config: ModelConfig
    inputs: Mapping[str, Any] | None = None
    """Of the two prompts."""
    rows: tuple[tuple[int, ...], ...] = ROWS
    """Prompts and what follows them."""
    lengths: tuple[int, int] = (5, 3)
    """Of the prompts."""
    visible: tuple[int, int] | None = None
    """How many of each prompt's tokens see each other; None for as many as it has, where that is so at all."""
    cut: int | None = 2
    """Column of the prompts at which one call ends and another begins."""

    @property
    def ids(self) -> jax.Array:
        return jnp.array(self.rows)

    @property
    def positions(self) -> jax.Array:
        """Of the columns of the four prompts."""
        column_S, length_B1 = jnp.arange(self.longest), jnp.array(self.lengths)[:, None]
        right_BS = jnp.where(column_S < length_B1, column_S, -1)
        return jnp.concatenate([right_BS, jnp.maximum(column_S - (self.longest - length_B1), -1)])

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def whole(self, model: Any) -> jax.Array:
        """Logits of every position of the two rows, from a forward pass over them."""
        length_B1 = jnp.array(self.lengths)[:, None]
        if isinstance(self.config, xlnet.PermutationTransformer):
            return _left_to_right(model, self.ids)
        if isinstance(self.config, paligemma.PaliGemma):
            prefix_B1 = jnp.array(self.visible or self.lengths)[:, None]
            suffix = (jnp.arange(self.ids.shape[1]) >= prefix_B1).astype(jnp.int32)
            return model(self.ids, PIXELS[:, 0], token_type_ids=suffix).logits
        if isinstance(self.config, VisualDecoder):
            # tokens after the prompt see what its last token sees
            last_BS = jnp.minimum(jnp.arange(self.ids.shape[1]), length_B1 - 1)
            return model(self.ids, PIXELS, jnp.take_along_axis(SEEN, last_BS[..., None], axis=1)).logits
        if self.inputs is not None:
            return model(self.inputs["input_ids"], self.inputs["attention_mask"], self.ids).logits
        return model.project(model.hidden_states(self.ids).states)

    def given(self, position_BS: jax.Array) -> jax.Array:
        """The tokens at these positions of the four rows."""
        ids = jnp.tile(self.ids, (2, 1))
        return jnp.where(position_BS < 0, 0, jnp.take_along_axis(ids, jnp.maximum(position_BS, 0), axis=1))

    def inputs_of(self, position_BS: jax.Array, first: bool) -> Mapping[str, Any] | None:
        """The inputs of a call that is given these positions of the four prompts."""
        twice = {name: jnp.concatenate([x, x]) for name, x in (self.inputs or {}).items()}
        if isinstance(self.config, EncoderDecoder):  # the source of the rows on the left is padded there too
            twice = {name: x.at[3].set(jnp.roll(x[3], 2)) for name, x in twice.items()}
        if isinstance(self.config, VisualDecoder):
            seen = jnp.take_along_axis(jnp.tile(SEEN, (2, 1, 1)), jnp.maximum(position_BS, 0)[..., None], axis=1)
            return {"image_attention_mask": seen, **twice} if first else {"image_attention_mask": seen}
        if self.visible is not None:
            twice["token_type_ids"] = (position_BS >= jnp.tile(jnp.array(self.visible), 2)[:, None]).astype(jnp.int32)
        return twice or None if first else None


def _left_to_right(model: Any, ids: jax.Array) -> jax.Array:
    """XLNet's prediction of token t + 1 from those up to t: an order, and a target behind every token."""
    length = ids.shape[1]
    longer = jnp.pad(ids, ((0, 0), (0, 1)))
    hidden = jnp.broadcast_to(jnp.arange(length + 1) >= jnp.arange(length + 1)[:, None], (2, length + 1, length + 1))
    targets = jnp.broadcast_to(jnp.eye(length + 1)[1:], (2, length, length + 1))
    return model(longer, perm_mask=hidden.astype(jnp.float32), target_mapping=targets).logits


def _tower(make: Any, **more: Any) -> Any:
    return make(embed_dim=12, num_layers=1, num_heads=2, hidden_dim=16, image_size=4, patch_size=2, channels=1, **more)


LOCAL = LocalAttention(num_heads=4, chunk=2)
_reformer: dict[str, Any] = {"embed_dim": 16, "hidden_dim": 24, "vocab_size": VOCAB, "position": Axial((4, 4), (4, 12))}
_t5: dict[str, Any] = {**SIZES, "head_dim": 8, "hidden_dim": 24, "num_buckets": 8}
PALIGEMMA = Case(
    paligemma.PaliGemma(
        vision=_tower(siglip.siglip, pooled=False),
        text=gemma.gemma(**GROUPED, head_dim=8),
        image_token_id=IMAGE,
    ),
    {"pixel_values": PIXELS[:, 0]},
    ((*[IMAGE] * 4, 5, 9, 2, 7, 1, 3), (*[IMAGE] * 4, 3, 1, 8, 8, 4, 2)),
    lengths=(7, 5),
    cut=None,  # image and prompt see each other
)
CASES: dict[str, Case] = {
    "GPT-2": Case(gpt2.gpt2(**SIZES, max_length=16)),
    "Llama": Case(llama.llama(**GROUPED)),
    "Mistral": Case(mistral.mistral(**GROUPED, window=3)),
    "Mixtral": Case(mixtral.mixtral(**GROUPED, num_experts=4)),
    "PaLM": Case(palm.palm(**SIZES)),
    "GLM": Case(glm.glm(**GROUPED)),
    "GLM, two positions": Case(glm.infilling(**SIZES, max_length=16)),
    "GLM-4-0414": Case(glm.glm(**GROUPED, wiring=Sandwich())),
    "BLOOM": Case(bloom.bloom(**SIZES)),
    "Gemma": Case(gemma.gemma(**GROUPED, head_dim=8)),
    "Performer": Case(
        performer.decoder(
            performer.block(num_heads=4, hidden_dim=24, causal=True, num_features=8),
            embed_dim=16,
            num_layers=2,
            vocab_size=VOCAB,
        )
    ),
    "Performer, relu": Case(
        performer.decoder(
            performer.block(num_heads=4, hidden_dim=24, causal=True, num_features=8, feature="relu"),
            embed_dim=16,
            num_layers=1,
            vocab_size=VOCAB,
        )
    ),
    "Reformer": Case(reformer.reformer(**_reformer, layers=("local",) * 2, local=LOCAL, lsh=LSHAttention(num_heads=4))),
    "XLNet": Case(xlnet.xlnet(**SIZES, hidden_dim=24)),
    "XLNet, one way": Case(xlnet.xlnet(**SIZES, hidden_dim=24, bidirectional=False, clamp_length=4)),
    "T5": Case(t5.t5(**_t5), SOURCE),
    "mT5": Case(t5.t5(**_t5, gated=True, scaled=False), SOURCE),
    "BART": Case(bart.bart(**SIZES, max_length=16), SOURCE),
    "mBART": Case(mbart.mbart(**SIZES, max_length=16), SOURCE),
    "PaliGemma": PALIGEMMA,
    "PaliGemma, an answer begun": replace(PALIGEMMA, visible=(6, 4)),
    "Flamingo": Case(
        flamingo.flamingo(
            **SIZES,
            hidden_dim=24,
            interval=2,
            vision=_tower(clip.clip_vision),
            resampler=Resampler(num_latents=3, num_layers=1, num_heads=2, head_dim=6),
            additional_tokens=2,
        ),
        {"pixel_values": PIXELS},
    ),
}

KINDS = (
    *("GPT-2", "Llama", "Mistral", "GLM, two positions", "BLOOM", "Performer", "Reformer", "XLNet"),
    *("T5", "BART", "PaliGemma", "Flamingo"),
)
"""One of every kind of cache and of positions; the others have other blocks and heads around them."""


def prepared(case: Case) -> tuple[Steps, Params]:
    """The model with all parameters far from their initial values: gates are open, attention is not uniform."""
    return prepare(built(case.config, std=0.4))


def decoded(
    case: Case, steps: Steps, params: Params, position_BS: jax.Array, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array, State]:
    """Logits of the four prompts' columns, of the tokens after them, and the state in the end."""
    begin_BS, end_BS = jnp.split(position_BS, [case.cut or case.longest], axis=1)
    inputs = case.inputs_of(begin_BS, first=True)
    state = steps.new_state(4, len(case.rows[0]), dtype, inputs)
    states, state = steps.prefill(params, state, case.given(begin_BS), begin_BS, inputs)
    if case.cut is not None:
        more = case.inputs_of(end_BS, first=False)
        if more is None:
            ended, state = steps.step(params, state, case.given(end_BS), end_BS)
        else:
            ended, state = steps.prefill(params, state, case.given(end_BS), end_BS, more)
        states = jnp.concatenate([states, ended], axis=1)

    def step(state: State, number: jax.Array) -> tuple[State, jax.Array]:
        position_B1 = position_BS.max(axis=1, keepdims=True) + 1 + number
        hidden, state = steps.step(params, state, case.given(position_B1), position_B1)
        return state, hidden[:, 0]

    state, after_SBD = jax.lax.scan(step, state, jnp.arange(STEPS))
    return steps.project(params, states), steps.project(params, after_SBD.swapaxes(0, 1)), state


@pytest.mark.parametrize("name", at_scale_but(KINDS, CASES))
def test_decoding_gives_the_logits_of_the_whole_forward_pass(name: str) -> None:
    case = CASES[name]
    steps, params = prepared(case)

    @jax.jit
    def both(params: Params, position_BS: jax.Array) -> Any:
        return case.whole(merge(steps.graphdef, params)), decoded(case, steps, params, position_BS)

    whole, (prompts, after, _) = both(params, case.positions)
    tolerance = 1e-5 * float(jnp.abs(whole).max())  # the same float32 sums in another order
    for row, length in enumerate([*case.lengths, *case.lengths]):
        want, real = np.asarray(whole[row % 2]), slice(length) if row < 2 else slice(case.longest - length, None)
        np.testing.assert_allclose(prompts[row, real], want[:length], rtol=0, atol=tolerance)
        np.testing.assert_allclose(after[row], want[length : length + STEPS], rtol=0, atol=tolerance)


def test_every_family_that_writes_text_is_among_the_cases() -> None:
    writing = {"decoder", "encoder-decoder", "encoder or decoder", "permutation"}
    named = {family.name for family in FAMILIES if family.kind in writing} | {"PaliGemma", "Flamingo"}
    assert named <= CASES.keys()


@pytest.mark.parametrize("kind", ["LSH", "one that looks both ways"])
def test_a_layer_that_cannot_remember_says_why(kind: str) -> None:
    if kind == "LSH":
        lsh = LSHAttention(num_heads=4)
        config: Any = reformer.reformer(**_reformer, layers=("local", "lsh"), local=LOCAL, lsh=lsh)
        match = "layer 1: LSHAttention has no cache: it sorts all tokens of a row into chunks"
    else:
        block = performer.block(num_heads=4, hidden_dim=24, causal=False, num_features=8)
        config = performer.decoder(block, embed_dim=16, num_layers=1, vocab_size=VOCAB)
        match = "layer 0: FavorAttention.causal=False. sums over the whole row"
    with pytest.raises(ValueError, match=match):
        prepare(built(config))[0].new_state(1, 8)


def test_what_sums_and_chunks_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="rewind=2: FavorAttention keeps sums, of which nothing can be taken back"):
        prepared(CASES["Performer"])[0].new_state(1, 8, rewind=2)
    wide = replace(LOCAL, before=2)
    config = reformer.reformer(**_reformer, layers=("local",), local=wide, lsh=LSHAttention(num_heads=4))
    with pytest.raises(ValueError, match=r"before=2, after=0\) decodes no text.* use before=1 and after=0"):
        prepare(built(config))[0].new_state(1, 8)
    steps, params = prepared(CASES["XLNet"])
    crossing = prepare(built(xlnet.xlnet(**SIZES, hidden_dim=24, same_length=True)))[0]
    with pytest.raises(ValueError, match="same_length=True: what a token sees depends on the whole batch"):
        crossing.step(params, steps.new_state(1, 8), jnp.zeros((1, 1), int), jnp.zeros((1, 1), int))


def test_a_mask_over_slots_means_nothing_to_sums() -> None:
    steps, params = prepared(CASES["Performer"])
    model, state = merge(steps.graphdef, params), steps.new_state(1, 8)
    with pytest.raises(ValueError, match="no slots for a mask to name"):
        model.hidden_states(jnp.zeros((1, 2), int), attention_mask=jnp.ones((1, 8), int), cache=state.caches)


@pytest.mark.parametrize("kind", ["reversible", "permutation"])
def test_a_model_that_scores_no_next_token_is_refused(kind: str) -> None:
    if kind == "reversible":
        two_way = replace(LOCAL, after=1)
        config: Any = reformer.reformer(
            **_reformer, layers=("local",), local=two_way, lsh=LSHAttention(num_heads=4), causal=False
        )
        match = "causal=False and head=MaskedLM does not write text"
    else:
        config, match = xlnet.xlnet(**SIZES, hidden_dim=24, head=None), "head=NoneType does not write text"
    with pytest.raises(ValueError, match=match):
        prepare(built(config))


def test_sums_over_many_chunks_are_those_of_the_whole_row() -> None:
    """A Performer's sums over rows of several chunks, cut elsewhere than where its prefix sums are."""
    block = performer.block(num_heads=4, hidden_dim=24, causal=True, num_features=16)
    block = replace(block, mixer=replace(block.mixer, chunk=8))
    case = Case(performer.decoder(block, embed_dim=16, num_layers=1, vocab_size=VOCAB))
    steps, params = prepared(case)
    ids = jax.random.randint(jax.random.key(7), (2, 40), 0, VOCAB)
    place = jnp.broadcast_to(jnp.arange(40), (2, 40))

    @jax.jit
    def both(params: Params) -> Any:
        state, pieces = steps.new_state(2, 40), []
        for start, stop in ((0, 13), (13, 33), (33, 40)):
            piece, state = steps.step(params, state, ids[:, start:stop], place[:, start:stop])
            pieces.append(piece)
        return merge(steps.graphdef, params).hidden_states(ids).states, jnp.concatenate(pieces, axis=1)

    whole, pieces = both(params)
    np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-5 * float(jnp.abs(whole).max()))
