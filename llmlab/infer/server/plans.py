"""From a JSON body to a plan: what the engine is asked, and how its replies are told; what all bodies have in common.

What OpenAI's interface has and this server does not is refused where it would change the answer, and ignored where it
would not (metadata, tiers of service). What it does not have keeps the names that vLLM gave it: top_k, min_p,
repetition_penalty, stop_token_ids, ignore_eos, guided_json, guided_regex, guided_choice, guided_grammar, priority,
cache_salt. One field is this server's own: timeout, in seconds.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmlab.infer.engine.request import Request
from llmlab.infer.sampling import Sampling
from llmlab.infer.server.errors import ApiError, invalid, too_long
from llmlab.infer.server.fields import Fields, shown
from llmlab.infer.server.sampling_fields import constraint_of, stops_of
from llmlab.infer.server.service import Generator, Service
from llmlab.tokenizers import Tokenizer

if TYPE_CHECKING:
    from llmlab.infer.constraints import Constraint

_WITHOUT_EFFECT = (
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
MOST_LOGPROBS = 20
"""Most probable tokens that may be asked for at every place."""


@dataclass(frozen=True)
class Plan:
    """What one body asks for."""

    requests: tuple[Request, ...]
    """One per prompt."""
    n: int
    """Samples of each prompt that are told; `best_of` draws more."""
    stream: bool
    include_usage: bool
    """Whether a stream ends with the counts of tokens."""
    logprobs: int | None
    """Most probable tokens to tell of every place; None for no log-probabilities."""
    seconds: float
    """Time for all of it."""
    echo: tuple[str, ...] | None = None
    """The prompts as text, where they are told again."""
    only_prompt: bool = False
    """Whether the new text is left out: max_tokens was 0, and the prompt's log-probabilities are what is asked for."""


@dataclass(frozen=True)
class Shared:
    """The fields that completions and chats share, besides those of sampling."""

    stream: bool
    include_usage: bool
    seconds: float
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    stop_at_eos: bool
    constraint: "Constraint | None"
    priority: int
    user: str | None
    cache_salt: str

    @classmethod
    def of(cls, fields: Fields, service: Service) -> "Shared":
        """Takes them."""
        stream = fields.boolean("stream", False)
        options = fields.inside("stream_options")
        include_usage = False
        if options is not None:
            if not stream:
                raise invalid("stream_options needs stream", "stream_options")
            include_usage = options.boolean("include_usage", False)
            options.ignore("include_obfuscation")
            options.done()
        stop, stop_ids, stop_at_eos = stops_of(fields, service.tokenizer.vocab_size)
        priority = fields.integer("priority", 0, -(2**31), 2**31 - 1)
        assert priority is not None
        fields.ignore(*_WITHOUT_EFFECT)
        return cls(
            stream=stream,
            include_usage=include_usage,
            seconds=seconds_of(fields, service),
            stop=stop,
            stop_ids=stop_ids,
            stop_at_eos=stop_at_eos,
            constraint=constraint_of(fields),
            priority=priority,
            user=fields.text("user", max_length=512),
            cache_salt=fields.text("cache_salt", max_length=512) or "",
        )

    def request(
        self,
        prompt_ids: list[int],
        sampling: Sampling,
        max_new_tokens: int,
        n: int,
        *,
        stop: tuple[str, ...] = (),
        prompt_logprobs: bool = False,
    ) -> Request:
        """What the engine is asked for one prompt; `stop` are further strings that end the text."""
        return Request(
            tuple(prompt_ids),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            stop=self.stop + stop,
            stop_ids=self.stop_ids,
            stop_at_eos=self.stop_at_eos,
            n=n,
            prompt_logprobs=prompt_logprobs,
            constraint=self.constraint,
            priority=self.priority,
            user=self.user,
            cache_salt=self.cache_salt,
        )


def check_model(fields: Fields, service: Service) -> None:
    """Raises an ApiError for the name of another model; no name means the one that there is."""
    name = fields.text("model", max_length=1024)
    if name is not None and name != service.config.name:
        raise no_model(name, service)


def no_model(name: str, service: Service) -> ApiError:
    """The error for a model that is not served."""
    message = f"there is no model {shown(name)}; this server has {shown(service.config.name)}"
    return ApiError(404, message, param="model", code="model_not_found")


def engine_of(service: Service) -> Generator:
    """The engine; raises an ApiError where the model does not write text."""
    if service.engine is None:
        raise invalid(f"the model {shown(service.config.name)} does not write text; it has /v1/embeddings", "model")
    return service.engine


def seconds_of(fields: Fields, service: Service) -> float:
    """Time for the request: what it asks for, at most the server's."""
    seconds = fields.number("timeout", service.config.max_seconds, 0.001, 1e9)
    assert seconds is not None
    return min(seconds, service.config.max_seconds)


def new_tokens(prompt: int, asked: int | None, default: int | None, param: str, service: Service) -> int:
    """New tokens of a prompt of that many tokens.

    Args:
        prompt: its tokens.
        asked: what the request asks for.
        default: where it asks for nothing; None for all that there is room for.
        param: the name of the field.
        service: whose limits count.

    Raises:
        ApiError: prompt and new tokens exceed the model's positions or the server's limits.
    """
    config, length = service.config, engine_of(service).config.max_length
    assert length is not None  # a running engine has chosen it
    longest = length - 1 if config.max_prompt_tokens is None else min(length - 1, config.max_prompt_tokens)
    if prompt > longest:
        raise too_long(f"the prompt has {prompt} tokens, and at most {longest} are taken; shorten it", None)
    most = length - prompt
    if config.max_new_tokens is not None:
        if asked is not None and asked > config.max_new_tokens:
            raise invalid(f"{param}={asked} is more than this server's limit of {config.max_new_tokens}", param)
        most = min(most, config.max_new_tokens)
    if asked is None:
        return most if default is None else min(default, most)
    if asked > most:
        raise too_long(
            f"the prompt has {prompt} tokens and {param}={asked} asks for more than the {length} positions that the "
            f"model has; ask for at most {most}, or shorten the prompt",
            param,
        )
    return max(asked, 1)


def check_samples(count: int, service: Service) -> None:
    """Raises an ApiError where a request asks for too many texts."""
    if count > service.config.max_samples:
        raise invalid(f"prompts times samples are {count}; at most {service.config.max_samples} are taken", "n")


def started(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The tokens, or where there are none what stands before a document; raises an ApiError where nothing does."""
    if ids:
        return ids
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise invalid("the prompt is empty, and the tokenizer has no token to start from; write something")
    return [first]
