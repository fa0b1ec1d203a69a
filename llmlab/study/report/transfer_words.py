"""A transfer study's results in sentences and tables, for the page and for Markdown alike."""

from typing import Any

from llmlab.study.report.numbers import NOTHING, decimals_for, fixed, general, signed
from llmlab.study.report.scaling_words import Table, level
from llmlab.study.report.words import Sentence, unit


def decimals(results: dict[str, Any]) -> int:
    """Decimals of losses: the best of them to a fraction of their differences."""
    best = sorted(row["best"]["loss"] for arm in results["arms"] for row in arm["widths"] if row["best"]["loss"])
    return decimals_for([best[-1] - best[0]] if len(best) > 1 else [], most=4)


def _with_interval(found: dict[str, Any], places: int) -> str:
    if found["value"] is None:
        return NOTHING
    shown = str(signed(found["value"], places))
    if found["interval"] is None:
        return shown
    low, high = found["interval"]
    return f"{shown} [{signed(low, places)}, {signed(high, places)}]"


def answer(results: dict[str, Any]) -> Sentence:
    """The study in a sentence for each arm."""
    narrow, wide = results["widths"][0], results["widths"][-1]
    said: Sentence = []
    for arm in results["arms"]:
        drift = _with_interval(arm["drift"], 2)
        text = f"{arm['name']}: the best learning rate moves as width^{drift}"
        if arm["drift"]["value"] is None:
            text = f"{arm['name']}: too few widths have their best learning rate within the grid"
        if arm["regret"]["value"] is not None:
            regret = _with_interval(arm["regret"], max(3, decimals(results)))
            text += f", and width {wide} loses {regret}{unit(results)} at the rate that is best for width {narrow}"
        said.append(f"{text}. ")
    return said


def best_table(results: dict[str, Any]) -> Table:
    """The best rate of each arm and width."""
    places = decimals(results)
    rows = [
        [
            arm["name"],
            str(row["width"]),
            general(row["best"]["grid_rate"]),
            general(row["best"]["rate"]) if row["best"]["rate"] is not None else "at an end of the grid",
            fixed(row["best"]["loss"], places),
        ]
        for arm in results["arms"]
        for row in arm["widths"]
    ]
    heads = [("Arm", False), ("Width", True), ("Best of the grid", True), ("By parabola", True), ("Loss", True)]
    return heads, rows


def loss_table(results: dict[str, Any]) -> Table:
    """Mean loss by arm, width and rate."""
    places = decimals(results)
    heads = [("Arm", False), ("Width", True), *((str(general(rate)), True) for rate in results["learning_rates"])]
    rows = [
        [arm["name"], str(row["width"]), *(fixed(loss, places) for loss in row["means"])]
        for arm in results["arms"]
        for row in arm["widths"]
    ]
    return heads, rows


def slope_table(results: dict[str, Any]) -> Table:
    """Slopes of the coordinate check."""
    checked = [arm for arm in results["arms"] if arm["coordinates"]]
    layers = list(checked[0]["coordinates"]["slopes"]) if checked else []
    rows = [[layer, *(signed(arm["coordinates"]["slopes"].get(layer), 2) for arm in checked)] for layer in layers]
    return [("Output of", False), *((arm["name"], True) for arm in checked)], rows


__all__ = ["answer", "best_table", "decimals", "level", "loss_table", "slope_table"]
