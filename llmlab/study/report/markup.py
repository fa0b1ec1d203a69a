"""HTML as a tree of function calls, in which data cannot become markup.

    element("p", "names may hold <script>", element("strong", name), class_="note")

An ordinary string is text and is escaped; only what `element` returned is `Html` and stands as it is. So forgetting to
escape is not possible, and `Html(...)` around a string is the one thing to look for in a review.
"""

from collections.abc import Iterable
from html import escape
from typing import Any, TypeAlias

from llmlab.study.report.numbers import Shown

_VOID = {"br", "col", "hr", "img", "input", "link", "meta"}


class Html(str):
    """A string that is markup already."""

    __slots__ = ()


Content: TypeAlias = Html | str | Iterable[Any] | None
"""Markup as it stands, a text to escape, any of these after each other, or nothing."""


def element(tag: str, *children: Content, **attributes: "str | bool | None") -> Html:
    """One element.

    Args:
        tag: its name, from code.
        children: markup, texts to escape, or lists of them; None is nothing.
        attributes: texts to escape. `class_` and `for_` are `class` and `for`; other underscores are hyphens. True is
            an attribute without a value; None and False leave it out.
    """
    shown = "".join(_attribute(name, value) for name, value in attributes.items())
    opening = f"<{tag}{shown}>"
    if tag in _VOID:
        assert not children, f"<{tag}> has no content"
        return Html(opening)
    return Html(f"{opening}{joined(*children)}</{tag}>")


def joined(*children: Content) -> Html:
    """Markup and texts after each other."""
    parts = []
    for child in children:
        if isinstance(child, Html):
            parts.append(str(child))
        elif isinstance(child, Shown):
            parts.append(f'<data value="{child.value!r}">{escape(child)}</data>')
        elif isinstance(child, str):
            parts.append(escape(_printable(child), quote=False))
        elif child is not None:
            parts.append(str(joined(*child)))
    return Html("".join(parts))


def _attribute(name: str, value: "str | bool | None") -> str:
    name = name.removesuffix("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(_printable(value))}"'


def _printable(text: str) -> str:
    """Without the characters that HTML forbids even as references: controls and lone surrogates."""
    return "".join("\N{REPLACEMENT CHARACTER}" if _forbidden(ord(char)) else char for char in text)


def _forbidden(code: int) -> bool:
    control = code < 0x20 and code not in (0x09, 0x0A, 0x0D)
    return control or 0x7F <= code <= 0x9F or 0xD800 <= code <= 0xDFFF or code & 0xFFFE == 0xFFFE
