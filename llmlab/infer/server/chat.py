"""/v1/chat/completions: a conversation, written down by the model's chat template, and continued."""

from collections.abc import Sequence
from typing import Any

from llmlab.infer.engine.request import Event, TokenLogprobs
from llmlab.infer.server.choices import Choice, Dialect, finite
from llmlab.infer.server.errors import invalid
from llmlab.infer.server.fields import Fields, kind_of
from llmlab.infer.server.plans import MOST_LOGPROBS, Plan, Shared, check_model, check_samples, new_tokens, started
from llmlab.infer.server.sampling_fields import sampling_of
from llmlab.infer.server.service import Service
from llmlab.infer.server.templates import TemplateRefused

_MAX_MESSAGES = 4096
_ROLES = ("system", "developer", "user", "assistant", "tool")


class Chat(Dialect):
    """See the module's docstring."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def plan(self, body: Any, service: Service) -> Plan:
        fields = Fields(body)
        check_model(fields, service)
        messages = _messages(fields)
        n = fields.integer("n", 1, 1, service.config.max_samples)
        assert n is not None
        logprobs = _logprobs(fields)
        limit = fields.integer("max_completion_tokens", None, 1, 2**31 - 1)
        older = fields.integer("max_tokens", None, 1, 2**31 - 1)
        name = "max_tokens" if limit is None else "max_completion_tokens"
        variables = _variables(fields)
        _refuse_other_abilities(fields)
        shared = Shared.of(fields, service)
        sampling = sampling_of(fields, logprobs, service.tokenizer.vocab_size)
        fields.done()
        check_samples(n, service)
        try:
            row = service.template.encode(messages, variables)
        except TemplateRefused as error:
            raise invalid(str(error), "messages") from None
        row = started(service.tokenizer, row)
        new = new_tokens(len(row), older if limit is None else limit, None, name, service)
        request = shared.request(row, sampling, new, n, stop=service.template.stop)
        return Plan(
            requests=(request,),
            n=n,
            stream=shared.stream,
            include_usage=shared.include_usage,
            logprobs=logprobs,
            seconds=shared.seconds,
        )

    def choice(self, service: Service, plan: Plan, request: int, index: int) -> "ChatChoice":
        return ChatChoice(service, plan, request, index)


class ChatChoice(Choice):
    """One answer."""

    def __init__(self, service: Service, plan: Plan, request: int, index: int) -> None:
        super().__init__(service, plan, request, index)
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []

    def opening(self) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def delta(self, event: Event, prompt: Sequence[TokenLogprobs | None] | None) -> dict[str, Any]:
        told = [self._told(one) for one in event.logprobs or ()]
        self._text += event.text
        self._logprobs += told
        delta = {"content": event.text} if event.text else {}
        shaped = {"index": self.index, "delta": delta, "logprobs": self._list(told), "finish_reason": self.reason}
        return shaped if self.reason is None else {**shaped, "stop_reason": self.stop}

    def whole(self) -> dict[str, Any]:
        message = {"role": "assistant", "content": self._text, "refusal": None}
        logprobs = self._list(self._logprobs)
        shaped = {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.reason}
        return {**shaped, "stop_reason": self.stop}

    def _list(self, told: list[dict[str, Any]]) -> dict[str, Any] | None:
        return None if self.plan.logprobs is None else {"content": told, "refusal": None}

    def _told(self, one: TokenLogprobs) -> dict[str, Any]:
        top = [self._token(index, logprob) for index, logprob in one.top[: self.plan.logprobs]]
        return {**self._token(one.token_id, one.logprob), "top_logprobs": top}

    def _token(self, index: int, logprob: float) -> dict[str, Any]:
        spelling = self.service.spelling
        return {
            "token": spelling.readable(index),
            "logprob": finite(logprob),
            # A special token is no part of the text, and has no bytes in it.
            "bytes": None if index in self.service.tokenizer.hidden_ids else list(spelling.bytes_of(index)),
        }


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.take("messages")
    if messages is None:
        raise invalid("messages is missing", "messages", "missing_required_parameter")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", "a list of at least one message", messages)
    if len(messages) > _MAX_MESSAGES:
        raise invalid(f"there are {len(messages)} messages; at most {_MAX_MESSAGES} are taken", "messages")
    return [_message(Fields(one, f"messages[{place}].")) for place, one in enumerate(messages)]


def _message(fields: Fields) -> dict[str, Any]:
    """One turn, as templates expect it: its content is a string."""
    role = fields.text("role", max_length=32, choices=_ROLES)
    if role is None:
        raise invalid(f"{fields.path('role')} is missing", fields.path("role"), "missing_required_parameter")
    calls = fields.take("tool_calls")
    content = _content(fields.take("content"), fields, required=role != "assistant" or not calls)
    others = {"tool_calls": calls, "tool_call_id": fields.take("tool_call_id"), "name": fields.take("name")}
    fields.ignore("refusal", "annotations", "audio", "function_call")  # what answers have, null or without effect
    fields.done()
    return {"role": role, "content": content} | {name: value for name, value in others.items() if value is not None}


def _content(content: Any, fields: Fields, *, required: bool) -> str:
    """The text of a content, which is a string or a list of parts."""
    path = fields.path("content")
    if content is None and not required:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{path} must be a string or a list of parts, not {kind_of(content)}", path, "invalid_type")
    texts = []
    for place, one in enumerate(content):
        part = Fields(one, f"{path}[{place}].")
        part.text("type", max_length=32, choices=("text",))
        text = part.text("text", max_length=2**31 - 1)
        part.done()
        if text is None:
            raise invalid(f"{part.path('text')} is missing", part.path("text"), "missing_required_parameter")
        texts.append(text)
    return "\n".join(texts)


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs", False)
    top = fields.integer("top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    return (top or 0) if wanted else None


def _variables(fields: Fields) -> dict[str, Any]:
    """What the template may look at besides the messages."""
    variables = fields.take("chat_template_kwargs")
    if variables is not None and not isinstance(variables, dict):
        raise fields.wrong("chat_template_kwargs", "an object", variables)
    return {**(variables or {}), "add_generation_prompt": fields.boolean("add_generation_prompt", True)}


def _refuse_other_abilities(fields: Fields) -> None:
    """Fields for what other models can do."""
    for tool in ("tools", "functions"):
        fields.refuse(tool, "calls of tools are not told from text; describe the tools in a message")
    fields.refuse("tool_choice", "there are no tools", ("none", "auto"))
    fields.refuse("function_call", "there are no functions", ("none", "auto"))
    fields.refuse("modalities", "the model writes text", (["text"],))
    for other in ("audio", "reasoning_effort", "verbosity", "web_search_options"):
        fields.refuse(other, "the model has no such ability")
    fields.ignore("parallel_tool_calls", "prediction")
