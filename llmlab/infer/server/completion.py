"""/v1/completions: a prompt, as text or as tokens, continued."""

from collections.abc import Sequence
from typing import Any

from llmlab.infer.engine.request import Event, TokenLogprobs
from llmlab.infer.server.choices import Choice, Dialect, finite
from llmlab.infer.server.errors import invalid
from llmlab.infer.server.fields import Fields
from llmlab.infer.server.plans import MOST_LOGPROBS, Plan, Shared, check_model, check_samples, new_tokens, started
from llmlab.infer.server.sampling_fields import is_token, sampling_of
from llmlab.infer.server.service import Service
from llmlab.infer.server.spelling import TextOffset
from llmlab.tokenizers import Tokenizer

_DEFAULT_TOKENS = 16  # as OpenAI has it


class Completions(Dialect):
    """See the module's docstring."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def plan(self, body: Any, service: Service) -> Plan:
        fields = Fields(body)
        check_model(fields, service)
        prompt = fields.take("prompt")
        echo = fields.boolean("echo", False)
        logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
        n = fields.integer("n", 1, 1, service.config.max_samples)
        best_of = fields.integer("best_of", n, 1, service.config.max_samples)
        max_tokens = fields.integer("max_tokens", None, 0, 2**31 - 1)
        fields.refuse("suffix", "the model only continues")
        shared = Shared.of(fields, service)
        assert n is not None and best_of is not None
        if best_of < n:
            raise invalid(f"best_of={best_of} is less than n={n}", "best_of")
        if best_of > n and shared.stream:
            raise invalid("which samples are best is known at the end; do not stream, or leave best_of out", "best_of")
        if max_tokens == 0 and not echo:
            raise invalid("max_tokens=0 writes nothing; it needs echo", "max_tokens")
        reported = 0 if logprobs is None and best_of > n else logprobs  # the best are chosen by log-probability
        sampling = sampling_of(fields, reported, service.tokenizer.vocab_size)
        fields.done()
        texts = _prompts(prompt, service, best_of)
        rows = _tokens(texts, service.tokenizer)
        requests = [
            shared.request(
                row,
                sampling,
                new_tokens(len(row), max_tokens, _DEFAULT_TOKENS, "max_tokens", service),
                best_of,
                prompt_logprobs=echo and logprobs is not None,
            )
            for row in rows
        ]
        return Plan(
            requests=tuple(requests),
            n=n,
            stream=shared.stream,
            include_usage=shared.include_usage,
            logprobs=logprobs,
            seconds=shared.seconds,
            echo=tuple(map(self._echoed, texts, [service.tokenizer] * len(texts))) if echo else None,
            only_prompt=max_tokens == 0,
        )

    @staticmethod
    def _echoed(prompt: str | list[int], tokenizer: Tokenizer) -> str:
        return prompt if isinstance(prompt, str) else tokenizer.decode(prompt)

    def choice(self, service: Service, plan: Plan, request: int, index: int) -> "CompletionChoice":
        return CompletionChoice(service, plan, request, index)


class CompletionChoice(Choice):
    """One continued prompt."""

    def __init__(self, service: Service, plan: Plan, request: int, index: int) -> None:
        super().__init__(service, plan, request, index)
        self._offset = TextOffset()
        self._begun = False
        self._text = ""
        self._logprobs = _empty_logprobs()

    def opening(self) -> dict[str, Any] | None:
        return None

    def delta(self, event: Event, prompt: Sequence[TokenLogprobs | None] | None) -> dict[str, Any]:
        text, told = "", _empty_logprobs()
        if not self._begun:
            self._begun = True
            if self.plan.echo is not None:
                text += self.plan.echo[self.request]
                ids = self.plan.requests[self.request].prompt_ids
                self._tell(told, ids, prompt if prompt is not None else [None] * len(ids))
        if not self.plan.only_prompt:
            text += event.text
            self._tell(told, event.token_ids, event.logprobs or ())
        self._text += text
        for name, values in told.items():
            self._logprobs[name] += values
        return self._shaped(text, told, self.reason)

    def whole(self) -> dict[str, Any]:
        return self._shaped(self._text, self._logprobs, self.reason)

    def _shaped(self, text: str, logprobs: dict[str, list[Any]], reason: str | None) -> dict[str, Any]:
        told = None if self.plan.logprobs is None else logprobs
        shaped = {"index": self.index, "text": text, "logprobs": told, "finish_reason": reason}
        return shaped if reason is None else {**shaped, "stop_reason": self.stop}

    def _tell(self, told: dict[str, list[Any]], ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> None:
        """Adds tokens to the four lists of the interface."""
        spelling = self.service.spelling
        if self.plan.logprobs is None:
            return
        told["text_offset"] += spelling.starts(ids, self._offset)
        for index, one in zip(ids, logprobs, strict=True):
            told["tokens"].append(spelling.readable(index))
            told["token_logprobs"].append(None if one is None else finite(one.logprob))
            told["top_logprobs"].append(None if one is None else self._top(one))

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The most probable tokens by name, and the token itself; of two with one name the more probable."""
        named: dict[str, float] = {}
        for index, logprob in (*one.top[: self.plan.logprobs], (one.token_id, one.logprob)):
            named.setdefault(self.service.spelling.readable(index), finite(logprob))
        return named


def _empty_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _prompts(prompt: Any, service: Service, samples: int) -> list[str | list[int]]:
    """The prompts of a request: one text, several texts, the tokens of one, or those of several."""
    vocab_size = service.tokenizer.vocab_size
    wanted = invalid(
        f"prompt must be a string, a list of strings, a list of token ids (0 to {vocab_size - 1}), or a list of those",
        "prompt",
    )
    if prompt is None:
        raise invalid("prompt is missing", "prompt", "missing_required_parameter")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise wanted
    check_samples(len(prompt) * samples, service)
    for one in prompt:
        as_tokens = isinstance(one, list) and one and all(is_token(index, vocab_size) for index in one)
        if not isinstance(one, str) and not as_tokens:
            raise wanted
    return prompt


def _tokens(prompts: Sequence[str | list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Tokens of each: those of a text begin with the token that begins a text, where the tokenizer has one."""
    encoded = iter(tokenizer.encode_batch([one for one in prompts if isinstance(one, str)]))
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [started(tokenizer, first + next(encoded)) if isinstance(one, str) else one for one in prompts]
