"""`llmlab models`: the architecture families, their sizes, and what they are for."""

import argparse
import difflib
import inspect
import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmlab.models.config import ModelConfig
    from llmlab.models.family import Family

DESCRIPTION = """\
List the architecture families with their presets and sizes, the heads that stand on them, the objectives that train
them, and the implementation that each is verified against:
    llmlab models
    llmlab models bert                     one family: presets, and the explanation of the architecture
    llmlab models --json | jq '.[].presets[] | select(.num_parameters < 1e8) | .name'

In an experiment: from llmlab.models import llama; Experiment(model=llama.preset("nano"), ...). Parameters are counted
from the config alone. A preset without a vocabulary follows the experiment's tokenizer; here it is given 1,024 tokens.
"""

# What a preset is counted with whose vocabulary is the tokenizer's.
_VOCABULARY = 1024


def main(argv: Sequence[str]) -> int:
    """Runs `llmlab models`."""
    parser = argparse.ArgumentParser(
        prog="llmlab models",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", nargs="?", help="a family: its name, its module or its Hugging Face model_type")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    arguments = parser.parse_args(argv)

    from llmlab.models.catalog import FAMILIES

    families = FAMILIES if arguments.name is None else (find(arguments.name, FAMILIES),)
    records = [record(family) for family in _with_progress(families)]
    if arguments.json:
        print(json.dumps(records, indent=2))
    elif arguments.name is None:
        _print_families(records)
    else:
        _print_family(records[0], _docstring(families[0]))
    return 0


def _with_progress(families: "Sequence[Family]") -> "Iterable[Family]":
    """The families, with a bar on a terminal's stderr: a hundred models take some ten seconds to count."""
    from rich.console import Console
    from rich.progress import track

    silent = not sys.stderr.isatty() or len(families) == 1
    return track(families, "counting parameters", console=Console(stderr=True), transient=True, disable=silent)


def find(name: str, families: "Sequence[Family]") -> "Family":
    """The family of this name, module or model_type; or the one that has a preset of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    by_name: dict[str, Family] = {}
    for family in families:
        for alias in (*family.presets, *_aliases(family)):
            by_name.setdefault(_plain(alias), family)
    if _plain(name) in by_name:
        return by_name[_plain(name)]
    names = [family.name for family in families]
    near = difflib.get_close_matches(_plain(name), list(by_name), n=2, cutoff=0.5)
    way_out = " or ".join(dict.fromkeys(by_name[match].name for match in near))
    raise ValueError(f"there is no family {name!r}; {f'did you mean {way_out}?' if way_out else ', '.join(names)}")


def record(family: "Family") -> dict[str, Any]:
    """A family as JSON."""
    return {
        "name": family.name,
        "module": _module(family),
        "kind": family.kind,
        "paper": family.paper,
        "model_type": None if family.hugging_face is None else family.hugging_face.model_type,
        "presets": [_preset(name, config) for name, config in family.presets.items()],
        "heads": list(family.heads),
        "objectives": list(family.objectives),
        "reference": family.reference,
    }


def _preset(name: str, config: "ModelConfig") -> dict[str, Any]:
    sized = config.with_vocabulary(_VOCABULARY) if config.vocab_size is None else config
    return {"name": name, "num_parameters": sized.num_parameters(), "vocab_size": config.vocab_size}


def _aliases(family: "Family") -> list[str]:
    hub = family.hugging_face
    return [family.name, _module(family).rpartition(".")[2], *([] if hub is None else [hub.model_type])]


def _module(family: "Family") -> str:
    """The module that defines a family: the catalogue imports them all."""
    from llmlab.models import catalog

    modules = [module for module in vars(catalog).values() if inspect.ismodule(module)]
    return next(module.__name__ for module in modules if vars(module).get("FAMILY") is family)


def _docstring(family: "Family") -> str:
    return inspect.getdoc(sys.modules[_module(family)]) or ""


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    if not sys.stdout.isatty():
        console.width = 250  # nothing is cut in a pipe
    return console


def _print_families(records: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmlab.display.numbers import count

    console = _console()
    table = Table(box=None, padding=(0, 2, 1, 0), header_style="dim")
    table.add_column("family", style="bold", no_wrap=True)
    table.add_column("kind")
    table.add_column("presets", overflow="fold")
    table.add_column("heads", overflow="fold")
    table.add_column("objectives", overflow="fold")
    table.add_column("verified against", overflow="fold", style="dim")
    for row in records:
        presets = Text()
        for preset in row["presets"]:
            presets.append(f"{preset['name']} ").append(f"{count(preset['num_parameters'])}  ", style="cyan")
        heads, objectives = (", ".join(row[name]) or "-" for name in ("heads", "objectives"))
        table.add_row(row["name"], row["kind"], presets, heads, objectives, row["reference"])
    console.print(table)
    console.print(Text("llmlab models NAME explains one; its presets: NAME.preset(...) in an experiment", style="dim"))


def _print_family(row: dict[str, Any], explanation: str) -> None:
    from rich.table import Table
    from rich.text import Text

    from llmlab.display.numbers import count

    console = _console()
    console.print(Text(explanation), soft_wrap=True)
    console.print()
    facts = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    for title in ("kind", "paper", "module", "model_type", "heads", "objectives", "reference"):
        value = row[title]
        facts.add_row(title, Text(", ".join(value) if isinstance(value, list) else str(value or "-")))
    console.print(facts)
    console.print()
    presets = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    presets.add_column("preset", style="bold")
    presets.add_column("params", justify="right")
    presets.add_column("vocabulary", justify="right")
    for preset in row["presets"]:
        size = preset["vocab_size"]
        presets.add_row(
            preset["name"], count(preset["num_parameters"]), "tokenizer's or none" if size is None else f"{size:,}"
        )
    console.print(presets)
