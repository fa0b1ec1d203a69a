"""The fields that completions and chats have in common: how tokens are drawn, where the text stops, its form."""

import json
import re
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmlab.infer.sampling import Sampling
from llmlab.infer.server.errors import invalid
from llmlab.infer.server.fields import Fields, shown

if TYPE_CHECKING:
    from llmlab.infer.constraints import Constraint

_MAX_STOPS, _MAX_STOP_LENGTH = 16, 1024
_MAX_BIASED = 1024
_MAX_GRAMMAR = 64 * 1024


def sampling_of(fields: Fields, logprobs: int | None, vocab_size: int) -> Sampling:
    """How tokens are drawn. Without a seed every request gets one of its own."""
    temperature = fields.number("temperature", 1.0, 0, 2)
    top_p = fields.number("top_p", None, 0, 1)
    top_k = fields.integer("top_k", None, -1, 2**31 - 1)
    top_k = None if top_k in (-1, 0) else top_k  # both say "all" in interfaces that have the field
    if top_p == 0:
        top_k, top_p = 1, None  # the smallest set that has any mass
    seed = fields.integer("seed", None, -(2**63), 2**64 - 1)
    min_p = fields.number("min_p", None, 0, 1)
    repetition = fields.number("repetition_penalty", 1.0, 0.01, 100)
    presence = fields.number("presence_penalty", 0.0, -2, 2)
    frequency = fields.number("frequency_penalty", 0.0, -2, 2)
    bias = _bias(fields, vocab_size)
    assert temperature is not None and repetition is not None and presence is not None and frequency is not None
    try:
        return Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=bias,
            seed=secrets.randbits(63) if seed is None else seed % 2**64,
            logprobs=logprobs,
        )
    except ValueError as error:
        raise invalid(str(error)) from None


def _bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    inside = fields.take("logit_bias")
    if inside is None:
        return ()
    if not isinstance(inside, dict) or len(inside) > _MAX_BIASED:
        raise fields.wrong("logit_bias", f"an object of at most {_MAX_BIASED} tokens", inside)
    pairs: dict[int, float] = {}
    for name, value in inside.items():
        if not re.fullmatch("0|[1-9][0-9]{0,8}", name) or int(name) >= vocab_size:
            raise invalid(f"logit_bias names {shown(name)}; tokens are the ids 0 to {vocab_size - 1}", "logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise invalid(f"logit_bias adds {shown(value)}; numbers from -100 to 100 are taken", "logit_bias")
        pairs[int(name)] = float(value)
    return tuple(pairs.items())


def stops_of(fields: Fields, vocab_size: int) -> tuple[tuple[str, ...], tuple[int, ...], bool]:
    """Stop strings, stop tokens, and whether the end-of-sequence token ends the text."""
    strings = fields.texts("stop", max_count=_MAX_STOPS, max_length=_MAX_STOP_LENGTH)
    if "" in strings:
        raise invalid("a stop string is empty and would end every text at once; leave it out", "stop")
    ids = fields.take("stop_token_ids") or []
    if not isinstance(ids, list) or len(ids) > 1024 or not all(is_token(one, vocab_size) for one in ids):
        raise fields.wrong("stop_token_ids", f"a list of token ids below {vocab_size}", ids)
    return strings, tuple(ids), not fields.boolean("ignore_eos", False)


def is_token(value: Any, vocab_size: int) -> bool:
    """Whether a JSON value is the id of a token."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def constraint_of(fields: Fields) -> "Constraint | None":
    """The form that the text must have: response_format, or one of the guided_* fields; None for any."""
    asked = {
        "response_format": _response_format(fields.inside("response_format")),
        "guided_json": _guided_json(fields),
        "guided_regex": _guided_regex(fields),
        "guided_choice": _guided_choice(fields),
        "guided_grammar": _guided_grammar(fields),
    }
    given = {name: form for name, form in asked.items() if form is not None}
    if len(given) > 1:
        raise invalid(f"{' and '.join(given)} each give the text a form; give one of them")
    return next(iter(given.values()), None)


def _response_format(fields: Fields | None) -> "Constraint | None":
    if fields is None:
        return None
    kind = fields.text("type", max_length=32, choices=("text", "json_object", "json_schema"))
    inside = fields.inside("json_schema")
    fields.done()
    if kind is None:
        raise invalid("response_format needs a type: text, json_object or json_schema", "response_format.type")
    if (kind == "json_schema") != (inside is not None):
        raise invalid("response_format.json_schema belongs to the type json_schema", "response_format.json_schema")
    if kind == "text":
        return None
    if inside is None:
        return _schema({"type": "object"}, "response_format")
    inside.text("name", max_length=64)
    inside.ignore("description", "strict")  # the text always follows the schema
    schema = inside.take("schema")
    inside.done()
    if not isinstance(schema, dict):
        raise inside.wrong("schema", "a JSON schema, an object", schema)
    return _schema(schema, "response_format.json_schema.schema")


def _guided_json(fields: Fields) -> "Constraint | None":
    schema = fields.take("guided_json")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise invalid("guided_json is a string that is not JSON", "guided_json") from None
    if schema is None:
        return None
    if not isinstance(schema, dict):
        raise fields.wrong("guided_json", "a JSON schema, an object", schema)
    return _schema(schema, "guided_json")


def _schema(schema: Mapping[str, Any], param: str) -> "Constraint":
    from llmlab.infer.constraints import JsonSchema

    if len(json.dumps(schema)) > _MAX_GRAMMAR:
        raise invalid(f"the schema has more than {_MAX_GRAMMAR} characters", param)
    return JsonSchema.of(schema)


def _guided_regex(fields: Fields) -> "Constraint | None":
    from llmlab.infer.constraints import Regex

    pattern = fields.text("guided_regex", max_length=_MAX_GRAMMAR)
    return None if pattern is None else Regex(pattern)


def _guided_choice(fields: Fields) -> "Constraint | None":
    from llmlab.infer.constraints import Regex

    choices = fields.texts("guided_choice", max_count=1024, max_length=1024)
    return Regex("|".join(map(re.escape, choices))) if choices else None


def _guided_grammar(fields: Fields) -> "Constraint | None":
    from llmlab.infer.constraints import Grammar

    grammar = fields.text("guided_grammar", max_length=_MAX_GRAMMAR)
    return None if grammar is None else Grammar(grammar)
