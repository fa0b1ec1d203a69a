"""A results file that is damaged, of another version or at odds with itself is refused by file and key, never drawn."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmlab.study import report
from llmlab.study.report import ablation, sweep
from llmlab.study.report.schema import faults, mapping, nullable, number, one_of, optional, pair, text, whole
from tests.study import synthetic_results

Edit = Callable[[dict[str, Any]], Any]


def refusal(write: Callable[[Path], list[Path]], results: Any, folder: Path) -> str:
    """The message; nothing else was written."""
    path = folder / "results.json"
    path.write_text(results if isinstance(results, str) else json.dumps(results))
    with pytest.raises(ValueError, match=r"results\.json") as refused:
        write(folder)
    assert [left.name for left in folder.iterdir()] == ["results.json"]
    assert str(path) in str(refused.value)
    return str(refused.value)


def every_key(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all keys of objects, of the first element of lists."""
    if isinstance(value, dict):
        return [place for key, item in value.items() for place in ((*path, key), *every_key(item, (*path, key)))]
    if isinstance(value, list) and value:
        return every_key(value[0], (*path, 0))
    return []


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


# Objects whose keys are the study's own, and keys that may be missing.
FREE = {"provenance", "point", "importance", "levels", "factors", "variant", "baseline", "values"}
MAY_MISS = {"kind", "schema", "last", "reached", "steps", "target", "bound", "level", "p_against", "p_against_holm"}
MAY_MISS |= {"exploratory", "withheld", "remarks", "diverged_value", "source", "learning_rate_sensitivity"}
MAY_MISS |= {"best_rate", "at_edge"}


def required(results: dict[str, Any]) -> list[tuple[Any, ...]]:
    keys = [path for path in every_key(results) if not FREE & set(map(str, path[:-1])) and path[-1] not in MAY_MISS]
    return [path for path in keys if path[-2:] not in (("speed_up", "interval"), (0, "margin"))]


@pytest.mark.parametrize("path", required(synthetic_results.factorial()), ids=lambda path: ".".join(map(str, path)))
def test_ablation_without_a_key_is_refused_by_its_name(path: tuple[Any, ...], tmp_path: Path) -> None:
    results = synthetic_results.factorial()
    del at(results, path[:-1])[path[-1]]
    assert f"{'.'.join(map(str, path))} is missing" in refusal(ablation.write, results, tmp_path)


@pytest.mark.parametrize("path", required(synthetic_results.sweep(3)), ids=lambda path: ".".join(map(str, path)))
def test_sweep_without_a_key_is_refused_by_its_name(path: tuple[Any, ...], tmp_path: Path) -> None:
    results = synthetic_results.sweep(3)
    del at(results, path[:-1])[path[-1]]
    assert f"{'.'.join(map(str, path))} is missing" in refusal(sweep.write, results, tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_their_key(value: float, tmp_path: Path) -> None:
    results = synthetic_results.ablation()
    results["arms"][1]["curve"]["mean"][3] = value
    results["provenance"]["devices"]["count"] = value
    message = refusal(ablation.write, results, tmp_path)
    assert f"arms.1.curve.mean.3 is {value}" in message
    assert f"provenance.devices.count is {value}" in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is damaged"),
        ('{"kind": "ablation", "schema": 1', "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[1]", "holds [1]"),
        ("{}", "kind is null"),
        ('{"kind": ["ablation"]}', 'kind is ["ablation"]'),
        ('{"kind": "distillation"}', "not one of ablation, sweep"),
        ('{"kind": "ablation", "schema": 2}', "schema is 2; this version reads 1"),
        ('{"kind": "ablation", "schema": true}', "schema is true"),
        ('{"kind": "ablation", "schema": 1}', "hypothesis is missing"),
    ],
)
def test_files_that_are_no_results_are_refused(content: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(report.write, content, tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(b'{"kind": "\xff"}')
    with pytest.raises(ValueError, match=r"results\.json is damaged"):
        report.write(tmp_path)


def test_no_results_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        report.write(tmp_path)


def test_a_writer_refuses_another_kind(tmp_path: Path) -> None:
    assert "not one of sweep" in refusal(sweep.write, synthetic_results.ablation(), tmp_path)


def _set(path: str, value: Any) -> Edit:
    *most, last = (int(part) if part.isdigit() else part for part in path.split("."))
    return lambda results: at(results, tuple(most)).__setitem__(last, value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_set("arms.0.name", "control"), "arms.0.name is 'control', not 'baseline'"),
        (_set("arms", []), "arms is empty"),
        (_set("arms.1.name", "baseline"), "two have one name"),
        (_set("comparisons.0.arm", "layernorm"), "comparisons.0.arm is 'layernorm', which no variant is called"),
        (_set("comparisons.0.verdict", "maybe"), 'comparisons.0.verdict is "maybe", not one of supported'),
        (_set("comparisons.0.difference", 0.1), "comparisons.0.difference is 0.1, which is not the mean"),
        (_set("comparisons.0.interval", [0.2, 0.1]), "comparisons.0.interval is [0.2, 0.1], which ends before"),
        (_set("comparisons.0.interval", [0.2]), "comparisons.0.interval is [0.2], not a pair"),
        (_set("comparisons.0.p_claim", 1.5), "comparisons.0.p_claim is 1.5, which is no probability"),
        (_set("arms.1.mean", 2.0), "arms.1.mean is 2.0, which is not the mean"),
        (_set("arms.1.values", [2.3]), "arms.1.values has 1 values for 5 seeds"),
        (_set("arms.1.curve.low", [1.0]), "arms.1.curve has columns of several lengths"),
        (_set("arms.1.values.2", "2.3"), 'arms.1.values.2 is "2.3", not a number'),
        (_set("arms.1.values.2", True), "arms.1.values.2 is true, not a number"),
        (_set("seeds.0", 0.5), "seeds.0 is 0.5, not a whole number"),
        (_set("alpha", 5), "alpha is 5, not between 0 and 1"),
        (_set("direction", "sideways"), "direction is"),
        (_set("provenance", []), "provenance is [], not an object"),
    ],
)
def test_ablations_at_odds_with_themselves_are_refused(edit: Edit, said: str, tmp_path: Path) -> None:
    results = synthetic_results.ablation()
    edit(results)
    assert said in refusal(ablation.write, results, tmp_path)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_set("trials.1.number", 0), "two have one number"),
        (_set("trials.0.point", {"model.depth": 3}), "trials.0.point names model.depth, which is no axis"),
        (_set("trials.0.curve.step", [1]), "trials.0.curve has columns of several lengths"),
        (_set("best", None), "best is null, but trial"),
        (_set("best.number", 77), "best.number is 77, which no finished trial has"),
        (_set("best.value", 0.5), "best.value is 0.5, but trial"),
        (_set("direction", "higher"), "best.value is"),  # the best of the other direction
        (_set("axes.0.kind", "gaussian"), 'axes.0.kind is "gaussian"'),
        (_set("importance", {"x": "much"}), "importance.x is"),
    ],
)
def test_sweeps_at_odds_with_themselves_are_refused(edit: Edit, said: str, tmp_path: Path) -> None:
    results = synthetic_results.sweep(6)
    edit(results)
    assert said in refusal(sweep.write, results, tmp_path)


def test_many_faults_are_counted(tmp_path: Path) -> None:
    results = synthetic_results.ablation()
    for arm in results["arms"]:
        for run in arm["runs"]:
            del run["seed"], run["hash"]
    message = refusal(ablation.write, results, tmp_path)
    assert message.count("is missing") == 12
    assert "and 8 more" in message


def test_shapes() -> None:
    shape = {"a": text, "b": [nullable(number)], "c": mapping(pair(whole)), "d": optional(one_of("x", "y"))}
    good = {"a": "", "b": [1, None, 2.5], "c": {"k": [1, 2]}, "other": object}
    assert list(faults(good, shape)) == []
    bad = {"a": 1, "b": ["1"], "c": {"k": [1, 2.5]}, "d": "z"}
    assert list(faults(bad, shape)) == [
        "a is 1, not a text",
        'b.0 is "1", not a number',
        "c.k.1 is 2.5, not a whole number",
        'd is "z", not one of x, y',
    ]
    assert list(faults([], shape)) == ["the content is [], not an object"]


def test_reading_changes_nothing(tmp_path: Path) -> None:
    results = synthetic_results.ablation()
    kept = copy.deepcopy(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    ablation.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == kept
