"""/v1/completions tells what the engine wrote, whole and streamed, in the interface's shapes."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.infer.server.fake import TOKENIZER, FakeEngine, letters, scored
from tests.infer.server.serving import client_of, fake_client, service_of

BOS = TOKENIZER.bos_id
assert BOS is not None


def ids_of(text: str) -> list[int]:
    assert BOS is not None
    return [BOS, *text.encode()]


def events(client: TestClient, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, [DONE] checked and dropped."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = "".join(response.iter_text())
    pieces = text.split("\n\n")
    assert pieces[-2:] == ["data: [DONE]", ""]
    return [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2]]


def test_a_prompt_is_continued_and_its_tokens_are_counted() -> None:
    client, engine = fake_client()
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "max_tokens": 5}).json()
    assert answer["choices"] == [
        {
            "index": 0,
            "text": letters(ids_of("abc"), 0, 5),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert answer["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert engine.requests[0].prompt_ids == tuple(ids_of("abc"))


def test_without_max_tokens_sixteen_are_written_or_what_there_is_room_for() -> None:
    client, engine = fake_client()
    assert client.post("/v1/completions", json={"prompt": "a"}).json()["usage"]["completion_tokens"] == 16
    long = "a" * 120
    assert client.post("/v1/completions", json={"prompt": long}).json()["usage"]["completion_tokens"] == 128 - 121
    assert [request.max_new_tokens for request in engine.requests] == [16, 7]


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("ab", [ids_of("ab")]),
        (["ab", "c"], [ids_of("ab"), ids_of("c")]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("", [[BOS]]),
    ],
)
def test_prompts_are_texts_or_tokens_one_or_several(prompt: Any, rows: list[list[int]]) -> None:
    client, engine = fake_client()
    answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 3, "n": 2}).json()
    told = {choice["index"]: choice["text"] for choice in answer["choices"]}
    assert told == {2 * at + s: letters(row, s, 3) for at, row in enumerate(rows) for s in range(2)}
    assert sorted(request.prompt_ids for request in engine.requests) == sorted(map(tuple, rows))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, rows))
    assert answer["usage"]["completion_tokens"] == 6 * len(rows)


def test_the_pieces_of_a_stream_add_up_to_the_whole_answer() -> None:
    client, _ = fake_client()
    body = {"prompt": ["one", "two"], "max_tokens": 7, "n": 2, "logprobs": 2, "echo": True, "seed": 1}
    whole = client.post("/v1/completions", json=body).json()
    told = events(client, "/v1/completions", {**body, "stream_options": {"include_usage": True}})
    assert told[-1]["usage"] == whole["usage"]
    assert told[-1]["choices"] == []
    assert all(event["usage"] is None for event in told[:-1])
    assert len({event["id"] for event in told}) == 1
    for choice in whole["choices"]:
        own = [one for event in told for one in event["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert [one["finish_reason"] for one in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for one in own for value in one["logprobs"][name]] == values


def test_log_probabilities_are_told_of_every_token_and_where_it_stands() -> None:
    client, _ = fake_client()
    body = {"prompt": "é!", "max_tokens": 2, "logprobs": 1, "echo": True}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    written = letters(ids_of("é!"), 0, 2)
    logprobs = choice["logprobs"]
    assert choice["text"] == "é!" + written
    assert logprobs["tokens"] == ["<s>", "bytes:\\xc3", "bytes:\\xa9", "!", *written]
    assert logprobs["text_offset"] == [0, 0, 0, 1, 2, 3]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5, -1.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][3] == {"!": -0.5}
    one = scored(ord(written[1]), 1, 1)
    assert logprobs["top_logprobs"][5] == {written[1]: one.logprob}


def test_no_new_token_is_told_where_only_the_prompt_is_asked_for() -> None:
    client, _ = fake_client()
    body = {"prompt": "ab", "max_tokens": 0, "logprobs": 0, "echo": True}
    answer = client.post("/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "ab"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}


def test_best_of_tells_the_samples_of_highest_mean_log_probability() -> None:
    class Uneven(FakeEngine):
        def _write_sample(self, handle: Any, sample: int) -> None:
            from llmlab.infer.engine.request import Event, TokenLogprobs

            mean = [-2.0, -0.1, -1.0][sample]
            logprobs = tuple(TokenLogprobs(97 + sample, mean) for _ in range(2))
            handle.put(Event(sample, (97 + sample,) * 2, "ab c"[sample] * 2, logprobs, "length"))

    client = client_of(service_of(Uneven()))
    body = {"prompt": "x", "max_tokens": 2, "n": 2, "best_of": 3}
    answer = client.post("/v1/completions", json=body).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(0, "bb"), (1, "  ")]
    assert answer["usage"]["completion_tokens"] == 6
    assert client.post("/v1/completions", json={**body, "stream": True}).status_code == 400


def test_a_stop_string_ends_the_text_before_it() -> None:
    client, engine = fake_client()
    written = letters(ids_of("abc"), 0, 10)
    body = {"prompt": "abc", "max_tokens": 10, "stop": written[3:6]}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (written[:3], "stop")
    assert choice["stop_reason"] == written[3:6]
    told = events(client, "/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in told) == written[:3]
    assert engine.requests[0].stop == (written[3:6],)


def test_sampling_fields_reach_the_engine_as_they_were_sent() -> None:
    client, engine = fake_client()
    body = {
        **{"prompt": "a", "temperature": 0.3, "top_p": 0.9, "top_k": 7, "min_p": 0.05, "seed": -1, "user": "me"},
        **{"presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.2, "logit_bias": {"97": -100}},
        **{"stop_token_ids": [98], "ignore_eos": True, "priority": 3, "cache_salt": "s", "metadata": {"a": "b"}},
    }
    assert client.post("/v1/completions", json=body).status_code == 200
    (request,) = engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 7, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (sampling.seed, sampling.logit_bias) == (2**64 - 1, ((97, -100.0),))
    assert (request.stop_ids, request.stop_at_eos, request.priority) == ((98,), False, 3)
    assert (request.user, request.cache_salt) == ("me", "s")


def test_every_request_without_a_seed_has_one_of_its_own() -> None:
    client, engine = fake_client()
    for _ in range(2):
        client.post("/v1/completions", json={"prompt": "a"})
    assert engine.requests[0].sampling.seed != engine.requests[1].sampling.seed


def test_all_tokens_may_be_asked_for_by_their_names() -> None:
    client, engine = fake_client()
    for top_k, top_p in ((-1, 1), (0, 1)):
        client.post("/v1/completions", json={"prompt": "a", "top_k": top_k, "top_p": top_p})
    client.post("/v1/completions", json={"prompt": "a", "top_p": 0})
    assert [request.sampling.top_k for request in engine.requests] == [None, None, 1]
