"""The later sections of an ablation's page: what a reviewer asks for once the verdict is read."""

from typing import Any

from llmlab.study.report import charts, words
from llmlab.study.report.ablation_results import BASELINE
from llmlab.study.report.markup import Html, element
from llmlab.study.report.numbers import NOTHING, Shown, fixed, general, percent, quantity, time
from llmlab.study.report.page import folded, plain, section, table, tree
from llmlab.study.report.scales import Scale


def changes(results: dict[str, Any]) -> Html:
    """What differs between the arms' configurations."""
    rows = []
    for arm in results["arms"][1:]:
        for place, change in enumerate(arm["changes"]):
            before, after = (plain(change[side]) for side in ("baseline", "variant"))
            cells = [arm["name"] if place == 0 else element("span", arm["name"], class_="sr")]
            cells += [element("code", change["path"]), element("code", before), element("code", after)]
            rows.append((cells, ""))
    heads = [("Arm", False), ("Setting", False), ("Baseline", False), ("Variant", False)]
    if not rows:
        return section(
            "What differed", element("p", "Nothing: the arms have the same configuration."), anchor="changes"
        )
    lede = element("p", "Computed from the resolved configurations of the arms; nothing else differed.", class_="lede")
    return section("What differed", lede, table(heads, rows, caption="Configuration differences"), anchor="changes")


def matched(results: dict[str, Any]) -> Html:
    """What the arms used, and whether they were matched."""
    match = results["match"]
    names = ("tokens", "parameters", "flops", "seconds")
    heads = [("Arm", False)]
    for name in names:
        heads.append((f"{name}{' (matched)' if name == match else ''}", True))
    base = results["arms"][0]["achieved"]
    wrong = {(item["arm"], item["quantity"]) for item in results["mismatches"]}
    rows = []
    for arm in results["arms"]:
        cells: list[Any] = [arm["name"]]
        for name in names:
            value = arm["achieved"][name]
            shown = time(value) if name == "seconds" else quantity(value)
            cell: list[Any] = [shown]
            if arm["name"] != BASELINE and value is not None and base[name]:
                cell.append(element("small", percent(value / base[name] - 1)))
            if (arm["name"], name) in wrong:
                cell.append(element("small", element("strong", "mismatch")))
            cells.append(cell)
        rows.append((cells, "base" if arm["name"] == BASELINE else ""))
    lede: list[Any] = [
        f"Arms are matched by {match}, within ",
        percent(results["tolerance"])[1:] if results["tolerance"] else "0%",
        ".",
    ]
    if results["mismatches"] and results["acknowledged"] is None:
        lede.append(" The mismatch was not acknowledged.")
    reason = None
    if results["acknowledged"] is not None:
        reason = element("p", "Acknowledged mismatch: ", results["acknowledged"])
    return section(
        "Matched quantities",
        element("p", *lede, class_="lede"),
        table(heads, rows, caption="What each arm used, a run; small: relative to the baseline"),
        reason,
        anchor="matched",
    )


def learning_rates(results: dict[str, Any], decimals: int) -> Html | None:
    """The learning rates that were tried by arm; None where none were."""
    tuned = [(place, arm) for place, arm in enumerate(results["arms"]) if arm["learning_rates"]]
    if not tuned:
        return None
    drawn, rows = [], []
    for place, arm in tuned:
        grid = sorted(arm["learning_rates"], key=lambda point: point["rate"])
        means = [_mean(point["values"]) for point in grid]
        drawn.append(charts.Series(name=arm["name"], x=[p["rate"] for p in grid], y=means, color=place))
        for point, mean in zip(grid, means, strict=True):
            chosen = point["rate"] == arm["learning_rate"]
            cells = [arm["name"], general(point["rate"]), fixed(mean, decimals), "chosen" if chosen else ""]
            rows.append((cells, "picked" if chosen else ""))
    x = Scale.over([rate for curve in drawn for rate in curve.x], log=True)
    y = Scale.over([value for curve in drawn for value in curve.y])
    title = f"{results['metric']}, mean over seeds"
    figure = element(
        "figure",
        charts.curves(
            drawn,
            x=x,
            y=y,
            x_title="learning rate",
            y_title=title,
            summary="The metric against the learning rate by arm",
        ),
    )
    costs = [
        element("li", arm["name"], ": ", fixed(found["value"], decimals), words.unit(results))
        for _, arm in tuned
        if (found := arm.get("learning_rate_sensitivity"))
    ]
    sensitivity = "Lost on average over the grid by not using the best rate (learning-rate sensitivity):"
    heads = [("Arm", False), ("Learning rate", True), (title, True), ("Chosen", False)]
    return section(
        "Learning rates",
        figure,
        [element("p", sensitivity, class_="lede"), element("ul", *costs, class_="notes")] if costs else None,
        folded("As a table", table(heads, rows, caption="The grid of every arm")),
        anchor="rates",
    )


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def speed(results: dict[str, Any]) -> Html | None:
    """How much sooner the variants reach the target; None where nothing is known."""
    rows = []
    for c in results["comparisons"]:
        speed_up = c["speed_up"]
        if not speed_up or speed_up.get("ratio") is None:
            continue
        bound = speed_up.get("bound", "exact")
        bounds = speed_up.get("interval")
        shown = [] if bounds is None else ["[", fixed(bounds[0], 2), ", ", fixed(bounds[1], 2), "]"]
        target = (c["steps_to_target"] or {}).get("target")
        cells = [
            c["arm"],
            general(target),
            ["" if bound == "exact" else f"{bound} ", fixed(speed_up["ratio"], 2), "×"],
            shown,
        ]
        rows.append((cells, ""))
    if not rows:
        return None
    heads = [("Arm", False), ("Target", True), ("Speed-up in steps", True), (f"{words.level(results)} interval", True)]
    lede = "Steps of the baseline over steps of the variant until the target; above 1 the variant gets there sooner."
    return section(
        "Steps to target",
        element("p", lede, class_="lede"),
        table(heads, rows, caption="Speed-up by variant"),
        anchor="speed",
    )


def runs(results: dict[str, Any], decimals: int) -> Html:
    """Every run, and where its numbers come from."""
    heads = [
        ("Run", False),
        ("Seed", True),
        ("Status", False),
        (results["metric"], True),
        ("Learning rate", True),
        ("Time", True),
        ("Tokens/s", True),
        ("Config", False),
        ("Code", False),
        ("Directory", False),
    ]
    rows = []
    for arm in results["arms"]:
        for run in arm["runs"]:
            cells = [
                arm["name"],
                Shown(str(run["seed"]), run["seed"]),
                run["status"],
                fixed(run["value"], decimals),
                general(run["learning_rate"]),
                time(run["seconds"]),
                quantity(run["tokens_per_second"]),
                element("code", run["config_hash"][:12]),
                element("code", (run["code"] or NOTHING)[:16]),
                element("code", run["directory"]),
            ]
            rows.append((cells, "" if run["status"] == "finished" else "odd"))
    shared = {key: value for key, value in results["provenance"].items() if key != "runs"}
    every = {}
    for place, run in enumerate(results["provenance"].get("runs") or []):
        named = run.get("name") or run.get("hash") or run.get("config_hash") if isinstance(run, dict) else None
        every[str(named or place) if str(named or place) not in every else f"{named} ({place})"] = run
    return section(
        "Provenance",
        element("p", "Study file ", element("code", results["file"] or "not recorded"), ".", class_="lede"),
        folded(f"All {len(rows)} runs", table(heads, rows, caption="Every run of the study", sortable=True)),
        folded("Environment", tree(shared)) if shared else None,
        folded("Provenance by run", tree(every)) if every else None,
        anchor="provenance",
    )
