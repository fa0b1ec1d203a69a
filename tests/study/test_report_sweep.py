"""A sweep's report says what results.json says."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from llmlab.study.report import sweep
from llmlab.study.report.scales import Scale
from tests.study import synthetic_results
from tests.study.reading import agrees, markdown_tables, parse, table, unescaped
from tests.study.test_report_ablation import HOSTILE, in_json


def hostile() -> dict[str, Any]:
    results = synthetic_results.sweep(12)
    results |= {
        "name": HOSTILE,
        "metric": f"m{HOSTILE}",
        "unit": HOSTILE,
        "command": HOSTILE,
        "problems": [{"why": HOSTILE}],
    }
    results["axes"][2] |= {"path": HOSTILE, "values": [HOSTILE, {"type": HOSTILE}]}
    for trial in [*results["trials"], results["best"]]:
        del trial["point"]["model.pattern.0.norm"]
        trial["point"][HOSTILE] = HOSTILE
    results["trials"][3] |= {"status": "failed", "problem": HOSTILE, "value": None}
    results["trials"][5]["value"] = None
    finished = [trial for trial in results["trials"] if trial["value"] is not None]
    best = min(finished, key=lambda trial: trial["value"])
    results["best"] |= {"number": best["number"], "value": best["value"], "command": HOSTILE}
    results["importance"] = {HOSTILE: 1.0}
    results["best"]["told"] = [HOSTILE]
    results["trials"][5] |= {"hash": "", "directory": "", "status": "failed", "value": None, "problem": "no such field"}
    return results


def nothing_finished() -> dict[str, Any]:
    results = synthetic_results.sweep(4)
    for trial in results["trials"]:
        trial |= {"status": "failed", "value": None, "problem": "out of memory", "curve": None}
    return results | {"best": None, "importance": None}


def conditional() -> dict[str, Any]:
    """An axis that only some trials have, an axis of one value, and accuracies, where higher is better."""
    results = synthetic_results.sweep(30, axes=2)
    for trial in results["trials"]:
        trial["point"]["train.steps"] = 600
        if trial["number"] % 2:
            del trial["point"]["model.num_layers"]
        if trial["value"] is not None:
            trial["value"] = 1 / trial["value"]
    steps = {"path": "train.steps", "kind": "values", "log": False, "values": [600], "low": None, "high": None}
    results["axes"].append(steps)
    best = max((t for t in results["trials"] if t["value"] is not None), key=lambda trial: trial["value"])
    results["best"] |= {key: best[key] for key in ("number", "value", "point")}
    return results | {"direction": "higher", "importance": None, "unit": None}


CASES = {
    "usual": synthetic_results.sweep(),
    "hostile": hostile(),
    "nothing finished": nothing_finished(),
    "one axis": synthetic_results.sweep(8, axes=1),
    "conditional": conditional(),
}


@pytest.fixture(scope="module", params=CASES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "results.json").write_text(json.dumps(CASES[request.param]))
    sweep.write(folder)
    return CASES[request.param], folder


def finished(results: dict[str, Any]) -> list[dict[str, Any]]:
    sign = 1 if results["direction"] == "lower" else -1
    return sorted((t for t in results["trials"] if t["status"] == "finished"), key=lambda trial: sign * trial["value"])


def test_figures_are_written_as_far_as_there_is_something_to_draw(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    figures = {path.name for path in folder.glob("*.png")}
    expected = {"curves.png", "axes.png"} if results["best"] else set()
    expected |= {"parallel.png"} if results["best"] and len(results["axes"]) > 1 else set()
    expected |= {"importance.png"} if results["importance"] else set()
    assert figures == expected


def test_best_trials_are_listed_in_order_with_their_points(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    page = parse((folder / "report.html").read_text(encoding="utf-8"))
    listed = [int(number) for part in page.by_id("best").all("table") for number in table(part)]
    assert sorted(listed) == sorted(trial["number"] for trial in results["trials"])  # each once
    expected = finished(results)[:15]
    rows = table(page.by_id("best").all("table")[0]) if expected else {}
    assert [int(number) for number in rows] == [trial["number"] for trial in expected]
    for trial in expected:
        row = rows[str(trial["number"])]
        (value,) = row[f"{results['metric']}"].numbers
        assert value == trial["value"]
        assert agrees(row[results["metric"]].text, value)
        for path, setting in trial["point"].items():
            cell = row[path]
            assert cell.numbers == [setting] if isinstance(setting, int | float) else cell.text == setting
        assert row["Run"].text == trial["hash"]


def test_first_screen_has_the_best_and_its_command(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    top = parse((folder / "report.html").read_text(encoding="utf-8")).one("header", class_="top")
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    if not results["best"]:
        assert top.one("h1").text == "No trial has finished"
        assert "No trial has finished" in markdown
        return
    assert top.one("h1").numbers == [results["best"]["value"]]
    assert top.one("pre").text == results["best"]["command"]
    assert f"\n{results['best']['command']}\n" in markdown
    for said in results["best"].get("told", []):
        assert said in top.text
        assert said in unescaped(markdown)


def test_every_exact_number_of_the_page_is_in_the_results(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    page = parse((folder / "report.html").read_text(encoding="utf-8"))
    counts = {float(n) for n in range(len(results["trials"]) + 1)}
    allowed = in_json(results) | counts | {sum(trial["seconds"] for trial in results["trials"])}
    assert [number for number in page.numbers if number not in allowed] == []


def test_markdown_lists_the_same_trials(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    tables = markdown_tables((folder / "report.md").read_text(encoding="utf-8"))
    if not results["best"]:
        assert tables[0][0] == ["Trial", "Status", "What happened"]
        return
    for row, trial in zip(tables[0][1:], finished(results)[:15], strict=True):
        assert int(row[0]) == trial["number"]
        assert agrees(row[1], trial["value"])


def test_failures_are_told(written: tuple[dict[str, Any], Path]) -> None:
    results, folder = written
    failed = {str(trial["number"]): trial for trial in results["trials"] if trial["problem"]}
    page = parse((folder / "report.html").read_text(encoding="utf-8"))
    if not failed:
        assert not [node for node in page.walk() if node.attributes.get("id") == "failures"]
        return
    rows = table(page.by_id("failures").one("table"))
    assert {number: row["What happened"].text for number, row in rows.items()} == {
        number: trial["problem"] for number, trial in failed.items()
    }


def test_dots_stand_where_the_trials_are(tmp_path: Path) -> None:
    """Against straight lines through two trials: places are linear in the value, and in the log where sampled so."""
    results = CASES["usual"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    sweep.write(tmp_path)
    panels = parse((tmp_path / "report.html").read_text(encoding="utf-8")).by_id("axes").all("div", class_="frame")
    trials = {trial["number"]: trial for trial in results["trials"]}
    for panel, path, of in ((panels[0], "optimizer.peak_lr", math.log), (panels[1], "model.num_layers", float)):
        dots = []
        for mark in panel.all("path", class_="dot"):
            number = int(re.findall(r"trial (\d+)", mark.one("title").text)[0])
            x, y = map(float, re.findall(r"M([\d.]+) ([\d.]+)h", mark.attributes["d"] or "")[0])
            dots.append((of(trials[number]["point"][path]), trials[number]["value"], x, y))
        assert len(dots) == len(finished(results))
        for value, place in ((0, 2), (1, 3)):
            low, high = min(dots, key=lambda d: d[value]), max(dots, key=lambda d: d[value])
            slope = (high[place] - low[place]) / (high[value] - low[value])
            for one in dots:
                assert one[place] == pytest.approx(low[place] + slope * (one[value] - low[value]), abs=0.2)
            assert (slope > 0) == (place == 2)  # heights count downwards


SCALES = [Scale(0.0, 1.0), Scale(-3e-4, 7e-4), Scale(2.2, 2.95), Scale(0, 600), Scale(1e-4, 3e-2, log=True)]


@pytest.mark.parametrize("scale", SCALES)
def test_ticks_are_round_and_within(scale: Scale) -> None:
    ticks = scale.ticks(5)
    assert 2 <= len(ticks) <= 9
    assert all(scale.low - 1e-9 <= tick <= scale.high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:.12g}".replace("-", "").replace(".", "").strip("0").split("e")[0]) <= 3 for tick in ticks)
