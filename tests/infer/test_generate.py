"""Cached decoding equals the full forward pass, and a row of a batch equals the row alone."""

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmlab.infer.cache import new_cache
from llmlab.infer.decoding import _decode, _prefill, bucket
from llmlab.infer.generate import generate, generate_ids
from llmlab.infer.sampling import Sampling
from llmlab.models.config import Transformer
from llmlab.models.gpt2 import gpt2
from llmlab.models.llama import llama
from llmlab.nn.module import merge, split
from llmlab.nn.positions import ALiBi
from llmlab.tokenizers import Bytes
from tests.drawing import built

VOCAB = 259


def windowed(config: Transformer, window: int) -> Transformer:
    block = config.pattern[0]
    local = replace(block, mixer=replace(block.mixer, window=window))
    return replace(config, pattern=(local, block), num_layers=3)  # one repeat and a remainder


LLAMA = llama(embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden_dim=48, vocab_size=VOCAB)
CONFIGS = {
    "gpt2": gpt2(embed_dim=32, num_layers=2, num_heads=4, max_length=80, vocab_size=VOCAB),
    "llama-gqa": LLAMA,
    "llama-window": windowed(LLAMA, 5),
    "alibi": replace(
        LLAMA, pattern=(replace(LLAMA.pattern[0], mixer=replace(LLAMA.pattern[0].mixer, position=ALiBi())),)
    ),
}


def build(name: str):
    # embeddings of unit size, so that attention is far from uniform and an error in it shows
    return replace(CONFIGS[name], embedding_std=1.0).build(nnx.Rngs(params=1))


def tokens(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(jax.random.randint(jax.random.key(seed), shape, 0, VOCAB))


@pytest.mark.scale
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_decoding_gives_the_logits_of_the_full_forward_pass(name):
    model, ids = build(name), jnp.asarray(tokens(0, 2, 24))
    graphdef, params = split(model)
    forward = jax.jit(lambda params, **inputs: merge(graphdef, params)(**inputs))
    full = forward(params, input_ids=ids).logits
    first = forward(params, input_ids=ids[:, :10], cache=new_cache(model.config, 2, 32))
    steps, cache = [first.logits], first.cache
    for at in range(10, 24):
        output = forward(params, input_ids=ids[:, at : at + 1], position_ids=jnp.full((2, 1), at), cache=cache)
        steps, cache = [*steps, output.logits], output.cache
    # the same float32 sums in another order, over logits of size one
    np.testing.assert_allclose(jnp.concatenate(steps, axis=1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.scale
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=20, top_p=0.9, seed=5)])
def test_a_row_of_a_batch_equals_the_row_alone(name, sampling):
    model = build(name)
    prompts = [tokens(1, 3).tolist(), tokens(2, 17).tolist(), tokens(3, 9).tolist()]
    together = np.stack(list(generate_ids(model, prompts, max_new_tokens=12, sampling=sampling)), axis=1)
    for row, prompt in enumerate(prompts):
        alone = np.stack(list(generate_ids(model, [prompt], max_new_tokens=12, sampling=sampling)), axis=1)
        np.testing.assert_array_equal(alone[0], together[row])


def test_greedy_decoding_is_the_argmax_of_the_full_forward_pass():
    model, prompt = build("llama-gqa"), tokens(1, 6).tolist()
    graphdef, params = split(model)
    forward = jax.jit(lambda params, ids: merge(graphdef, params)(ids).logits)
    generated = [int(t[0]) for t in generate_ids(model, [prompt], max_new_tokens=11, sampling=Sampling(temperature=0))]
    expected, ids = [], list(prompt)
    for _ in range(11):
        padded = jnp.asarray([ids + [0] * (20 - len(ids))])  # one shape, one compilation; causal attention ignores it
        expected.append(int(jnp.argmax(forward(params, padded)[0, len(ids) - 1])))
        ids.append(expected[-1])
    assert generated == expected


def test_nothing_compiles_again_within_a_bucket():
    prefill, decode = cast(Any, _prefill), cast(Any, _decode)  # jax's stubs do not know _cache_size
    model = build("llama-gqa")
    list(generate_ids(model, [tokens(1, 5).tolist()], max_new_tokens=20, sampling=Sampling(seed=1)))
    before = prefill._cache_size(), decode._cache_size()
    for length in (3, 17, 40):
        list(generate_ids(model, [tokens(2, length).tolist()], max_new_tokens=10, sampling=Sampling(seed=length)))
    assert (prefill._cache_size(), decode._cache_size()) == before


def test_bucket_is_a_power_of_two_within_the_limit():
    assert [bucket(n, None) for n in (1, 64, 65, 200)] == [64, 64, 128, 256]
    assert bucket(65, 100) == 100


def test_generation_stops_where_the_positions_end():
    model = build("gpt2")  # 80 positions
    (completion,) = generate(model, Bytes().build(None), "x" * 69, max_new_tokens=50, sampling=Sampling(seed=0))
    assert completion.finish_reason == "position"
    assert len(completion.token_ids) == 11  # bos and 69 bytes leave positions 70..79, and the last one is scored


def test_a_prompt_beyond_the_positions_says_how_long_it_may_be():
    with pytest.raises(ValueError, match="at most 79"):
        generate(build("gpt2"), Bytes().build(None), "x" * 80)


def test_streamed_pieces_join_to_the_completion():
    pieces: dict[int, str] = {0: "", 1: ""}

    def collect(prompt: int, text: str) -> None:
        pieces[prompt] += text

    completions = generate(build("llama-gqa"), Bytes().build(None), ["ab", "é"], max_new_tokens=40, stream=collect)
    assert [c.text for c in completions] == [pieces[0], pieces[1]]


def test_rows_that_round_the_vocabulary_up_are_never_drawn():
    config = replace(CONFIGS["gpt2"], vocab_size=1024)  # three quarters of the rows are no token of Bytes
    completion = generate(built(config), Bytes().build(), "a", max_new_tokens=32)[0]
    assert all(token < VOCAB for token in completion.token_ids)
