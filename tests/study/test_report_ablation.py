"""An ablation's report says what results.json says: read back from HTML, Markdown and LaTeX, and compared."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmlab.study import report
from llmlab.study.report import ablation
from tests.selection import at_scale_but
from tests.study import synthetic_results
from tests.study.reading import MINUS, Node, agrees, markdown_tables, numbers_in, parse, table

HOSTILE = """<script>alert("x")</script> & 'quotes' 50% $x_1$ | `tick` *bold* \\ {brace} #1 ~ ^ λ é 中 --> </style>"""

THREE = {"rmsnorm": -0.002, "no norm at all": 0.05, "batchnorm": 0.009}


def cases() -> dict[str, dict[str, Any]]:
    higher = synthetic_results.ablation(claim="better", margin=0.0, direction="higher", random_seed=5)
    unlucky = synthetic_results.ablation(THREE, diverged={"no norm at all": [1, 3]}, mode="sequential")
    unlucky["comparisons"][0]["interval"] = [None, None]
    unlucky["comparisons"][0]["minimum_detectable_effect"] = None
    unlucky |= {"withheld": True, "reason": "withheld: tokens differ by 12%", "remarks": ["rate at the grid's edge"]}
    unlucky["problems"] = [{"directory": "runs/trials/0a", "reason": "summary.json disagrees with metrics.jsonl"}]
    hostile = synthetic_results.ablation({HOSTILE: -0.002}, hypothesis=HOSTILE, mode="exploratory")
    hostile |= {"metric": f"m{HOSTILE}", "unit": HOSTILE, "command": HOSTILE, "name": HOSTILE, "problems": [HOSTILE]}
    hostile["provenance"][HOSTILE] = {HOSTILE: HOSTILE + "\n" + HOSTILE}
    changed = {"type": HOSTILE, "x": [HOSTILE]}
    hostile["arms"][1]["changes"][0] = {"path": HOSTILE, "baseline": HOSTILE, "variant": changed}
    return {
        "one": synthetic_results.ablation(),
        "three": synthetic_results.ablation(THREE, rates=(1e-3, 3e-3, 1e-2)),
        "higher": higher,
        "unlucky": unlucky,
        "hostile": hostile,
        "factorial": synthetic_results.factorial(),
    }


CASES = cases()


def with_measures() -> dict[str, Any]:
    """Two numbers of every arm's runs, one of which the last arm lacks; of one seed, no spread is known."""
    results = synthetic_results.ablation(THREE)
    for place, arm in enumerate(results["arms"]):
        arm["measures"] = {HOSTILE: {"values": [0.5 + place, None], "mean": 0.5 + place, "std": None}}
        arm["measures"]["loss_at_4x"] = {"values": [3.25 + place, 3.75 + place], "mean": 3.5 + place, "std": 0.354}
    del results["arms"][-1]["measures"]["loss_at_4x"]
    return results


def test_what_was_measured_besides_is_a_table_of_its_own(tmp_path: Path) -> None:
    results = with_measures()
    (tmp_path / "results.json").write_text(json.dumps(results))
    ablation.write(tmp_path)
    page = parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = page.by_id("measures").one("tbody").all("tr")
    assert [row.numbers for row in rows] == [[0.5, 3.5, 0.354], [1.5, 4.5, 0.354], [2.5, 5.5, 0.354], [3.5]]
    assert HOSTILE in page.by_id("measures").one("thead").text
    cells = next(
        found for found in markdown_tables((tmp_path / "report.md").read_text()) if "loss_at_4x" in found[0][-1]
    )
    assert cells[1][0] == "baseline"
    assert numbers_in(cells[1][2]) == [3.5, 0.354]


@pytest.mark.scale
def test_without_measures_there_is_no_section_for_them(page: Node) -> None:
    assert [node for node in page.walk() if node.attributes.get("id") == "measures"] == []


@pytest.fixture(scope="module", params=at_scale_but(("three", "hostile", "factorial"), CASES))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """(results, the folder of their report)"""
    results = copy.deepcopy(CASES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "results.json").write_text(json.dumps(results))
    ablation.write(folder)
    return results, folder


@pytest.fixture
def page(written: tuple[dict[str, Any], Path]) -> Node:
    return parse((written[1] / "report.html").read_text(encoding="utf-8"))


def deciding(comparison: dict[str, Any]) -> float:
    """The p-value that its verdict rests on."""
    return comparison["p_against_holm"] if comparison["verdict"] == "refuted" else comparison["p_holm"]


def interval_of(row: Node) -> tuple[float, float]:
    """Ends of the thick line of a row of the forest plot, in thousandths of the axis."""
    drawn = re.match(r"M([\d.-]+) 440H([\d.-]+)", row.one("path", class_="ci").attributes["d"] or "")
    assert drawn is not None
    return float(drawn[1]), float(drawn[2])


def in_json(value: Any) -> set[float]:
    """Every number of a piece of JSON."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return set()
    if isinstance(value, int | float):
        return {float(value)}
    return set().union(*map(in_json, value.values() if isinstance(value, dict) else value))


def test_writes_the_files_that_it_names(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    names = {"report.html", "report.md", "table.tex", "curves.png", "effects.png"}
    names |= {"interaction.png"} if results["factorial"] else set()
    assert {path.name for path in folder.iterdir()} == names | {"results.json"}
    assert {path.name for path in report.write(folder)} == names  # the same by kind
    for figure in folder.glob("*.png"):
        assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_comparisons_of_the_page_are_those_of_the_results(written: tuple[dict[str, Any], Path], page: Node) -> None:
    results, _ = written
    metric = results["metric"]
    rows = table(page.by_id("comparisons").all("table")[0])
    assert list(rows) == [arm["name"] for arm in results["arms"]]
    p_column = "p (Holm)" if len(results["comparisons"]) > 1 else "p"
    for arm in results["arms"]:
        for column, value in ((metric, arm["mean"]), ("± std over seeds", arm["std"])):
            (shown,) = rows[arm["name"]][column].all("data")
            assert float(shown.attributes["value"] or "") == value
            assert agrees(shown.text, value)
    for comparison in results["comparisons"]:
        row = rows[comparison["arm"]]
        assert row["Verdict"].text == comparison["verdict"]
        assert row["Difference"].numbers == [comparison["difference"]]
        assert agrees(row["Difference"].text, comparison["difference"])
        assert row["Difference"].text.startswith(MINUS if comparison["difference"] < 0 else "+")
        assert row["95% interval"].numbers == [end for end in comparison["interval"] if end is not None]
        assert row[p_column].numbers == [deciding(comparison)]


def test_every_statistic_is_on_the_page(written: tuple[dict[str, Any], Path], page: Node) -> None:
    results, _ = written
    rows = table(page.by_id("comparisons").all("table")[1])
    titles = {
        "p of the claim's test": "p_claim",
        "the same after Holm": "p_holm",
        "p of the opposite test": "p_against",
        "the opposite after Holm": "p_against_holm",
        "p, paired t (two-sided)": "p_t",
        "p, sign flips (two-sided)": "p_sign_flip",
        "p, equivalence (TOST)": "p_equivalence",
        "Minimum detectable effect": "minimum_detectable_effect",
        "Seeds that would settle it": "seeds_to_settle",
        "Difference": "difference",
    }
    for comparison in results["comparisons"]:
        for title, key in titles.items():
            expected = [] if comparison[key] is None else [comparison[key]]
            assert rows[title][comparison["arm"]].numbers == expected
        assert rows["95% t interval"][comparison["arm"]].numbers == comparison["t_interval"]


def test_seeds_of_the_page_are_those_of_the_results(written: tuple[dict[str, Any], Path], page: Node) -> None:
    results, _ = written
    rows = table(page.by_id("seeds").one("table"))
    base = results["arms"][0]["values"]
    for place, seed in enumerate(results["seeds"]):
        for arm in results["arms"]:
            cell = rows[str(seed)][arm["name"]]
            assert cell.numbers == [arm["values"][place]]
            assert ("diverged" in cell.text) == (seed in arm["diverged"])
            if arm is not results["arms"][0]:
                shown = rows[str(seed)][f"{arm['name']}, difference"]
                assert shown.numbers == [pytest.approx(arm["values"][place] - base[place], abs=1e-15)]


def test_every_exact_number_of_the_page_is_in_the_results(written: tuple[dict[str, Any], Path], page: Node) -> None:
    results, _ = written
    arms, first = results["arms"], results["arms"][0]
    allowed = in_json(results) | {float(len(results["seeds"]))}
    for arm in arms:
        allowed |= {v - b for v, b in zip(arm["values"], first["values"], strict=True)}
        allowed |= {value / first["achieved"][name] - 1 for name, value in arm["achieved"].items()}
        for point in arm["learning_rates"] or []:
            allowed.add(sum(point["values"]) / len(point["values"]))
    assert [number for number in page.numbers if number not in allowed] == []


def test_every_digit_that_is_read_is_marked_as_a_number_or_a_text_of_the_results(
    written: tuple[dict[str, Any], Path], page: Node
) -> None:
    results, _ = written
    for node in page.walk():  # what is marked, what is code, and the ticks of axes
        node.children = [
            child
            for child in node.children
            if isinstance(child, str)
            or not (child.tag in ("data", "code", "pre", "dl", "time") or child.attributes.get("aria-hidden") == "true")
        ]
    told = set(numbers_in(json.dumps(results, ensure_ascii=False)))
    told |= {95.0, 80.0, 1.0, float(len(results["comparisons"]))}  # the level, the power, "above 1", Holm's variants
    told |= {float(sum(len(arm["runs"]) for arm in results["arms"])), float(len(results["problems"]))}
    assert {number for number in numbers_in(page.one("main").text) if number not in told} == set()


def test_first_screen_has_hypothesis_verdict_and_forest(written: tuple[dict[str, Any], Path], page: Node) -> None:
    results, _ = written
    top = page.one("header", class_="top")
    assert top.one("h1").text == results["hypothesis"]
    assert top.one("span", class_="chip").text == results["verdict"]
    assert results["verdict"] in (top.one("span", class_="chip").attributes["class"] or "").split()
    forest = top.one("figure", class_="forest")
    assert [row.one("div", class_="who").children[0] for row in forest.all("div", class_="row")[:-1]] == [
        comparison["arm"] for comparison in results["comparisons"]
    ]
    reason = top.one("div", class_="answer").one("p").text
    if results.get("withheld"):
        assert results["reason"] in reason
    else:
        assert all(comparison["arm"] in reason for comparison in results["comparisons"]) or "all" in reason
    if len(results["comparisons"]) == 1:
        better = (results["comparisons"][0]["difference"] < 0) == (results["direction"] == "lower")
        assert f" {'better' if better else 'worse'} than the baseline" in reason


def test_forest_draws_intervals_and_zones_to_scale(written: tuple[dict[str, Any], Path], page: Node) -> None:
    """The axis is found from two marks whose values are known, then every other mark must be on it."""
    results, _ = written
    forest = page.one("figure", class_="forest")
    ticks = [
        (float(tick.text.replace(MINUS, "-")), float((tick.attributes["style"] or "")[6:-1]) * 10)
        for tick in forest.all("span", class_="tick")
    ]
    (value0, place0), *_, (value1, place1) = ticks

    def at(value: float) -> float:
        return place0 + (value - value0) * (place1 - place0) / (value1 - value0)

    for comparison, row in zip(results["comparisons"], forest.all("div", class_="row"), strict=False):
        zero = row.one("path", class_="zero").attributes["d"] or ""
        assert numbers_in(zero.replace("M", ""))[0] == pytest.approx(at(0), abs=0.6)
        bounds = comparison["interval"]
        left, right = interval_of(row)
        for drawn, value, edge in ((left, bounds[0], 0.0), (right, bounds[1], 1000.0)):
            expected = edge if value is None else min(max(at(value), 0.0), 1000.0)
            assert drawn == pytest.approx(expected, abs=0.6)
        if (mean := row.all("span", class_="mark")) and 0 <= at(comparison["difference"]) <= 1000:
            place = float(re.findall(r"left: ([\d.-]+)%", mean[0].attributes["style"] or "")[0])
            assert 10 * place == pytest.approx(at(comparison["difference"]), abs=0.6)
        if comparison["claim"] == "no worse":
            edge = row.one("path", class_="edge").attributes["d"] or ""
            assert numbers_in(edge.replace("M", ""))[0] == pytest.approx(at(results["margin"]), abs=0.6)


def test_warnings_are_loud(written: tuple[dict[str, Any], Path], page: Node) -> None:
    results, folder = written
    said = page.one("header", class_="top").text
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for text in (said, markdown):
        assert ("Exploratory: the error rates below do not hold" in text) == (results["mode"] == "exploratory")
        assert ("Sequential design" in text) == (results["mode"] == "sequential")
        assert ("Verdict withheld" in text) == ("tokens differ by 12%" in text) == results["withheld"]
        assert ("rate at the grid's edge" in text) == bool(results["remarks"])
        assert ("each counts as 6.9315, the uniform guess" in text) == bool(results["diverged_value"])
        assert ("diverged in seeds 1 and 3" in text) == any(arm["diverged"] for arm in results["arms"])
    assert ("could not be used" in said) == bool(results["problems"])
    problems = [node for node in page.walk() if node.attributes.get("id") == "problems"]
    assert [len(node.all("li")) for node in problems] == [len(results["problems"])] * bool(results["problems"])


def test_markdown_says_the_same(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    heads, *rows = markdown_tables((folder / "report.md").read_text(encoding="utf-8"))[0]
    assert len(heads) == 7
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]}
    assert [row[0] for row in rows] == [" ".join(arm["name"].split()) for arm in results["arms"]]
    for arm, (_, mean, std, difference, interval, p, verdict) in zip(results["arms"], rows, strict=True):
        assert agrees(mean, arm["mean"])
        assert agrees(std, arm["std"])
        if arm["name"] in by_arm:
            comparison = by_arm[arm["name"]]
            assert agrees(difference, comparison["difference"])
            assert verdict == comparison["verdict"]
            assert p == "< 0.001" if deciding(comparison) < 0.001 else agrees(p, deciding(comparison))
            ends = interval.strip("[]").split(", ")
            for end, value in zip(ends, comparison["interval"], strict=True):
                assert end.endswith("∞") if value is None else agrees(end, value)


def test_latex_says_the_same(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    text = (folder / "table.tex").read_text(encoding="utf-8")
    body = text.split("\\midrule\n")[1].split("    \\bottomrule")[0]
    rows = [re.split(r"(?<!\\)&", line.strip().removesuffix("\\\\")) for line in body.splitlines()]
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]}
    for arm, row in zip(results["arms"], rows, strict=True):
        assert len(row) == 6
        mean, std = re.findall(r"\$([\d.-]+)\$", row[1])
        assert agrees(mean, arm["mean"])
        assert agrees(std, arm["std"])
        if arm["name"] in by_arm:
            comparison = by_arm[arm["name"]]
            assert agrees(row[2].strip(" $"), comparison["difference"])
            assert row[5].strip() == comparison["verdict"]
            ends = row[3].strip().strip("$").strip("[]").split(", ")
            for end, value in zip(ends, comparison["interval"], strict=True):
                assert "infty" in end if value is None else agrees(end, value)


def test_an_outlier_does_not_flatten_the_others(tmp_path: Path) -> None:
    results = synthetic_results.ablation({"a": -0.002, "b": 0.004, "broken": 0.0}, diverged={"broken": [0, 1, 2, 3, 4]})
    (tmp_path / "results.json").write_text(json.dumps(results))
    ablation.write(tmp_path)
    forest = parse((tmp_path / "report.html").read_text(encoding="utf-8")).one("figure", class_="forest")
    rows = forest.all("div", class_="row")
    left, right = interval_of(rows[0])
    assert right - left > 50  # of 1000; on an axis up to ln 1024 it would be one
    assert not rows[2].all("span", class_="mark")
    assert rows[2].one("span", class_="beyond").text == "▶"


def test_single_seed_has_no_interval_and_no_p(tmp_path: Path) -> None:
    results = synthetic_results.ablation(seeds=2)
    for arm in results["arms"]:
        del arm["values"][1], arm["runs"][1]
        arm |= {"mean": arm["values"][0], "std": None}
    comparison = results["comparisons"][0]
    comparison |= dict.fromkeys(("interval", "t_interval", "p_t", "p_sign_flip", "p_claim", "p_holm", "p_equivalence"))
    comparison |= {"difference": results["arms"][1]["mean"] - results["arms"][0]["mean"], "verdict": "inconclusive"}
    results |= {"seeds": [0], "verdict": "inconclusive"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    ablation.write(tmp_path)
    page = parse((tmp_path / "report.html").read_text(encoding="utf-8"))
    row = table(page.by_id("comparisons").all("table")[0])["rmsnorm"]
    assert (row["95% interval"].text, row["p"].text) == ("—", "—")
    said = page.one("header", class_="top").text
    assert "in its one seed" in said
    assert "; one seed cannot." in said
