"""The memory of an ablation: study.json in its folder says what was settled before the results were known.

    {"kind": "ablation", "schema": 1,
     "definition": {"hypothesis", "metric", ..., "seeds": {...}, "arms": {name: {"claim", "margin", "config"}}},
     "reported": null | {"seeds": 5, "date": ...},        results were computed: from here on they may have been seen
     "exploratory": null | "why"}

A p-value bounds the error of a procedure that was fixed beforehand. A study that is looked at, and then gets three more
seeds, another margin or another claim, follows a different procedure: one that goes on until it likes the answer. So
once results have been computed, the definition stands. What is wanted all the same is done, and called exploratory in
every report of the folder from then on. A confidence sequence holds at any number of seeds, so a sequential study may
change its maximum and its budget. A mismatch may be acknowledged at any time: the report shows it, and why.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from llmlab.config import to_json
from llmlab.study.ablation import Ablation, Arm
from llmlab.study.changes import json_difference
from llmlab.study.measures import PREFIX, source_hash
from llmlab.training.directory import write_json

FILE_NAME = "study.json"
KIND = "ablation"
SCHEMA = 1

_PLAIN = ("hypothesis", "metric", "direction", "claim", "margin", "match", "tolerance", "acknowledge_mismatch", "alpha")
_SHOWN = 12  # differences in a message


class PeekingError(ValueError):
    """The study's results are known, and what is asked for would let them decide how it goes on."""


@dataclass
class Record:
    """An ablation's study.json, open. Every change is on disk when the call returns."""

    path: Path
    definition: dict[str, Any]
    reported: dict[str, Any] | None = None
    """{"seeds", "date"} of the last results; None while there are none."""
    exploratory: str | None = None
    """Why the study's error rates are no longer what they say; None while they are."""
    remarks: list[str] = field(default_factory=list)
    """What was changed on opening, for people."""

    @property
    def mode(self) -> Literal["fixed", "sequential", "exploratory"]:
        """fixed, sequential or exploratory."""
        if self.exploratory is not None:
            return "exploratory"
        return "sequential" if "min_seeds" in self.definition["seeds"] else "fixed"

    def results_known(self, seeds: int) -> None:
        """Notes that results were computed over so many seeds; to be called before anyone can see them."""
        self.reported = {"seeds": seeds, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        self.write()

    def write(self) -> None:
        """Writes the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"kind": KIND, "schema": SCHEMA, "definition": self.definition}
        write_json(self.path, content | {"reported": self.reported, "exploratory": self.exploratory})


def definition(ablation: Ablation, arms: Sequence[Arm]) -> dict[str, Any]:
    """What decides the outcome of a study, as JSON."""
    if ablation.sequential:
        names = ("min_seeds", "max_seeds", "budget")
        seeds: dict[str, Any] = {name: getattr(ablation, name) for name in names}
    else:
        seeds = {"count": ablation.seeds}
    return {
        **{name: getattr(ablation, name) for name in _PLAIN},
        "measure": _measure(ablation),
        "seeds": seeds,
        "learning_rates": list(ablation.learning_rates),
        "tuning_seeds": ablation.tuning_seeds,
        "factors": {factor: list(levels) for factor, levels in ablation.factors.items()},
        "arms": {
            arm.name: {"claim": arm.claim, "margin": arm.margin, "config": json.loads(to_json(arm.experiment))}
            for arm in arms
        },
    }


def _measure(ablation: Ablation) -> str | None:
    """The hash of the function that gives the metric. One whose values are merely shown decides nothing."""
    if ablation.measure is None or not ablation.metric.startswith(PREFIX):
        return None
    return source_hash(ablation.measure)


def open_record(
    folder: Path,
    ablation: Ablation,
    arms: Sequence[Arm],
    *,
    exploratory: bool = False,
    allow_change: bool = False,
    write: bool = True,
) -> Record:
    """The record of this study in its folder, begun where there is none. Writes nothing but study.json.

    Args:
        folder: of the study.
        ablation: the definition.
        arms: of it.
        exploratory: go on although results are known and the definition is another, and say so in every report.
        allow_change: go on in a folder that another definition began, as long as no results are known.
        write: False to see only whether it would go on.

    Raises:
        ValueError: the folder holds something else, or a study of another definition; the message says what differs.
        PeekingError: results are known, and the definition is another.
    """
    path, now = folder / FILE_NAME, definition(ablation, arms)
    record = read_record(folder)
    if record is None:
        # Hidden files are of another process that begins the same study at this moment.
        if folder.exists() and (not folder.is_dir() or any(not file.name.startswith(".") for file in folder.iterdir())):
            raise ValueError(f"{folder} exists and is no study (it has no {FILE_NAME}); choose another with --out")
        record = Record(path, now)
        if write:
            record.write()
        return record
    changes = json_difference(record.definition, now)
    if not changes:
        return record
    words_only = all(name == "acknowledge_mismatch" for name, _, _ in changes)
    seeds_only = all(name.startswith("seeds.") for name, _, _ in changes)
    if record.reported is not None and not (words_only or _valid_at_any_time(changes)):
        if not exploratory:
            raise PeekingError(_refusal(record, changes, seeds_only, folder))
        what = "; ".join(_line(change) for change in changes[:_SHOWN])
        since = f"changed after results over {record.reported['seeds']} seeds were known: {what}"
        record.exploratory = since if record.exploratory is None else f"{record.exploratory}; then {since}"
    elif not (seeds_only or words_only or allow_change or exploratory):
        raise ValueError(
            f"{folder} was begun by another definition:{_listed(changes)}\n"
            "define it as it was, choose another folder with --out, or go on with the new one with "
            "--allow-config-change"
        )
    record.remarks.append(f"the definition of {folder} changes:{_listed(changes)}")
    record.definition = now
    if write:
        record.write()
    return record


def read_record(folder: Path) -> Record | None:
    """The record in a folder; None where there is none.

    Raises:
        ValueError: the file is damaged, or of another kind of study.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        kind = content["kind"]
        if kind == KIND:
            return Record(path, content["definition"], content["reported"], content["exploratory"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); move the folder away, the runs are kept elsewhere") from None
    raise ValueError(f"{folder} holds a {kind}, not an {KIND}; choose another folder with --out")


def _refusal(record: Record, changes: list[tuple[str, Any, Any]], seeds_only: bool, folder: Path) -> str:
    assert record.reported is not None
    known = f"the results of {folder} over {record.reported['seeds']} seeds are known"
    if seeds_only:
        return (
            f"{known}, and other seeds are asked for:{_listed(changes)}\nseeds that are added after a look at the "
            "results make false findings likely. Start a new study with --out, plan it with "
            'seeds="until settled", whose intervals allow it, or go on with --exploratory, which the report will say'
        )
    return (
        f"{known}, and the definition is another:{_listed(changes)}\na question that is chosen after the answer proves "
        "nothing. Start a new study with --out, or go on with --exploratory, which the report will say"
    )


def _valid_at_any_time(changes: list[tuple[str, Any, Any]]) -> bool:
    """Whether a sequential study merely is to end elsewhere: its intervals hold at any number of seeds."""
    return all(name in ("seeds.max_seeds", "seeds.budget") for name, _, _ in changes)


def _listed(changes: list[tuple[str, Any, Any]]) -> str:
    more = f"\n  and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return "".join(f"\n  {_line(change)}" for change in changes[:_SHOWN]) + more


def _line(change: tuple[str, Any, Any]) -> str:
    name, before, after = change
    return f"{name}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    text = "absent" if value is None else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
