"""Reading a JSON body field by field: what is there, what type it has, and what nobody asked for.

Null is absence, as in the OpenAI interface. A field that is not taken at the end is a mistake: a misspelt `temprature`
that is silently ignored costs an experiment.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmlab.infer.server.errors import ApiError, invalid

_SURROGATE = re.compile("[\ud800-\udfff]")


class Fields:
    """The fields of an object, each to be taken once."""

    def __init__(self, body: Any, where: str = "") -> None:
        """`where` is the path of the object inside the body, for messages: `response_format.`."""
        if not isinstance(body, dict):
            raise invalid(
                f"{where.rstrip('.') or 'the body'} must be a JSON object, not {kind_of(body)}", where or None
            )
        self._left = dict(body)
        self._where = where
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """The field's value, None where it is absent or null."""
        self._known.append(name)
        return self._left.pop(name, None)

    def path(self, name: str) -> str:
        """The field's name as messages have it."""
        return self._where + name

    def boolean(self, name: str, default: bool) -> bool:
        """A truth value."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false", value)
        return value

    def integer(self, name: str, default: int | None, low: int, high: int) -> int | None:
        """A whole number from low to high."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_whole(value):
            raise self.wrong(name, "an integer", value)
        return int(self._within(name, value, low, high))

    def number(self, name: str, default: float | None, low: float, high: float) -> float | None:
        """A number from low to high."""
        value = self.take(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number", value)
        return float(self._within(name, value, low, high))

    def text(self, name: str, *, max_length: int, choices: Sequence[str] | None = None) -> str | None:
        """A string, one of the choices where there are some."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            raise self.wrong(name, "a string", value)
        if choices is not None and value not in choices:
            raise invalid(f"{self.path(name)} must be one of {', '.join(choices)}, not {shown(value)}", self.path(name))
        if len(value) > max_length:
            raise invalid(
                f"{self.path(name)} has {len(value)} characters; at most {max_length} are taken", self.path(name)
            )
        return value

    def texts(self, name: str, *, max_count: int, max_length: int) -> tuple[str, ...]:
        """A string or a list of strings."""
        value = self.take(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise self.wrong(name, "a string or a list of strings", value)
        if len(values) > max_count or any(len(one) > max_length for one in values):
            raise invalid(
                f"{self.path(name)} takes at most {max_count} strings of at most {max_length} characters",
                self.path(name),
            )
        return tuple(values)

    def inside(self, name: str) -> "Fields | None":
        """The fields of an object in a field."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name) + ".")

    def refuse(self, name: str, why: str, neutral: Sequence[Any] = ()) -> None:
        """A field of the interface that would change the answer, and that this server does not have.

        Absent, null, false, empty and the `neutral` values ask for nothing, and pass.
        """
        value = self.take(name)
        if value and value not in neutral:
            raise invalid(f"{self.path(name)} is not supported: {why}", self.path(name), "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Fields of the interface that change nothing in the answer."""
        for name in names:
            self.take(name)

    def done(self) -> None:
        """Raises an ApiError for the first field that nobody took."""
        for name in self._left:
            near = difflib.get_close_matches(name, self._known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            path = shown(self.path(name))
            raise invalid(f"unknown parameter {path}{hint}", self.path(name)[:200], "unknown_parameter")

    def wrong(self, name: str, wanted: str, value: Any) -> ApiError:
        """The error for a field of the wrong type."""
        return invalid(
            f"{self.path(name)} must be {wanted}, not {kind_of(value)} ({shown(value)})",
            self.path(name),
            "invalid_type",
        )

    def _within(self, name: str, value: float, low: float, high: float) -> float:
        if not low <= value <= high:
            raise invalid(
                f"{self.path(name)} must be from {low} to {high}, not {shown(value)}", self.path(name), "invalid_value"
            )
        return value


def is_whole(value: float) -> bool:
    """Whether a number has no fraction: 3 and 3.0 are integers of JSON alike."""
    return isinstance(value, int) or value.is_integer()


def kind_of(value: Any) -> str:
    """The JSON type of a value, with its article."""
    if value is None:
        return "null"
    names: Mapping[type, str] = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "something else")


def shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parse_json(raw: bytes) -> Any:
    """A body's JSON, strictly: no NaN, no lone surrogates, no nesting beyond the parser's depth.

    Raises:
        ApiError: it is not that; status 400.
    """

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        if b"\\u" in raw and _SURROGATE.search(json.dumps(body, ensure_ascii=False)):
            raise ValueError("a string has a lone surrogate, which is no Unicode")
    except RecursionError:
        raise invalid("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    return body
