"""Escaping, and the small texts of a report: numbers, markup, Markdown, LaTeX."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.study.report import ablation, ablation_page, latex, markdown, numbers
from llmlab.study.report.markup import Html, element, joined
from llmlab.study.report.page import plain
from tests.study import synthetic_results
from tests.study.reading import MINUS, agrees, parse, unescaped
from tests.study.test_report_ablation import HOSTILE


@given(st.text())
def test_text_comes_back_from_markup_as_it_was(text: str) -> None:
    page = parse(element("p", text, title=text, data_x=text))
    allowed = "".join(
        "\N{REPLACEMENT CHARACTER}" if (_is_control(c) and c not in "\t\n\r") or ord(c) & 0xFFFE == 0xFFFE else c
        for c in text
    )
    assert page.text == allowed
    assert page.attributes == {"title": allowed, "data-x": allowed}
    assert len(list(page.walk())) == 1


def test_markup_is_kept_and_nothing_is_nothing() -> None:
    assert joined(["a<b", [Html("<br>")], None]) == "a&lt;b<br>"
    assert element("input", disabled=True, hidden=None, class_="x") == '<input disabled class="x">'
    assert element("b", numbers.fixed(1 / 3, 2)) == f'<b><data value="{1 / 3!r}">0.33</data></b>'


@given(st.floats(-1e6, 1e6), st.integers(0, 6))
def test_numbers_are_rounded_and_remember_what_they_are(value: float, decimals: int) -> None:
    for shown in (numbers.fixed(value, decimals), numbers.signed(value, decimals)):
        assert isinstance(shown, numbers.Shown)
        assert shown.value == value
        assert agrees(shown, value)
        assert "-" not in shown
    rounded = float(f"{value:.{decimals}f}")
    first = numbers.signed(value, decimals)[0]
    assert first == "+" if rounded > 0 else first == MINUS if rounded < 0 else first == "0"


@given(st.lists(st.floats(1e-5, 1e3), min_size=1, max_size=4))
def test_decimals_show_the_smallest_spread_to_two_digits(spreads: list[float]) -> None:
    decimals = numbers.decimals_for(spreads)
    smallest = min(spreads)
    assert 1 <= decimals <= 6
    if 2e-5 <= smallest < 9.4:
        digits = f"{smallest:.{decimals}f}".replace(".", "").lstrip("0")
        assert len(digits) in (2, 3)  # three where rounding carries


def test_numbers_of_other_kinds() -> None:
    assert [numbers.p_value(p) for p in (None, 0.0004, 0.0123, 0.0996, 0.5, 1.0)] == [
        "—", "< 0.001", "0.012", "0.10", "0.50", "1.00",
    ]  # fmt: skip
    assert [numbers.percent(x) for x in (0.0123, -0.5, 0.0)] == ["+1.2%", f"{MINUS}50%", "0%"]
    assert [numbers.general(x) for x in (3.0, -2.5, 3e-4, 1e-7, 123456.0)] == [
        "3",
        f"{MINUS}2.5",
        "0.0003",
        f"1e{MINUS}7",
        "1.235e5",
    ]
    assert [numbers.quantity(x) for x in (999, 10240, 7.7e12, 3.21e17)] == ["999", "10.2k", "7.7T", "3.21e17"]
    assert "".join(numbers.interval([None, 0.25], 2)) == f"[{MINUS}∞, +0.25]"
    assert numbers.interval(None, 2) == ["—"]


def test_values_of_configurations_are_written_as_python_would() -> None:
    assert plain({"type": "llmlab.nn.norms.RMSNorm", "epsilon": 1e-6}) == "RMSNorm(epsilon=1e-06)"
    assert plain({"a": [1, 2.5], "b": None, "c": True, "d": []}) == "{a=1, 2.5, b=none, c=true, d=none}"


def _is_control(char: str) -> bool:
    return ord(char) < 32 or 127 <= ord(char) < 160 or 0xD800 <= ord(char) < 0xE000


@given(st.text())
def test_text_comes_back_from_markdown_on_one_line(text: str) -> None:
    escaped = markdown.escape(text)
    assert "\n" not in escaped
    assert "|" not in escaped.replace("\\|", "")
    shown = unescaped(escaped)
    kept = "".join("\N{REPLACEMENT CHARACTER}" if _is_control(c) and c not in "\t\n\r" else c for c in text)
    assert shown == " ".join(kept.split())


def test_markdown_cannot_be_broken_out_of() -> None:
    assert markdown.escape("<img src=x> [a](http://b) www.c.d @e") == (
        "\\<img src=x\\> \\[a\\](http:&#8203;//b) www&#8203;.c.d @&#8203;e"
    )
    assert markdown.escape("- item") == "\\- item"
    assert markdown.escape("1. item") == "\\1. item"
    assert markdown.code("a`b|c") == "``a`b\\|c``"
    assert markdown.block("x\n```\ny").startswith("````\n")


def _balanced(text: str) -> bool:
    depth, previous = 0, ""
    for char in text:
        if previous != "\\":
            depth += (char == "{") - (char == "}")
        previous = "" if previous == "\\" else char
        if depth < 0:
            return False
    return depth == 0


@given(st.text())
def test_latex_has_no_special_character_of_the_text(text: str) -> None:
    escaped = latex.escape(text)
    assert escaped.isascii()
    assert "\n" not in escaped
    assert _balanced(escaped)
    assert not re.search(r"(?<!\\)[%&#_]", escaped)


def _documents() -> dict[str, dict[str, Any]]:
    sequential = synthetic_results.ablation({"a": 0.0, "b": -0.1}, mode="sequential")
    sequential["comparisons"][0] |= {"interval": [None, None], "difference": sequential["comparisons"][0]["difference"]}
    every = "".join(
        map(chr, [*range(32, 127), *range(160, 384), 0x3BB, 0x3A9, 0x4E2D, 0x1F600, 0x2212, 0x221E, 0x2014])
    )
    hostile = synthetic_results.ablation({every: 0.0}, hypothesis=HOSTILE + every, mode="exploratory")
    return {"usual": synthetic_results.ablation(), "sequential": sequential, "every character": hostile}


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
@pytest.mark.parametrize("name", _documents())
def test_table_compiles_with_booktabs_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(_documents()[name]))
    ablation.write(tmp_path)
    document = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\input{table.tex}\\end{document}\n"
    (tmp_path / "document.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "document.tex"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120, check=False
    )
    log = (tmp_path / "document.log").read_text(errors="replace")
    assert done.returncode == 0, log[-3000:]
    assert "Missing character" not in log
    assert "Output written on document.pdf (1 page" in log


def test_words_of_every_claim() -> None:
    said = {}
    for claim in ("no worse", "equal", "better", "worse"):
        for margin in (0.0, 0.01):
            results = synthetic_results.ablation(claim=claim, margin=margin)
            text = parse(ablation_page.render(results)).one("div", class_="answer").one("p").text
            said[claim, margin] = text.split("that it is ")[1].split(";")[0].rstrip(".")
    unit = "nats per token"
    assert said == {
        ("no worse", 0.0): "no worse than the baseline",
        ("no worse", 0.01): f"at most 0.01 {unit} worse than the baseline",
        ("equal", 0.0): f"within ±0 {unit} of the baseline",
        ("equal", 0.01): f"within ±0.01 {unit} of the baseline",
        ("better", 0.0): "better than the baseline",
        ("better", 0.01): f"better than the baseline by more than 0.01 {unit}",
        ("worse", 0.0): "worse than the baseline",
        ("worse", 0.01): f"worse than the baseline by more than 0.01 {unit}",
    }


def _answer(results: dict[str, Any]) -> str:
    return parse(ablation_page.render(results)).one("div", class_="answer").one("p").text


def test_words_of_what_cannot_be_said() -> None:
    results = synthetic_results.ablation()
    (comparison,) = results["comparisons"]
    comparison |= {"verdict": "inconclusive", "seeds_to_settle": None}
    assert _answer(results).endswith("worse than the baseline; no affordable number of seeds would.")
    comparison["seeds_to_settle"] = 14
    assert _answer(results).endswith("worse than the baseline; about 14 seeds would.")
    comparison |= {"difference": 0.0, "interval": [0.0, 0.0]}
    assert _answer(results).startswith("rmsnorm equals the baseline exactly on average over 5 seeds")
    comparison |= {"difference": -0.0004, "interval": [-2.6, 2.6]}  # three decimals would hide it
    assert _answer(results).startswith("rmsnorm is 0.0004 nats per token better than the baseline")
    withheld = results | {"withheld": True, "reason": "withheld: tokens differ by 12%"}
    assert "The verdict is withheld: tokens differ by 12%. Arms that do not match" in _answer(withheld)
    comparison |= {"difference": None, "interval": None, "reason": "no seed has a result in every arm"}
    assert _answer(results) == ("rmsnorm could not be compared with the baseline. No seed has a result in every arm.")


def test_log_scale_needs_positive_values() -> None:
    from llmlab.study.report.scales import Scale

    assert Scale.over([0.0, 1.0], log=True).log is False
    scale = Scale.over([1e-4, 1e-2], log=True)
    assert math.isclose(scale.at(1e-3), 0.5)
