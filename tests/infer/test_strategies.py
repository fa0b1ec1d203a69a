"""Strategies through the call that all generation goes through: texts, ends, and what they do not do."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from llmlab.infer.beam import beam_search
from llmlab.infer.drafts import PromptLookup
from llmlab.infer.generate import generate
from llmlab.infer.prompts import source_tokens, start_tokens
from llmlab.infer.sampling import GREEDY, Sampling
from llmlab.infer.strategies import Beams, Contrastive, Speculation, Strategy
from llmlab.models import llama, paligemma, t5
from llmlab.tokenizers import Bytes
from tests.drawing import built

TOKENIZER = Bytes().build()
SIZES: dict[str, Any] = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "vocab_size": TOKENIZER.vocab_size}
LLAMA = replace(llama.llama(**SIZES, hidden_dim=24), embedding_std=1.0).build(nnx.Rngs(params=1))
T5_CONFIG = t5.t5(**SIZES, head_dim=8, hidden_dim=24, num_buckets=8)
T5 = replace(T5_CONFIG, embedding_std=1.0, decoder_start_id=0).build(nnx.Rngs(params=2))
MODELS = {"llama": LLAMA, "t5": T5}
PROMPTS = ["to be or not", "a", "the cat sat on the mat, the cat"]
STOPS = tuple(range(100, 110))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "strategy",
    [Beams(num_beams=1), Contrastive(alpha=0.0), Speculation(), Speculation(draft=LLAMA, num_drafted=2)],
    ids=["one beam", "no penalty", "lookup", "draft"],
)
@pytest.mark.scale
def test_what_is_greedy_by_another_way_is_what_greedy_decoding_writes(model: str, strategy: Strategy) -> None:
    """Tokens, texts, stop tokens and stop strings."""
    if isinstance(strategy, Speculation) and not isinstance(strategy.draft, PromptLookup):
        strategy = replace(strategy, draft=MODELS[model])
    options: dict[str, Any] = {"max_new_tokens": 14, "stop_ids": STOPS, "max_rows": 2}
    want = generate(MODELS[model], TOKENIZER, PROMPTS, sampling=GREEDY, **options)
    options["stop"] = next(one.text[3:5] for one in want if len(one.text) > 5)
    want = generate(MODELS[model], TOKENIZER, PROMPTS, sampling=GREEDY, **options)
    assert {one.finish_reason for one in want} >= {"stop"}
    sampling = GREEDY if isinstance(strategy, Speculation) else None
    pieces: dict[int, str] = {}
    got = generate(
        MODELS[model],
        TOKENIZER,
        PROMPTS,
        sampling=sampling,
        strategy=strategy,
        stream=lambda number, text: pieces.update({number: pieces.get(number, "") + text}),
        **options,
    )
    assert [replace(one, score=None) for one in got] == want
    assert [pieces.get(number, "") for number in range(len(PROMPTS))] == [one.text for one in want]


@pytest.mark.parametrize("model", MODELS)
def test_beams_are_the_hypotheses_best_first(model: str) -> None:
    found = generate(
        MODELS[model],
        TOKENIZER,
        PROMPTS,
        strategy=Beams(num_beams=3, length_penalty=0.5),
        n=2,
        max_new_tokens=6,
        stop_ids=STOPS,
    )
    reads = model == "t5"
    ids = [source_tokens(TOKENIZER, text) if reads else start_tokens(TOKENIZER, text) for text in PROMPTS]
    hypotheses = beam_search(
        MODELS[model],
        ids,
        max_new_tokens=6,
        num_beams=3,
        length_penalty=0.5,
        num_return_sequences=2,
        eos_id=[TOKENIZER.eos_id or 0, *STOPS],
        num_tokens=TOKENIZER.vocab_size,
    )
    want = [(number, rank, one) for number, of_prompt in enumerate(hypotheses) for rank, one in enumerate(of_prompt)]
    assert len(want) == 6
    for completion, (number, rank, one) in zip(found, want, strict=True):
        assert (completion.prompt, completion.sample, completion.token_ids) == (number, rank, one.token_ids)
        assert completion.finish_reason == one.finish_reason
        assert completion.stop == one.end_id
        assert completion.text == TOKENIZER.decode(one.token_ids)
        np.testing.assert_allclose(completion.score or 0.0, one.score, rtol=1e-5)


@pytest.mark.scale
def test_a_model_that_sees_images_is_searched_too() -> None:
    config = paligemma.PRESETS["paligemma-nano"].with_vocabulary(TOKENIZER.vocab_size)
    model, shape = built(config), (config.vision.image_size,) * 2 + (config.vision.channels,)
    inputs = {"pixel_values": np.random.default_rng(0).normal(size=(1, 1, *shape)).astype(np.float32)}
    options: dict[str, Any] = {"inputs": inputs, "max_new_tokens": 5}
    (want,) = generate(model, TOKENIZER, "what", sampling=GREEDY, **options)
    (got,) = generate(model, TOKENIZER, "what", strategy=Beams(num_beams=1), **options)
    assert got.token_ids == want.token_ids


@pytest.mark.parametrize(
    ("strategy", "options", "words"),
    [
        (Beams(), {"sampling": Sampling()}, "Beams searches and draws nothing"),
        (Beams(num_beams=2), {"n": 3}, "raise num_beams"),
        (Contrastive(), {"n": 2}, "Contrastive writes one text"),
        (Speculation(), {"deterministic": True}, "Speculation knows nothing of deterministic"),
        (Speculation(), {"sampling": Sampling(logprobs=1)}, "sampling.logprobs"),
        (Beams(), {"prompt_logprobs": True, "cache_dtype": np.float32}, "prompt_logprobs, cache_dtype"),
    ],
)
def test_what_a_strategy_does_not_do_is_refused(strategy: Strategy, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(LLAMA, TOKENIZER, "a", strategy=strategy, max_new_tokens=4, **options)
