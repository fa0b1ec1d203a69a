"""Reads reports back as a stranger would: HTML to a tree by Python's own parser, tables to rows, Markdown too."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

VOID = {"br", "col", "hr", "img", "input", "link", "meta"}
MINUS = "\N{MINUS SIGN}"


@dataclass
class Node:
    """An element of a page."""

    tag: str
    attributes: dict[str, str | None]
    children: "list[Node | str]" = field(default_factory=list)

    def walk(self) -> "Iterator[Node]":
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def all(self, tag: str, **attributes: str) -> "list[Node]":
        """Elements with this tag, and these words among these attributes."""
        return [
            node
            for node in self.walk()
            if node.tag == tag
            and all(word in (node.attributes.get(name.rstrip("_")) or "").split() for name, word in attributes.items())
        ]

    def one(self, tag: str, **attributes: str) -> "Node":
        (found,) = self.all(tag, **attributes)
        return found

    def by_id(self, name: str) -> "Node":
        (found,) = [node for node in self.walk() if node.attributes.get("id") == name]
        return found

    @property
    def text(self) -> str:
        """What is read, without style and script."""
        parts = [
            child if isinstance(child, str) else "" if child.tag in ("style", "script") else child.text
            for child in self.children
        ]
        return "".join(parts)

    @property
    def numbers(self) -> list[float]:
        """The exact numbers that it offers."""
        return [float(node.attributes["value"] or "") for node in self.all("data")]

    def structure(self) -> Any:
        """Tags and attributes alone, for comparison with another parser's tree."""
        children = [child.structure() for child in self.children if isinstance(child, Node)]
        return (self.tag, sorted((name, value or "") for name, value in self.attributes.items()), children)


class _Strict(HTMLParser):
    """Refuses what is not closed in the order in which it was opened."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(page: str) -> Node:
    """The tree of a page; raises AssertionError where it is not well-formed."""
    parser = _Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == [parser.root], f"<{parser.open[-1].tag}> is never closed"
    (html,) = (child for child in parser.root.children if isinstance(child, Node))
    return html


def table(node: Node) -> dict[str, dict[str, Node]]:
    """A table's cells by row head and column head."""
    columns = [head.text for head in node.one("thead").all("th")]
    rows = {}
    for row in node.one("tbody").all("tr"):
        cells = [child for child in row.children if isinstance(child, Node)]
        assert [cell.tag for cell in cells] == ["th"] + ["td"] * (len(columns) - 1)
        rows[cells[0].text] = dict(zip(columns, cells, strict=True))
    return rows


def agrees(shown: str, value: float) -> bool:
    """Whether a text is this number, rounded to the decimals that it shows."""
    plain = shown.replace(MINUS, "-").strip()
    decimals = len(plain.partition(".")[2])
    return abs(float(plain) - value) <= 0.5000001 * 10.0**-decimals


def numbers_in(text: str) -> list[float]:
    """Every number that a text shows."""
    found = re.findall(rf"(?<![\w.])[-+{MINUS}]?\d+\.?\d*(?:e-?\d+)?", text)
    return [float(number.replace(MINUS, "-")) for number in found]


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The cells of every table, heads first, without the rule."""
    tables, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            cells = [unescaped(cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            current.append(cells)
        elif current:
            tables.append([row for place, row in enumerate(current) if place != 1])
            current = []
    return tables


def unescaped(markdown: str) -> str:
    """Text that Markdown shows."""
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", markdown.replace("&#8203;", ""))
