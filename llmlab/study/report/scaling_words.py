"""A scaling study's results in sentences and tables, for the page and for Markdown alike."""

from typing import Any

from llmlab.study.report.numbers import NOTHING, Shown, decimals_for, fixed, general, quantity, signed
from llmlab.study.report.words import Sentence, unit

Table = tuple[list[tuple[str, bool]], list[list[str]]]
"""Heads (title, whether it holds numbers) and rows."""


def level(results: dict[str, Any]) -> str:
    """The level of the intervals: "90%"."""
    return f"{100 * results['level']:.4g}%"


def decimals(results: dict[str, Any]) -> int:
    """Decimals of losses: the spread of runs around the law to two digits."""
    law = results["law"]
    values = [run["value"] for run in results["runs"] if run["value"] is not None]
    return decimals_for([law["spread"] * max(values)] if law and values else [], most=4)


def estimate(found: dict[str, Any], places: int | None = None) -> str:
    """ "0.46 [0.41, 0.52]"; with `places` None as a quantity, "1.2M [0.9M, 1.6M]"."""

    def one(value: float) -> str:
        if places is None:
            return str(quantity(value)) if value >= 1 else str(general(value))
        return str(fixed(value, places))

    if found["interval"] is None:
        return one(found["value"])
    low, high = found["interval"]
    return f"{one(found['value'])} [{one(low)}, {one(high)}]"


def answer(results: dict[str, Any]) -> Sentence:
    """The study in a sentence."""
    law = results["law"]
    if law is None:
        return ["No law could be fitted; the problems below say why."]
    a, b = law["exponents"]["parameters"], law["exponents"]["tokens"]
    said = [
        f"The best model for a budget of C FLOPs has parameters growing as C^{estimate(a, 2)} and tokens as "
        f"C^{estimate(b, 2)} ({level(results)} intervals, {law['runs']} runs)."
    ]
    checked = results["held_out"]
    if checked is not None:
        count = len(checked["predictions"])
        said.append(
            f" From the {checked['runs']} smaller runs alone the law predicts the {count} largest with a mean error of "
            f"{fixed(checked['error'], decimals(results))}{unit(results)}; {checked['covered']} of {count} lie in "
            "their intervals."
        )
    return said


def law_table(results: dict[str, Any]) -> Table:
    """The law's parameters, and the exponents by both approaches."""
    law = results["law"]
    rows = [
        [name, estimate(law[name], 3 if name in ("alpha", "beta", "E") else None), meaning]
        for name, meaning in (
            ("E", "loss that remains at any size"),
            ("A", "of the term of N"),
            ("alpha", "exponent of N"),
            ("B", "of the term of D"),
            ("beta", "exponent of D"),
        )
    ]
    isoflop = results["isoflop"]
    for key, name in (("parameters", "N* ~ C^a"), ("tokens", "D* ~ C^b")):
        rows.append([name, estimate(law["exponents"][key], 3), "from the law"])
        if isoflop and isoflop["exponents"]:
            rows.append([name, estimate(isoflop["exponents"][key], 3), "from the minima of the isoFLOP profiles"])
    return [("Quantity", False), (f"Estimate [{level(results)}]", True), ("Meaning", False)], rows


def frontier_table(results: dict[str, Any]) -> Table:
    """The best use of each budget."""
    places = decimals(results)
    rows = [
        [
            str(quantity(row["flops"])) + (" (extrapolated)" if row["extrapolated"] else ""),
            estimate(row["parameters"]),
            estimate(row["tokens"]),
            general(row["tokens"]["value"] / row["parameters"]["value"]),
            estimate(row["loss"], places),
        ]
        for row in results["frontier"]
    ]
    heads = [("FLOPs", True), ("Parameters N*", True), ("Tokens D*", True), ("D*/N*", True), ("Loss", True)]
    return heads, rows


def held_out_table(results: dict[str, Any]) -> Table:
    """The largest runs, and what the smaller ones said of them."""
    places = decimals(results)
    rows = [
        [
            row["name"],
            fixed(row["value"], places),
            estimate({"value": row["predicted"], "interval": row["interval"]}, places),
            signed(row["error"], places),
            "yes" if row["covered"] else "no",
        ]
        for row in results["held_out"]["predictions"]
    ]
    heads = [("Run", False), ("Measured", True), (f"Predicted [{level(results)}]", True), ("Error", True)]
    return [*heads, ("Covered", False)], rows


def runs_table(results: dict[str, Any]) -> Table:
    """Every run."""
    places = decimals(results)
    rows = [
        [
            Shown(str(quantity(run["parameters"])), run["parameters"]),
            Shown(str(quantity(run["tokens"])), run["tokens"]),
            Shown(str(quantity(run["flops"])), run["flops"]),
            fixed(run["value"], places) if run["value"] is not None else run["status"],
            fixed(run["fitted"], places),
            run["directory"] or NOTHING,
        ]
        for run in results["runs"]
    ]
    heads = [("N", True), ("D", True), ("FLOPs", True), ("Loss", True), ("Law", True)]
    return [*heads, ("Directory", False)], rows


def conventions(results: dict[str, Any]) -> list[str]:
    """What N, D and C count, and what a model of the family costs."""
    cost = results["cost"]
    law = (
        f"Models of this family cost {cost['kappa']:.3g} N^{cost['gamma']:.3f} FLOPs a token, to within "
        f"{100 * cost['error']:.2g}%"
    )
    return [
        results["conventions"]["parameters"],
        results["conventions"]["tokens"],
        results["conventions"]["flops"],
        law,
    ]
