"""Greedy decoding is the argmax of the whole model, position by position."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmlab.infer.cache import new_decoder_cache
from llmlab.infer.greedy import greedy
from llmlab.models.encoder_decoder import EncoderDecoderModel
from llmlab.nn.module import merge, split
from tests.infer.random_models import randomised, tiny, whole
from tests.selection import at_scale_but

LENGTH, EOS = 10, 1
SOURCES = [[5, 9, 2, 7, 1], [3, 1], [11, 4, 6, 8, 12, 2, 13, 1], [16, 16, 1]]


def step_by_step(model: EncoderDecoderModel, source: list[int], start: int, num_tokens: int | None = None) -> list[int]:
    """The argmax of a whole forward pass for every token; positions that are not written yet change nothing before."""
    graphdef, params = split(model)
    forward = jax.jit(lambda params, ids, target: merge(graphdef, params)(ids, decoder_input_ids=target).logits)
    target = [start]
    while len(target) <= LENGTH:
        padded = jnp.array([target + [0] * (LENGTH - len(target))])
        scores = forward(params, jnp.array([source]), padded)[0, len(target) - 1, :num_tokens]
        target.append(int(jnp.argmax(scores)))
    return target[1:]


def until(end: int, target: list[int]) -> list[int]:
    return target[: target.index(end)] if end in target else target


@pytest.mark.parametrize("family", at_scale_but(("t5",), ["t5", "mbart"]))
def test_it_writes_what_the_whole_model_scores_highest(family):
    model, starts = randomised(tiny(family)), [3, 4, 5, 6]
    full = [step_by_step(model, source, start, 15) for source, start in zip(SOURCES, starts, strict=True)]
    assert max(max(target) for target in full) < 15
    end = next(token for target in full for token in target[1:] if token != target[0])
    limits: dict[str, Any] = {"max_new_tokens": LENGTH, "eos_id": end, "num_tokens": 15}
    written = greedy(model, SOURCES, start_ids=starts, batch_size=3, **limits)
    assert written == [until(end, target) for target in full]
    assert any(0 < len(target) < LENGTH for target in written)


@pytest.mark.parametrize("family", at_scale_but(("t5",), ["t5", "bart", "mbart"]))
def test_a_target_decoded_piece_by_piece_has_the_states_of_the_whole(family):
    model = randomised(tiny(family))
    graphdef, params = split(model)
    source, target = jnp.array([SOURCES[0], SOURCES[0][::-1]]), jnp.array([[0, 4, 7, 2, 9], [0, 8, 8, 3, 5]])
    mask = jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])

    @jax.jit
    def both(params: Any) -> Any:
        model: EncoderDecoderModel = merge(graphdef, params)
        whole = model.hidden_states(source, mask, target).states
        memory: Any = model.encode(source, mask).states
        cache: Any = new_decoder_cache(model.config, 2, 8, 5)
        pieces = []
        for start, stop in ((0, 2), (2, 3), (3, 5)):
            positions = jnp.broadcast_to(jnp.arange(start, stop), (2, stop - start))
            hidden = model.decode(
                target[:, start:stop],
                memory,
                model.memory_mask(mask),
                decoder_position_ids=positions,
                cache=cache,
            )
            cache, memory = hidden.cache, None  # from now on the memory is in the cache
            pieces.append(hidden.states)
        return whole, jnp.concatenate(pieces, axis=1)

    whole, pieces = both(params)
    np.testing.assert_allclose(pieces, whole, rtol=1e-4, atol=1e-4)  # values up to 10, attention close to one-hot


def test_the_start_is_the_models_own_unless_rows_have_theirs():
    model = randomised(tiny("bart"))
    limits: dict[str, Any] = {"max_new_tokens": 3, "eos_id": None}
    assert greedy(model, SOURCES, **limits) == greedy(model, SOURCES, start_ids=[2] * 4, **limits)
    model = randomised(tiny("mbart"))
    with pytest.raises(ValueError, match="give start_ids"):
        greedy(model, SOURCES, **limits)
    with pytest.raises(ValueError, match="2 start_ids and 4 sources"):
        greedy(model, SOURCES, start_ids=[3, 4], **limits)


def test_without_an_end_targets_have_the_full_length():
    written = greedy(randomised(tiny("t5")), SOURCES, max_new_tokens=5, eos_id=None)
    assert [len(target) for target in written] == [5] * len(SOURCES)


def test_what_the_positions_cannot_hold_is_an_error():
    model = randomised(tiny("bart"))
    with pytest.raises(ValueError, match="24 positions"):
        greedy(model, SOURCES, max_new_tokens=25, eos_id=EOS)
    with pytest.raises(ValueError, match="24 positions"):
        greedy(model, [[2] * 25], max_new_tokens=5, eos_id=EOS)
    with pytest.raises(ValueError, match="not positive"):
        greedy(model, SOURCES, max_new_tokens=0, eos_id=EOS)


def test_a_decoder_continues_its_prompts():
    model = randomised(tiny("gpt2"))
    run = whole(model)
    prompts, full = [[5, 9, 2], [3], [11, 4, 6, 8, 12]], []
    for prompt in prompts:
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt)] = prompt
        for place in range(len(prompt), len(prompt) + LENGTH):
            row[0, place] = np.argmax(run(row).logits[0, place - 1])
        full.append(row[0, len(prompt) : len(prompt) + LENGTH].tolist())
    ends = [full[0][3], full[1][5]]
    assert greedy(model, prompts, max_new_tokens=LENGTH, eos_id=None, batch_size=2) == full
    assert greedy(model, prompts, max_new_tokens=LENGTH, eos_id=ends) == [
        until(ends[1], until(ends[0], row)) for row in full
    ]
    with pytest.raises(ValueError, match="a decoder continues"):
        greedy(model, prompts, max_new_tokens=LENGTH, eos_id=None, start_ids=[1, 2, 3])
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        greedy(model, [[3], []], max_new_tokens=LENGTH, eos_id=None)
