"""The openai package, against a real engine with a tiny model: it gets what llmlab computes without a server."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest
from flax import nnx

from llmlab.infer.engine.config import EngineConfig
from llmlab.infer.engine.engine import Engine
from llmlab.infer.generate import generate
from llmlab.infer.sampling import GREEDY, Sampling
from llmlab.infer.server.embedder import Embedder
from llmlab.models.llama import llama
from llmlab.tokenizers import Bytes
from tests.infer.server.serving import running, service_of, until

TOKENIZER = Bytes().build()
MODEL = replace(
    # Embeddings of unit size: what comes next depends on what was there.
    llama(embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=24, vocab_size=TOKENIZER.vocab_size),
    embedding_std=1.0,
).build(nnx.Rngs(params=1))
CONFIG = EngineConfig(block_size=8, num_blocks=64, max_rows=4, max_length=128, prefill_chunk=32, steps_per_call=4)
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(MODEL, TOKENIZER, CONFIG) as engine:
        yield engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    service = service_of(engine, tokenizer=TOKENIZER, embedder=Embedder(MODEL, TOKENIZER), api_key="secret")
    with (
        running(service) as (url, _, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=60) as client,
    ):
        yield client


def continued(prompt: str, count: int, **sampling: Any) -> str:
    """What the model writes without a server; greedy unless told otherwise."""
    how = Sampling(**sampling) if sampling else GREEDY
    return generate(MODEL, TOKENIZER, prompt, max_new_tokens=count, sampling=how)[0].text


def logprobs_of(ids: list[int]) -> np.ndarray:
    """Log-probabilities (position, token) of the whole text in one pass."""
    return np.asarray(jax.nn.log_softmax(MODEL(input_ids=jnp.asarray([ids])).logits[0], axis=-1))


def test_a_completion_is_what_generate_writes(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, temperature=0)
    assert answer.choices[0].text == continued(PROMPT, 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (1 + len(PROMPT), 20)


def test_a_seed_draws_what_it_draws_without_a_server_streamed_or_not(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0.8, "seed": 7}
    expected = continued(PROMPT, 20, temperature=0.8, seed=7)
    assert client.completions.create(**body).choices[0].text == expected
    pieces = list(client.completions.create(**body, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    assert len(pieces) > 1


def test_several_samples_differ_and_the_first_is_the_one_alone(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 3}
    texts = [choice.text for choice in client.completions.create(**body, n=3).choices]
    assert len(set(texts)) == 3
    assert texts[0] == client.completions.create(**body).choices[0].text


def test_log_probabilities_are_those_of_the_whole_forward_pass(client: openai.OpenAI) -> None:
    assert TOKENIZER.bos_id is not None
    prompt = [TOKENIZER.bos_id, *TOKENIZER.encode(PROMPT)]
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0, logprobs=3, echo=True)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    new = generate(MODEL, TOKENIZER, PROMPT, max_new_tokens=6, sampling=GREEDY)[0].token_ids
    expected = logprobs_of([*prompt, *new])
    assert logprobs.token_logprobs[0] is None
    told = np.array(logprobs.token_logprobs[1:], float)
    np.testing.assert_allclose(told, [expected[at, i] for at, i in enumerate([*prompt[1:], *new])], rtol=0, atol=1e-5)
    best = np.sort(expected[len(prompt) + 2])[-3:]
    assert sorted(logprobs.top_logprobs[len(prompt) + 3].values()) == pytest.approx(best.tolist(), abs=1e-5)


def test_a_chat_is_the_plain_template_continued(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "hello"}]
    body: dict[str, Any] = {"model": "tiny", "messages": messages, "max_completion_tokens": 15, "temperature": 0}
    expected = continued("user: hello\n\nassistant:", 15)
    answer = client.chat.completions.create(**body, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    spelled = b"".join(bytes(token.bytes or []) for token in answer.choices[0].logprobs.content)
    assert spelled.decode(errors="replace") == expected
    stream = client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage == answer.usage


def test_a_text_stops_before_its_stop_string(client: openai.OpenAI) -> None:
    whole = continued(PROMPT, 40)
    stop = next(whole[at : at + 2] for at in range(5, 30) if whole[at : at + 2].isascii())
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop, "never"])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_a_schema_and_an_expression_give_the_text_its_form(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ada", "alan"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "who?"}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema, "strict": True}},
        max_completion_tokens=60,
    )
    person = json.loads(answer.choices[0].message.content or "")
    assert person["name"] in ("ada", "alan")
    assert 0 <= person["age"] <= 99
    assert answer.choices[0].finish_reason == "stop"
    for extra, pattern in (
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, "[a-c]{3}-[0-9]{2}"),
        ({"guided_choice": ["yes.", "no (really)"]}, r"yes\.|no \(really\)"),
        ({"guided_grammar": 'start: "x"~2 /[0-9]/'}, "xx[0-9]"),
    ):
        text = client.completions.create(model="tiny", prompt="a", max_tokens=30, extra_body=extra).choices[0].text
        assert re.fullmatch(pattern, text), (extra, text)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="a", extra_body={"guided_regex": "("})


def test_embeddings_are_normalised_means_of_the_last_states(client: openai.OpenAI) -> None:
    texts = ["a", "hello there", "a much longer text than the others, to be padded beside"]
    expected = []
    for text in texts:
        ids = TOKENIZER.encode(text, add_special_tokens=True)
        mean = np.asarray(MODEL(input_ids=jnp.asarray([ids])).last_hidden_state[0]).mean(axis=0)
        expected.append(mean / np.linalg.norm(mean))
    for encoding in ("float", "base64"):
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format=encoding)
        assert [one.index for one in answer.data] == [0, 1, 2]
        if encoding == "float":
            np.testing.assert_allclose([one.embedding for one in answer.data], expected, rtol=0, atol=1e-6)
    default = client.embeddings.create(model="tiny", input=texts)  # base64, which the package reads back
    np.testing.assert_allclose([one.embedding for one in default.data], expected, rtol=0, atol=1e-6)
    tokens = [TOKENIZER.encode(text, add_special_tokens=True) for text in texts]
    assert client.embeddings.create(model="tiny", input=tokens).data == default.data
    assert default.usage.prompt_tokens == sum(map(len, tokens))
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="tiny", input="a", dimensions=3)
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="tiny", input=[[]])


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llmlab"


def test_errors_are_the_package_s_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="a" * 200)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="n=5"):
        client.completions.create(model="tiny", prompt="a", n=5)  # more than the engine has rows
    stranger = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_stream_that_is_closed_gives_its_blocks_back(client: openai.OpenAI, engine: Engine) -> None:
    body: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 100, "extra_body": {"ignore_eos": True}}
    with client.completions.create(**body, stream=True) as stream:
        next(iter(stream))
    until(lambda: engine.stats().running == 0)
    stats = engine.stats()
    assert stats.blocks_free == stats.blocks_total


def test_requests_at_one_time_are_answered_as_alone(client: openai.OpenAI) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"{number} {PROMPT}" for number in range(8)]

    def ask(prompt: str) -> str:
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=10, temperature=0).choices[0].text

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, prompts)) == [continued(prompt, 10) for prompt in prompts]
