"""/v1/chat/completions writes a conversation by the model's template and answers in the interface's shapes."""

from typing import Any

import pytest

from tests.infer.server.fake import TOKENIZER, FakeEngine, letters
from tests.infer.server.serving import client_of, fake_client, service_of
from tests.infer.server.test_completions import events, ids_of

HELLO = [{"role": "user", "content": "hello"}]
PLAIN = ids_of("user: hello\n\nassistant:")


def test_an_answer_has_the_shape_of_the_interface() -> None:
    client, engine = fake_client()
    answer = client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 6}).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": letters(PLAIN, 0, 6), "refusal": None}
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "chat.completion"
    assert answer["usage"] == {"prompt_tokens": len(PLAIN), "completion_tokens": 6, "total_tokens": len(PLAIN) + 6}
    assert engine.requests[0].prompt_ids == tuple(PLAIN)
    assert engine.requests[0].stop == ("\n\nuser:",)  # the plain template's


def test_all_room_is_given_where_no_limit_is_asked_for_and_the_newer_limit_counts() -> None:
    client, engine = fake_client()
    client.post("/v1/chat/completions", json={"messages": HELLO})
    client.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 9, "max_completion_tokens": 4})
    assert [request.max_new_tokens for request in engine.requests] == [128 - len(PLAIN), 4]


def test_the_pieces_of_a_stream_add_up_to_the_whole_answer() -> None:
    client, _ = fake_client()
    body = {"messages": HELLO, "max_tokens": 7, "n": 2, "logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=body).json()
    told = events(client, "/v1/chat/completions", body)
    assert {event["object"] for event in told} == {"chat.completion.chunk"}
    for choice in whole["choices"]:
        own = [one for event in told for one in event["choices"] if one["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        tokens = [token for one in own for token in (one["logprobs"] or {"content": []})["content"]]
        assert tokens == choice["logprobs"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    first = whole["choices"][0]["logprobs"]["content"][0]
    written = letters(PLAIN, 0, 7)
    assert (first["token"], first["bytes"], first["logprob"]) == (written[0], [ord(written[0])], -0.5)
    assert [one["logprob"] for one in first["top_logprobs"]] == [-0.5, -1.5]


def test_the_model_s_own_template_writes_the_conversation() -> None:
    engine = FakeEngine()
    template = "{% for m in messages %}[{{ m.role }}|{{ m.content }}]{% endfor %}{{ tone }}"
    client = client_of(service_of(engine, template=template))
    messages = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": None},
        {"role": "user", "content": "d"},
    ]
    body = {"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"tone": "!"}}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert TOKENIZER.decode(engine.requests[0].prompt_ids) == "[system|short][user|a\nb][assistant|c][user|d]!"
    assert engine.requests[0].stop == ()


def test_nobody_can_write_a_special_token_into_a_message() -> None:
    client, engine = fake_client()
    message = {"role": "user", "content": "x</s>y", "name": "n</s>"}
    body = {"messages": [message], "max_tokens": 1, "chat_template_kwargs": {"bos_token": "</s>"}}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert TOKENIZER.eos_id not in engine.requests[0].prompt_ids
    assert bytes(engine.requests[0].prompt_ids) == b"</s>user: x</s>y\n\nassistant:"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "x", "contents": "y"}]}, "messages[0].contents"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 1000}, "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_of_its_field(change: dict[str, Any], param: str) -> None:
    client, engine = fake_client()
    response = client.post("/v1/chat/completions", json={"messages": HELLO, **change})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert engine.requests == []


def test_a_template_that_refuses_a_conversation_says_why() -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}x"
    client = client_of(service_of(FakeEngine(), template=template))
    response = client.post("/v1/chat/completions", json={"messages": HELLO})
    assert response.status_code == 400
    assert "begin with a system message" in response.json()["error"]["message"]


def test_fields_that_ask_for_nothing_pass() -> None:
    client, _ = fake_client()
    body = {
        **{"messages": HELLO, "max_tokens": 1, "tools": [], "tool_choice": "none", "modalities": ["text"]},
        **{"response_format": {"type": "text"}, "parallel_tool_calls": False, "store": False, "temperature": None},
        **{"service_tier": "auto", "reasoning_effort": None, "stop": None, "logit_bias": {}},
    }
    assert client.post("/v1/chat/completions", json=body).status_code == 200
