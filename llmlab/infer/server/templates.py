"""Chat templates: a conversation as the one text that the model was trained to continue.

A chat model has learnt one notation for turns, and a template, a small Jinja program that comes with its tokenizer,
writes it. It comes from whoever made the model, so it runs in a sandbox: no attribute that leads to Python's insides,
nothing that changes what it is given, no files, no imports, and limits on its size, its time and what it writes.

What users write must not become structure. The name of a special token inside a message (`<|im_end|>`) is marked before
the template runs and encoded as plain text after it, so nobody can write a turn of somebody else into a conversation.
"""

import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmlab.tokenizers import Tokenizer

PLAIN = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For models that have no template: turns as a play has them."""
PLAIN_STOP = ("\n\nuser:",)
"""Where a model that goes on writing the play is stopped."""

_MAX_SOURCE = 256 * 1024
_MAX_TEXT = 8 * 1024 * 1024
_MAX_SECONDS = 5.0
_MAX_REPEAT = 100_000


class TemplateRefused(ValueError):
    """The template does not take this conversation, or does not end."""


class ChatTemplate:
    """A template, and the tokenizer that it was written for."""

    def __init__(self, tokenizer: Tokenizer, source: str | None = None, *, max_seconds: float = _MAX_SECONDS) -> None:
        """
        Args:
            tokenizer: of the model.
            source: the template; `PLAIN` where there is none.
            max_seconds: time that it may take for one conversation.

        Raises:
            ValueError: it is no template.
        """
        self.is_plain = source is None
        self.stop = PLAIN_STOP if source is None else ()
        source = PLAIN if source is None else source
        if len(source) > _MAX_SOURCE:
            raise ValueError(f"the chat template has {len(source)} characters; at most {_MAX_SOURCE} are taken")
        self._tokenizer, self._seconds = tokenizer, max_seconds
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        environment.filters["tojson"] = _tojson
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template cannot be compiled: {error}") from None
        names = sorted(tokenizer.special.tokens, key=len, reverse=True)  # the longest first: <|end|> before <|end
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """The conversation as text, just as the template writes it.

        Args:
            messages: turns, each with a role and a content.
            variables: what else the template may look at; `add_generation_prompt` asks for the next turn's beginning.

        Raises:
            TemplateRefused: the template says why, fails, or exceeds a limit.
        """
        special = {f"{role}_token": token for role, token in self._tokenizer.special.roles.items()}
        given = {"bos_token": "", "eos_token": "", **special, **(variables or {}), "messages": list(messages)}
        pieces, size = [], 0
        try:
            with _Deadline(self._seconds):
                for piece in self._template.generate(given):
                    pieces.append(piece)
                    size += len(piece)
                    if size > _MAX_TEXT:
                        raise TemplateRefused(f"the conversation becomes more than {_MAX_TEXT} characters")
        except TemplateRefused:
            raise
        except Exception as error:  # templates are programs of others: whatever they raise is about this conversation
            raise TemplateRefused(f"the chat template fails: {type(error).__name__}: {error}") from None
        return "".join(pieces)

    def encode(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> list[int]:
        """The conversation as tokens: the template's special tokens are tokens, those in messages plain text.

        Raises:
            TemplateRefused: as `render`.
        """
        if self._special is None:
            return self._tokenizer.encode(self.render(messages, variables))
        secret = secrets.token_hex(8)  # nobody can write the mark into a message
        marked = _mapped([list(messages), dict(variables or {})], lambda text: self._marked(text, secret))
        text = self.render(*marked)
        names = self._tokenizer.special.tokens
        ids: list[int] = []
        for place, part in enumerate(re.split(f"\ue000{secret}:([0-9]+)\ue001", text)):
            if place % 2:
                ids += self._tokenizer.encode(names[int(part)])
            elif part:
                ids += self._tokenizer.encode(part, parse_special_tokens=True)
        return ids

    def _marked(self, text: str, secret: str) -> str:
        assert self._special is not None
        names = self._tokenizer.special.tokens
        return self._special.sub(lambda found: f"\ue000{secret}:{names.index(found[0])}\ue001", text)


def find_template(*directories: Path) -> str | None:
    """The template of the first of these directories that has one: chat_template.jinja, else tokenizer_config.json's.

    Raises:
        ValueError: a file is there and damaged.
    """
    for directory in directories:
        if (file := directory / "chat_template.jinja").is_file():
            return file.read_text(encoding="utf-8")
        if not (file := directory / "tokenizer_config.json").is_file():
            continue
        try:
            template = json.loads(file.read_bytes()).get("chat_template")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        if isinstance(template, list):  # several by name: for tools, for retrieval
            template = {str(one.get("name")): one.get("template") for one in template if isinstance(one, dict)}
            template = template.get("default")
        if isinstance(template, str):
            return template
    return None


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every string in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list | tuple) else value


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, and no texts that grow by one operation to the size of the memory."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Multiplies and formats within limits."""
        sequences = [one for one in (left, right) if isinstance(one, str | list | tuple)]
        if operator == "%" and sequences:
            raise TemplateRefused("the chat template formats with %, which is not supported")
        if operator == "*" and sequences:
            times = right if sequences[0] is left else left
            if isinstance(times, int) and times * len(sequences[0]) > _MAX_REPEAT:
                raise TemplateRefused(f"the chat template repeats a text beyond {_MAX_REPEAT} characters")
        if operator == "**" and abs(left) ** min(abs(right), 64) > 2**64:
            raise TemplateRefused(f"the chat template computes {left} ** {right}")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, by which trainers find the assistant's words: just what is inside."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own attribute, a set there

    def parse(self, parser: Parser) -> list[Node]:
        """The nodes inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Deadline:
    """Ends a program of this thread after some seconds, even one that loops without writing anything.

    Jinja compiles templates to Python, whose tracing calls us at every line of it.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._seconds = seconds

    def __enter__(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._previous)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None  # Jinja's own functions, which end
        if time.monotonic() > self._end:
            raise TemplateRefused(f"the chat template took longer than {self._seconds:g} s")
        return self._trace


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefused(f"the chat template refuses the conversation: {message}")


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As templates are written for: no escapes for HTML, which Jinja's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
