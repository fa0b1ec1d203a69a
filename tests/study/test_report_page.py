"""The page itself: self-contained, escaped, readable by everyone, and as a real browser shows it."""

import base64
import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from llmlab.study.report import ablation_page, sweep_page
from tests.study import synthetic_results, test_report_ablation, test_report_sweep
from tests.study.reading import Node, parse

CASES: dict[str, Callable[[], str]] = {
    f"{kind}, {name}": functools.partial(render, results)
    for kind, render, cases in (
        ("ablation", ablation_page.render, test_report_ablation.CASES),
        ("sweep", sweep_page.render, test_report_sweep.CASES),
    )
    for name, results in cases.items()
}

# What a link, an image or a style can load from.
LOADING = {
    "src",
    "href",
    "srcset",
    "action",
    "formaction",
    "poster",
    "data",
    "background",
    "ping",
    "cite",
    "xlink:href",
}


@pytest.fixture(params=CASES)
def source(request: pytest.FixtureRequest) -> str:
    return CASES[request.param]()


def test_page_loads_nothing(source: str) -> None:
    page = parse(source)
    for node in page.walk():
        for name, value in node.attributes.items():
            if name in LOADING:
                assert (value or "").startswith(("data:,", "#")), (node.tag, name, value)
            assert not name.startswith("on"), f"<{node.tag}> has a handler {name}"
            if name == "style":
                assert "url(" not in (value or "")
        assert node.tag not in ("iframe", "object", "embed", "base", "form", "img", "video", "audio")
        if node.tag == "meta":
            assert node.attributes.get("http-equiv") in (None, "Content-Security-Policy")
    style = page.one("style").children[0]
    assert isinstance(style, str)
    assert not re.search(r"url\(|@import|@font-face|https?:", style)
    anchors = {(link.attributes["href"] or "").removeprefix("#") for link in page.all("a")}
    ids = [node.attributes["id"] for node in page.walk() if "id" in node.attributes]
    assert anchors <= set(ids)
    assert len(ids) == len(set(ids))


def test_only_the_page_s_own_script_may_run(source: str) -> None:
    page = parse(source)
    (script,) = page.all("script")
    code = script.children[0]
    assert isinstance(code, str)
    assert code == files("llmlab.study.report").joinpath("page.js").read_text(encoding="utf-8").strip()
    policy = next(meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes) or ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert policy == (f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'")
    assert len(page.all("style")) == 1


def test_page_is_valid_and_accessible(source: str) -> None:
    assert source.startswith("<!DOCTYPE html>\n")
    page = parse(source)
    assert page.attributes["lang"] == "en"
    assert page.one("head").one("title").text.strip()
    assert len(page.all("h1")) == len(page.all("main")) == 1
    for part in page.all("section"):
        assert part.one("h2").attributes["id"] == part.attributes["aria-labelledby"]
    for drawn in page.all("svg"):
        named = drawn.attributes.get("role") == "img" and drawn.attributes.get("aria-label")
        inside = any(drawn in outer.walk() and drawn is not outer for outer in page.all("svg"))
        assert named or drawn.attributes.get("aria-hidden") == "true" or inside
    for found in page.all("table"):
        children = [child for child in found.children if isinstance(child, Node)]
        assert [child.tag for child in children] == ["caption", "thead", "tbody"]
        assert children[0].text.strip()
        assert all(head.attributes.get("scope") == "col" and head.text.strip() for head in children[1].all("th"))
        assert all(row.all("th")[0].attributes.get("scope") == "row" for row in children[2].all("tr"))
    for figure in page.all("figure"):
        tags = [child.tag for child in figure.children if isinstance(child, Node)]
        assert tags.count("figcaption") <= 1
        assert "figcaption" not in tags[:-1]
    for terms in page.all("dl"):
        tags = [child.tag for child in terms.children if isinstance(child, Node)]
        assert set(tags) <= {"div"} or tags == ["dt", "dd"] * (len(tags) // 2)
    phrasing = {"p", "h1", "h2", "h3", "span", "dt", "caption", "code", "small", "strong", "b", "summary", "data"}
    blocks = {"div", "p", "table", "ul", "dl", "figure", "section", "pre", "details", "h1", "h2"}
    for outer in page.walk():
        if outer.tag in phrasing:
            assert not {inner.tag for inner in outer.walk() if inner is not outer} & blocks


def test_verdicts_are_told_by_word_and_shape_as_well_as_by_colour() -> None:
    page = parse(CASES["ablation, three"]())
    chips = list(page.all("span", class_="verdict"))
    assert {chip.text for chip in chips} == {"supported", "refuted", "inconclusive"}
    style = files("llmlab.study.report").joinpath("page.css").read_text(encoding="utf-8")
    assert ".verdict.refuted::before { border-radius: 0" in style
    assert ".verdict.inconclusive::before { background: none" in style


def _palettes() -> dict[str, dict[str, str]]:
    style = files("llmlab.study.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark, paper = (
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\n? *\}", style, re.S)
    )
    return {"light": light, "dark": dark, "print": paper}


def _luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", ["light", "dark", "print"])
def test_contrast_is_enough(theme: str) -> None:
    """WCAG 2.2, 1.4.3 (text: 4.5 to 1) and 1.4.11 (what a figure is read by: 3 to 1)."""
    colors = _palettes()[theme]

    def contrast(front: str, back: str) -> float:
        low, high = sorted(_luminance(colors[name]) for name in (front, back))
        return (high + 0.05) / (low + 0.05)

    pairs = {
        (front, back): contrast(front, back)
        for front in ("ink", "soft", "good", "bad", "open")
        for back in ("paper", "card", "wash")
    }
    pairs |= {(tone, f"{tone}-wash"): contrast(tone, f"{tone}-wash") for tone in ("good", "bad", "open")}
    pairs |= {("ink", wash): contrast("ink", wash) for wash in ("good-wash", "bad-wash", "open-wash")}
    pairs |= {(f"c{i}", "paper"): contrast(f"c{i}", "paper") for i in range(7)}
    marks = {(tone, "good-wash"): contrast(tone, "good-wash") for tone in ("good", "bad", "open", "ink")}
    assert {pair: round(value, 2) for pair, value in pairs.items() if value < 4.5} == {}
    assert {pair: round(value, 2) for pair, value in marks.items() if value < 3} == {}


# --- in a real browser -----------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


def browse(page: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    command = [
        *(CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
        *("--enable-logging=stderr", "--v=0", f"--user-data-dir={folder / 'profile'}", *flags, path.as_uri()),
    ]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=180, check=True, cwd=folder
    )


def said_to_console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line or "Uncaught" in line]


@pytest.mark.scale
@in_browser
@pytest.mark.parametrize("name", ["ablation, hostile", "ablation, factorial", "sweep, hostile", "sweep, usual"])
def test_browser_reads_the_page_as_it_was_written(name: str, tmp_path: Path) -> None:
    """With its script kept out, the browser's tree is the parser's: nothing was moved, closed or dropped."""
    source = re.sub("script-src &#x27;sha256-.*?&#x27;", "script-src &#x27;none&#x27;", CASES[name]())
    done = browse(source, tmp_path, "--dump-dom")
    assert ["Content Security Policy" in line for line in said_to_console(done)] == [True]  # the script, kept out
    assert parse(done.stdout).structure() == parse(source).structure()


@in_browser
@pytest.mark.parametrize("name", ["ablation, hostile", "sweep, usual"])
def test_browser_runs_the_page_s_script_without_complaint_and_nothing_else(name: str, tmp_path: Path) -> None:
    done = browse(CASES[name](), tmp_path, "--dump-dom")
    assert said_to_console(done) == []
    page = parse(done.stdout)
    assert page.all("div", class_="readout")  # the script ran: curves can be read off
    sortable = page.all("table", class_="sortable")
    assert all(head.all("button") for found in sortable for head in found.one("thead").all("th"))
    assert len(page.all("script")) == 1


def probed(source: str, script: str) -> str:
    """The page with a script of the test, which needs the policy taken away."""
    without = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    return without.replace("</body>", f"<script>{script}</script></body>")


@in_browser
def test_a_reader_can_sort_tables_and_read_curves_off(tmp_path: Path) -> None:
    """Clicks and points as a reader would; what the page then shows is compared with the results."""
    results = test_report_sweep.CASES["usual"]
    script = """
        const table = document.querySelector("#best table");
        const head = table.tHead.rows[0].cells[2];
        const column = () => [...table.tBodies[0].rows].map(row => row.cells[2].querySelector("data").value).join(" ");
        head.querySelector("button").click();
        const up = column();
        head.querySelector("button").click();
        const area = document.querySelector("#curves .area"), box = area.getBoundingClientRect();
        area.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + box.width, clientY: box.top + 9}));
        const read = area.querySelector(".readout").innerText.replaceAll("\\n", ";");
        document.title = [up, column(), head.getAttribute("aria-sort"), read].join("|");
    """
    done = browse(probed(CASES["sweep, usual"](), script), tmp_path, "--dump-dom")
    assert said_to_console(done) == []
    up, down, told, read = parse(done.stdout).one("head").one("title").text.split("|")
    best = test_report_sweep.finished(results)[:15]
    rates = sorted(trial["point"]["optimizer.peak_lr"] for trial in best)
    assert [float(rate) for rate in up.split()] == rates
    assert [float(rate) for rate in down.split()] == rates[::-1]
    assert told == "descending"
    first, *lines = read.split(";")
    assert first == "optimizer step 600"
    shown = {line.rpartition(" ")[0].strip(): float(line.rpartition(" ")[2]) for line in lines}
    assert shown == {
        f"trial {trial['number']}": pytest.approx(trial["curve"]["value"][-1], rel=1e-4) for trial in best[:4]
    }


@in_browser
def test_a_script_that_slipped_in_would_not_run(tmp_path: Path) -> None:
    """The policy is a second wall: with escaping taken away, the browser still refuses."""
    broken = CASES["ablation, one"]().replace("<main>", "<main><script>document.title = 'broken in'</script>")
    done = browse(broken, tmp_path, "--dump-dom")
    assert "broken in" not in parse(done.stdout).one("head").one("title").text
    assert any("Content Security Policy" in line for line in said_to_console(done))


SIZES = {"desktop": (1280, 1600), "phone": (500, 1600)}  # 500: Chromium's narrowest window


@in_browser
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["ablation, three", "sweep, usual"])
@pytest.mark.scale
def test_screenshots_have_the_theme_and_no_sideways_scrolling(name: str, theme: str, size: str, tmp_path: Path) -> None:
    from matplotlib.image import imread

    width, height = SIZES[size]
    flags = [f"--window-size={width},{height}", f"--screenshot={tmp_path / 'shot.png'}"]
    if theme == "dark":
        flags.append("--blink-settings=preferredColorScheme=0")
    probe = "document.title = document.documentElement.scrollWidth"
    assert said_to_console(browse(CASES[name](), tmp_path, *flags)) == []
    image = imread(tmp_path / "shot.png")
    assert image.shape[:2] == (height, width)
    background = _palettes()[theme]["paper"]
    expected = [int(background[i : i + 2], 16) for i in (1, 3, 5)]
    corner = (image[2, 2, :3] * 255).round().astype(int).tolist()
    assert corner == expected
    assert image[:, :, :3].std() > 0.05  # something is drawn
    done = browse(probed(CASES[name](), probe), tmp_path, f"--window-size={width},{height}", "--dump-dom")
    assert int(parse(done.stdout).one("head").one("title").text) <= width


def test_every_case_of_ablations_renders_from_json_alone(tmp_path: Path) -> None:
    results: dict[str, Any] = synthetic_results.factorial()
    assert ablation_page.render(json.loads(json.dumps(results))) == ablation_page.render(results)
