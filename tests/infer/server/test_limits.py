"""What a server refuses, and that a refusal is told as the interface tells errors; whatever comes, it is no failure."""

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from llmlab.infer.engine.request import EngineBusy, EngineClosed
from llmlab.infer.server.config import ServerConfig
from tests.infer.server.fake import FakeEngine
from tests.infer.server.serving import client_of, fake_client, service_of

CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    "raw",
    [
        *(b"", b"{", b"nonsense", b'{"prompt": NaN}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}'),
        *(b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, VECTORS])
def test_what_is_no_json_is_refused(path: str, raw: bytes) -> None:
    client, _ = fake_client()
    response = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert error_of(response, 400)["code"] == "invalid_json"


@pytest.mark.parametrize("raw", [b"[]", b"null", b"3", b'"x"', b"true"])
def test_a_body_that_is_no_object_is_refused(raw: bytes) -> None:
    client, _ = fake_client()
    error_of(client.post(TEXT, content=raw, headers={"content-type": "application/json"}), 400)


def test_a_body_that_is_not_declared_as_json_is_refused_for_any_page_could_send_it() -> None:
    client, engine = fake_client()
    error_of(client.post(TEXT, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}), 415)
    assert engine.requests == []


def test_large_bodies_are_refused_declared_or_not() -> None:
    client, _ = fake_client(max_body_bytes=100)
    large = json.dumps({"prompt": "a" * 200}).encode()
    headers = {"content-type": "application/json"}
    assert error_of(client.post(TEXT, content=large, headers=headers), 413)["code"] == "body_too_large"
    pieces = (large[start : start + 10] for start in range(0, len(large), 10))
    assert error_of(client.post(TEXT, content=pieces, headers=headers), 413)["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 1.5}, "n"),
        ({"prompt": ["a", "b"], "n": 100}, "n"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 127}, "max_tokens"),
        ({"prompt": "a" * 128}, None),
        ({"prompt": "a", "temperature": 2.1}, "temperature"),
        ({"prompt": "a", "temperature": "1"}, "temperature"),
        ({"prompt": "a", "temperature": True}, "temperature"),
        ({"prompt": "a", "temperature": 1e-300}, None),
        ({"prompt": "a", "top_p": 1.1}, "top_p"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stop": 3}, "stop"),
        ({"prompt": "a", "stop_token_ids": [-1]}, "stop_token_ids"),
        ({"prompt": "a", "logit_bias": {"a": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"3": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"03": 1}}, "logit_bias"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "user": 3}, "user"),
        ({"prompt": "a", "model": 3}, "model"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "timeout": 0}, "timeout"),
        ({"prompt": "a", "guided_json": "{"}, "guided_json"),
        ({"prompt": "a", "guided_json": {}, "guided_regex": "a"}, None),
        ({"prompt": "a", "max_token": 3}, "max_token"),
    ],
)
def test_fields_that_cannot_be_are_refused_by_name(body: dict[str, Any], param: str | None) -> None:
    client, engine = fake_client()
    error = error_of(client.post(TEXT, json=body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert engine.requests == []


def test_a_misspelt_field_is_told_with_the_nearest_one() -> None:
    client, _ = fake_client()
    error = error_of(client.post(TEXT, json={"prompt": "a", "temprature": 1}), 400)
    assert error["code"] == "unknown_parameter"
    assert "did you mean temperature?" in error["message"]


def test_too_many_tokens_have_the_interface_s_code() -> None:
    client, _ = fake_client(max_prompt_tokens=10, max_new_tokens=5)
    assert error_of(client.post(TEXT, json={"prompt": "a" * 10}), 400)["code"] == "context_length_exceeded"
    assert "limit of 5" in error_of(client.post(TEXT, json={"prompt": "a", "max_tokens": 6}), 400)["message"]
    answer = client.post(TEXT, json={"prompt": "a"}).json()
    assert answer["usage"]["completion_tokens"] == 5
    too_many = {"messages": [{"role": "user", "content": "a" * 500}]}
    assert error_of(client.post(CHAT, json=too_many), 400)["code"] == "context_length_exceeded"


def test_another_model_s_name_is_not_found() -> None:
    client, _ = fake_client()
    error = error_of(client.post(TEXT, json={"prompt": "a", "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(client.get("/v1/models/gpt-4"), 404)
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_paths_and_methods_that_there_are_not() -> None:
    client, _ = fake_client()
    error_of(client.get("/v1/nothing"), 404)
    error_of(client.get(TEXT), 405)
    error_of(client.post("/v1/completions/", json={}), 404)


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Bearer kéy", "Basic secret", "secret"])
def test_without_the_key_nothing_under_v1_answers(header: str) -> None:
    client, engine = fake_client(api_key="secret")
    headers = {b"authorization": header.encode("latin-1")}
    for path in (CHAT, TEXT, VECTORS):
        assert error_of(client.post(path, json={"prompt": "a"}, headers=headers), 401)["code"] == "invalid_api_key"
    for path in ("/v1/models", "/metrics", "/v1/nothing"):
        error_of(client.get(path, headers=headers), 401)
    assert engine.requests == []
    assert client.get("/health").status_code == 200
    assert client.get("/").status_code == 200


def test_with_the_key_it_answers_and_the_key_is_in_no_text() -> None:
    client, _ = fake_client(api_key="secret")
    assert client.post(TEXT, json={"prompt": "a"}, headers={"authorization": "Bearer secret"}).status_code == 200
    assert "secret" not in repr(ServerConfig(name="x", api_key="secret"))


def test_a_page_whose_name_was_pointed_to_loopback_gets_nothing() -> None:
    client, engine = fake_client()
    error_of(client.post(TEXT, json={"prompt": "a"}, headers={"host": "evil.example:8000"}), 403)
    assert engine.requests == []
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.1"):
        assert client.get("/health", headers={"host": host}).status_code == 200
    proxied, _ = fake_client(allowed_hosts=("lab.example",))
    assert proxied.get("/health", headers={"host": "lab.example"}).status_code == 200
    exposed, _ = fake_client(host="0.0.0.0")
    assert exposed.get("/health", headers={"host": "lab.example"}).status_code == 200


def test_pages_of_other_origins_are_allowed_only_where_they_are_listed() -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    client, _ = fake_client()
    assert "access-control-allow-origin" not in client.options(TEXT, headers=asking).headers
    client, _ = fake_client(cors_origins=("https://a.example",), api_key="k")
    answer = client.options(TEXT, headers=asking)
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in client.options(TEXT, headers={**asking, "origin": "https://b"}).headers


def test_too_many_requests_at_one_time_are_told_to_come_back() -> None:
    service = service_of(FakeEngine(), max_concurrent=1)
    client = client_of(service)
    with service.gate.entered():
        response = client.post(TEXT, json={"prompt": "a"})
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "1"
    assert client.post(TEXT, json={"prompt": "a"}).status_code == 200


def test_what_the_engine_refuses_has_the_status_of_its_reason() -> None:
    client, engine = fake_client()
    for refusal, status in ((EngineBusy("full"), 429), (EngineClosed("over"), 503)):
        engine.refusal = refusal
        error_of(client.post(TEXT, json={"prompt": "a"}), status)
    engine.refusal = KeyError("a bug")
    error = error_of(client.post(TEXT, json={"prompt": "a"}), 500)
    assert "a bug" not in error["message"]


def test_a_sample_that_fails_is_told_and_in_a_stream_that_has_begun_as_its_last_event() -> None:
    client, engine = fake_client()
    engine.fails = "scores are not finite"
    assert "not finite" in error_of(client.post(TEXT, json={"prompt": "a"}), 500)["message"]
    with client.stream("POST", TEXT, json={"prompt": "a", "stream": True}) as response:
        assert response.status_code == 200
        pieces = "".join(response.iter_text()).split("\n\n")
    assert json.loads(pieces[-2].removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_request_that_takes_too_long_ends_and_is_cancelled_at_the_engine() -> None:
    engine = FakeEngine(seconds=0.02)
    client = client_of(service_of(engine, max_seconds=0.1))
    response = client.post(TEXT, json={"prompt": "a", "max_tokens": 100})
    assert error_of(response, 504)["type"] == "timeout_error"
    assert response.headers["x-should-retry"] == "false"
    assert engine.cancelled == engine.handles
    body = {"prompt": "a", "max_tokens": 100, "stream": True, "timeout": 0.08}
    with client.stream("POST", TEXT, json=body) as streamed:
        pieces = "".join(streamed.iter_text()).split("\n\n")
    assert json.loads(pieces[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert engine.cancelled == engine.handles


def test_every_answer_has_an_id_and_forbids_guessing_its_type() -> None:
    client, _ = fake_client()
    answers = [client.get("/health"), client.get("/nothing"), client.post(TEXT, json={})]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    assert {answer.headers["x-content-type-options"] for answer in answers} == {"nosniff"}


def test_metrics_count_what_has_happened() -> None:
    client, _ = fake_client()
    client.post(TEXT, json={"prompt": "abc", "max_tokens": 4})
    client.post(TEXT, json={})
    client.get("/somewhere/else")
    lines = client.get("/metrics").text.splitlines()
    for line in (
        'llmlab_requests_total{endpoint="/v1/completions",status="200"} 1.0',
        'llmlab_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'llmlab_requests_total{endpoint="other",status="404"} 1.0',
        'llmlab_samples_total{reason="length"} 1.0',
        "llmlab_time_to_first_token_seconds_count 1.0",
        "llmlab_time_per_token_seconds_count 1.0",
        "llmlab_request_seconds_count 1.0",
        "llmlab_prompt_tokens_total 4.0",
        "llmlab_blocks 64.0",
        "llmlab_requests_active 0.0",
    ):
        assert line in lines


# --- any JSON at all --------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NAMES = (
    *("prompt", "messages", "input", "model", "n", "best_of", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "stop", "stop_token_ids", "seed", "logprobs", "top_logprobs", "logit_bias", "echo"),
    *("response_format", "guided_json", "guided_regex", "guided_choice", "user", "stream_options", "timeout"),
    *("presence_penalty", "repetition_penalty", "chat_template_kwargs", "add_generation_prompt", "dimensions"),
    *("encoding_format", "tools", "modalities", "priority", "cache_salt", "suffix"),
)
PLAUSIBLE = {
    "prompt": st.text(max_size=5) | st.lists(st.integers(0, 258), max_size=4),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "x"]), "content": st.text(max_size=5) | JSON},
            optional={"name": JSON, "tool_calls": JSON},
        ),
        max_size=3,
    ),
    "logit_bias": st.dictionaries(st.integers(-3, 300).map(str), st.floats(-120, 120), max_size=3),
    "response_format": st.fixed_dictionaries({"type": st.sampled_from(["text", "json_object", "json_schema"])}),
    "max_tokens": st.integers(-1, 4),
    "logprobs": st.booleans() | st.integers(0, 3),
}
BODIES = st.fixed_dictionaries(
    {}, optional={name: PLAUSIBLE[name] | JSON if name in PLAUSIBLE else JSON for name in NAMES}
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(path=st.sampled_from([CHAT, TEXT, VECTORS]), body=BODIES | JSON)
def test_whatever_json_comes_it_is_answered_or_refused_and_never_a_failure(path: str, body: Any) -> None:
    client, engine = fake_client()
    response = client.post(path, json=body)
    assert response.status_code < 500
    if response.status_code >= 400:
        error_of(response, response.status_code)
    assert engine.unfinished == 0
