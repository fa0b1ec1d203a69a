"""An ablation's results as Markdown, for a repository, and as a LaTeX table, for a paper."""

from collections.abc import Sequence
from typing import Any

from llmlab.study.report import latex as tex
from llmlab.study.report import markdown as md
from llmlab.study.report import words
from llmlab.study.report.ablation_results import BASELINE
from llmlab.study.report.numbers import fixed, interval, p_value, percent, quantity, signed, time
from llmlab.study.report.page import plain


def markdown(results: dict[str, Any], figures: Sequence[str]) -> str:
    """The report as GitHub renders it; `figures` are the names of images beside it."""
    decimals = words.decimals(results)
    notice = words.mode_notice(results)
    seeds = len(results["seeds"])
    parts = [
        f"# {md.escape(results['hypothesis'])}",
        f"**{results['verdict'].capitalize()}.** {_text(words.headline(results))}",
        None if notice is None else f"> **{notice[0]}.** {notice[1]}",
        *(f"> {_text(sentence)}" for sentence in words.diverged(results)),
        _table(results, decimals),
        f"{seeds} seeds, {results['mode']} design; matched by {results['match']}; {md.escape(results['metric'])} in "
        f"{md.escape(results['unit'] or 'its own unit')}, {results['direction']} is better; "
        f"intervals at {words.level(results)}. {words.P_NOTE}",
        f"> **Verdict withheld.** {md.escape(results['reason'])}" if results.get("withheld") else None,
        "\n".join(f"> - {md.escape(remark)}" for remark in results.get("remarks", [])),
        _image(figures, "effects.png", "Differences from the baseline with their intervals"),
        "\n".join(
            f"- **{md.escape(c['arm'])}**: {_text(words.outcome(results, c))} {md.escape(c['reason'])}"
            for c in results["comparisons"]
        ),
        _factorial(results, decimals, figures),
        _image(figures, "curves.png", "Learning curves: mean over seeds, with intervals"),
        _changes(results),
        _matched(results),
        "## Methods",
        *(_text(sentence) for sentence in words.methods(results)),
        _problems(results),
        "## Reproduce",
        md.block(results["command"]),
        f"Study file {md.code(results['file'])}, {md.escape(results['date'])}. The page `report.html` has every seed, "
        "every run and its provenance; `results.json` has the numbers that both are made from.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(results: dict[str, Any]) -> str:
    """A table for a paper; needs \\usepackage{booktabs} and nothing else."""
    decimals = words.decimals(results)
    unit = f" ({tex.escape(results['unit'])})" if results["unit"] else ""
    adjusted = " (Holm)" if len(results["comparisons"]) > 1 else ""
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]}
    rows = []
    for arm in results["arms"]:
        mean = "---" if arm["mean"] is None else tex.math(fixed(arm["mean"], decimals))
        if arm["std"] is not None:
            mean += rf" $\pm$ {tex.math(fixed(arm['std'], decimals))}"
        cells = [tex.escape(arm["name"]), mean]
        comparison = by_arm.get(arm["name"])
        if comparison is None:
            cells += ["---", "---", "---", ""]
        else:
            bounds = comparison["interval"]
            p = words.deciding_p(comparison)
            cells += [
                "---" if comparison["difference"] is None else tex.math(signed(comparison["difference"], decimals)),
                "---" if bounds is None else tex.math("".join(interval(bounds, decimals))),
                "---" if p is None else tex.math(p_value(p)),
                comparison["verdict"],
            ]
        rows.append("    " + " & ".join(cells) + r" \\")
    mode = {"exploratory": " Exploratory: error rates do not hold.", "sequential": " Sequential design."}
    caption = f"{tex.escape(results['hypothesis'])}: {results['verdict']}. "
    caption += (
        f"Mean {tex.escape(results['metric'])}{unit} over {len(results['seeds'])} seeds $\\pm$ standard deviation; "
    )
    caption += f"differences from the baseline, paired by seed, with {tex.escape(words.level(results))} intervals."
    caption += f" {tex.escape(words.P_NOTE)}" + mode.get(results["mode"], "")
    heads = ["Arm", tex.escape(results["metric"]), "Difference", "Interval", f"$p${adjusted}", "Verdict"]
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            r"  \begin{tabular}{lrrrrl}",
            r"    \toprule",
            "    " + " & ".join(heads) + r" \\",
            r"    \midrule",
            *rows,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _text(sentence: words.Sentence) -> str:
    return md.escape("".join(sentence))


def _image(figures: Sequence[str], name: str, title: str) -> str | None:
    return f"![{title}]({name})" if name in figures else None


def _table(results: dict[str, Any], decimals: int) -> str:
    p_title = "p (Holm)" if len(results["comparisons"]) > 1 else "p"
    heads = [("Arm", False), (results["metric"], True), ("± std", True), ("Difference", True)]
    heads += [(f"{words.level(results)} interval", True), (p_title, True), ("Verdict", False)]
    by_arm = {comparison["arm"]: comparison for comparison in results["comparisons"]}
    rows = []
    for arm in results["arms"]:
        cells = [arm["name"], fixed(arm["mean"], decimals), fixed(arm["std"], decimals)]
        if (c := by_arm.get(arm["name"])) is None:
            cells += ["", "", "", ""]
        else:
            bounds = "".join(interval(c["interval"], decimals))
            cells += [signed(c["difference"], decimals), bounds, p_value(words.deciding_p(c)), c["verdict"]]
        rows.append([md.escape(cell) for cell in cells])
    return md.table(heads, rows)


def _factorial(results: dict[str, Any], decimals: int, figures: Sequence[str]) -> str | None:
    factorial = results["factorial"]
    if factorial is None:
        return None
    heads = [
        ("Term", False),
        ("Effect", True),
        (f"{words.level(results)} interval", True),
        ("p", True),
        ("p (Holm)", True),
    ]
    rows = [
        [
            md.escape(text)
            for text in (
                effect["term"],
                signed(effect["estimate"], decimals),
                "".join(interval(effect["interval"], decimals)),
                p_value(effect["p"]),
                p_value(effect["p_holm"]),
            )
        ]
        for effect in factorial["effects"]
    ]
    parts = ["## Factors and interactions", md.table(heads, rows)]
    parts.append(_image(figures, "interaction.png", "The effect of each factor at the levels of another") or "")
    return "\n\n".join(filter(None, parts))


def _changes(results: dict[str, Any]) -> str:
    rows = [
        [
            md.escape(arm["name"]),
            md.code(change["path"]),
            md.code(plain(change["baseline"])),
            md.code(plain(change["variant"])),
        ]
        for arm in results["arms"]
        for change in arm["changes"]
    ]
    if not rows:
        return "## What differed\n\nNothing: the arms have the same configuration."
    heads = [("Arm", False), ("Setting", False), ("Baseline", False), ("Variant", False)]
    return f"## What differed\n\n{md.table(heads, rows)}"


def _matched(results: dict[str, Any]) -> str:
    names = ("tokens", "parameters", "flops", "seconds")
    base = results["arms"][0]["achieved"]
    rows = []
    for arm in results["arms"]:
        cells = [md.escape(arm["name"])]
        for name in names:
            value = arm["achieved"][name]
            shown = time(value) if name == "seconds" else quantity(value)
            if arm["name"] != BASELINE and value is not None and base[name]:
                shown = f"{shown} ({percent(value / base[name] - 1)})"
            cells.append(md.escape(shown))
        rows.append(cells)
    heads = [("Arm", False)] + [(f"{name} (matched)" if name == results["match"] else name, True) for name in names]
    said = [f"## Matched quantities\n\n{md.table(heads, rows)}"]
    if results["acknowledged"] is not None:
        said.append(f"Acknowledged mismatch: {md.escape(results['acknowledged'])}")
    return "\n\n".join(said)


def _problems(results: dict[str, Any]) -> str | None:
    if not results["problems"]:
        return None
    items = "\n".join(f"- {md.escape(plain(problem))}" for problem in results["problems"])
    return f"## Problems\n\nNothing of these is in any mean, interval or figure.\n\n{items}"
