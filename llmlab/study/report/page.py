"""The page around a report: one file of HTML that needs nothing else, today or in ten years.

Style, script and figures are inside; there is nothing to load, and a content security policy forbids it. The script
only adds comforts (values under the pointer, tables that sort): it is allowed by its hash, so that even markup that had
slipped through from data could not run. Reads in light and dark, on paper, on a phone, and aloud.
"""

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from typing import Any

from llmlab.study.report.markup import Content, Html, element, joined

Cell = Any
"""What a table's cell holds: markup, a text, or a list of them."""


def page(title: str, *content: Content, foot: Content) -> str:
    """The whole document."""
    style, script = _resource("page.css"), _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(style)),
    )
    body = element(
        "body",
        element("main", *content),
        element("footer", foot, class_="foot"),
        element("script", Html(script)),
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def section(title: str, *content: Content, anchor: str) -> Html:
    """A part of the page with a heading, on a new line of the file."""
    heading = element("h2", title, id=f"{anchor}-title")
    return Html("\n" + element("section", heading, *content, id=anchor, aria_labelledby=f"{anchor}-title"))


def table(
    heads: Sequence[tuple[str, bool]],
    rows: Iterable[tuple[Sequence[Cell], str]],
    *,
    caption: str,
    sortable: bool = False,
) -> Html:
    """A table whose first column names its rows.

    Args:
        heads: (title, whether the column holds numbers) of each column.
        rows: (cells, class of the row) of each row.
        caption: what the table shows; read aloud first.
        sortable: whether a reader may sort it by a click on a head.
    """
    head = element("tr", *(element("th", title, scope="col", class_=_numeric(is_n)) for title, is_n in heads))
    body = []
    for cells, class_ in rows:
        first, *rest = cells
        numeric = [is_n for _, is_n in heads[1:]]
        row = [
            element("th", first, scope="row", class_=_numeric(heads[0][1])),
            *(element("td", cell, class_=_numeric(is_n)) for cell, is_n in zip(rest, numeric, strict=True)),
        ]
        body.append(Html("\n" + element("tr", *row, class_=class_ or None)))
    content = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
        class_="sortable" if sortable else None,
    )
    # Focusable, so that a table wider than the screen can be scrolled from the keyboard.
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def facts(pairs: Iterable[tuple[str, Cell]]) -> Html:
    """Names and values in a row."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs), class_="facts"
    )


def tree(value: Mapping[str, Any]) -> Html:
    """Nested values, as provenance holds them: long texts and groups folded."""
    rows: list[Html] = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            content = _folded(", ".join(map(str, item)), tree(item))
        elif isinstance(item, list) and any(isinstance(part, Mapping | list) for part in item):
            content = _folded(f"{len(item)} entries", tree({str(place): part for place, part in enumerate(item)}))
        elif isinstance(item, str) and "\n" in item:
            content = _folded(f"{len(item.splitlines())} lines", element("pre", item))
        else:
            content = joined(plain(item))
        rows += [element("dt", key), element("dd", content)]
    return element("dl", *rows, class_="tree")


def plain(value: Any) -> str:
    """A value of JSON as a reader would write it: texts bare, lists with commas, numbers as Python does."""
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return ", ".join(map(plain, value)) if value else "none"
    named = str(value.get("type", "")).rpartition(".")[2]
    inner = ", ".join(f"{key}={plain(item)}" for key, item in value.items() if key != "type")
    return f"{named}({inner})" if named else f"{{{inner}}}"


def folded(summary: str, *content: Content) -> Html:
    """Content that a reader opens."""
    return Html("\n" + element("details", element("summary", summary), *content))


def alert(title: str, *content: Content, note: bool = False) -> Html:
    """What must not be overlooked."""
    return element("div", element("strong", title), *content, class_="alert note" if note else "alert", role="note")


def code(text: str) -> Html:
    """A command to copy."""
    return element("pre", element("code", text))


def moment(date: str) -> Html:
    """A date of ISO 8601, to the minute; any other text as it is."""
    try:
        when = datetime.fromisoformat(date)
    except ValueError:
        return element("span", date)
    shown = f"{when:%Y-%m-%d %H:%M}" if "T" in date else f"{when:%Y-%m-%d}"
    return element("time", f"{shown} {when.tzname() or ''}".rstrip(), datetime=date)


def problems(found: Iterable[Any]) -> Html | None:
    """The section on what is wrong with the study's runs; None where nothing is."""
    items = [element("li", joined(plain(problem))) for problem in found]
    if not items:
        return None
    return section(
        "Problems",
        element("p", "Nothing of these is in any mean, interval or figure.", class_="lede"),
        element("ul", *items, class_="notes"),
        anchor="problems",
    )


def _folded(summary: str, content: Html) -> Html:
    summary = summary if len(summary) <= 80 else f"{summary[:79]}\N{HORIZONTAL ELLIPSIS}"
    return element("details", element("summary", summary), content)


def _numeric(is_numeric: bool) -> str | None:
    return "n" if is_numeric else None


def _resource(name: str) -> str:
    return files("llmlab.study.report").joinpath(name).read_text(encoding="utf-8").strip()
