"""Markdown as GitHub renders it, in which data cannot become markup."""

import re
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#!$^&])")
# What GitHub links by itself, cut by an invisible space: a name may not become a link that somebody clicks.
_LINKS = (("://", ":&#8203;//"), ("www.", "www&#8203;."), ("@", "@&#8203;"))
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def escape(text: str) -> str:
    """A text on one line, that shows as it is."""
    plain = " ".join(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).split())
    plain = _SPECIAL.sub(r"\\\1", plain)
    for link, broken in _LINKS:
        plain = plain.replace(link, broken)
    return re.sub(r"^([-+]|\d+[.)])(?=\s)", r"\\\1", plain)


def code(text: str) -> str:
    """A text in a code span, on one line; fit for a table's cell."""
    plain = " ".join(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text).split()) or " "
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    room = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{room}{plain}{room}{fence}".replace("|", "\\|")


def block(text: str) -> str:
    """A text in a code block."""
    plain = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    fence = "`" * max(3, max(map(len, re.findall("`+", plain)), default=0) + 1)
    return f"{fence}\n{plain}\n{fence}"


def table(heads: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Args:
        heads: (title, whether the column holds numbers) of each column; titles are escaped.
        rows: cells, escaped by the caller.
    """
    lines = [
        "| " + " | ".join(escape(title) for title, _ in heads) + " |",
        "| " + " | ".join("---:" if numeric else "---" for _, numeric in heads) + " |",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
