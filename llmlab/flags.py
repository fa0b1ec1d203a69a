"""Command-line flags from a config: every value of the tree is a flag, every class is chosen in Python.

    llmlab train FILE.py --optimizer.peak-lr 3e-4 --model.pattern.0.mixer.num-kv-heads 2

tyro derives the flags from the dataclasses' type hints and reads the help from the docstrings below the fields. A
field typed as a base class shows the fields of the instance that the file put there; a component that is None has
none. What tyro does not know, this module says in one message: each unknown flag with the nearest names, and what to
write in the file where the flag asks for a component.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse(config: T, argv: Sequence[str], *, prog: str, file: str = "the experiment file") -> T:
    """The config with the flags of argv applied: `--dotted.kebab-name value`, underscores accepted.

    `prog` is the command for the usage line, `file` the name of the file to edit, for messages. Raises ValueError
    that lists every unknown argument. `--help` prints every field with its default and its doc and exits with 0; a
    value that does not fit its field's type prints why and exits with 2.
    """
    import tyro  # 40 ms, and nothing else needs it

    asked_for_help = any(argument in ("-h", "--help") for argument in argv)
    try:
        parsed, unknown = tyro.cli(
            type(config),
            default=config,
            args=argv,
            prog=prog,
            return_unknown_args=True,
            # AvoidSubcommands: a union narrows to the instance that is there, or every `X | None` would become a
            # subcommand. FlagConversionOff: every flag takes a value, booleans included.
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    except SystemExit:
        if asked_for_help:
            _print_components(config)
        raise
    if unknown:
        raise ValueError(_explain(config, unknown, file))
    return parsed


# --- what there is ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """One field of a config tree."""

    path: str
    """Dotted path, as on the command line but with underscores."""
    value: Any
    """What the field holds."""
    bases: tuple[type, ...]
    """The config classes that the field's type names, None and plain values left out."""
    doc: str
    """The docstring below the field, or of the class that the field names."""

    @property
    def is_component(self) -> bool:
        """Whether the field holds (or, being None or empty, could hold) a config of its own instead of a value."""
        return dataclasses.is_dataclass(self.value) or (bool(self.bases) and self.value in (None, ()))


def entries(config: Any, path: str = "") -> Iterator[Entry]:
    """Every field of the tree, in order, components before their parts."""
    hints, docs = typing.get_type_hints(type(config)), _field_docs(type(config))
    for field in dataclasses.fields(config):
        value, bases = getattr(config, field.name), tuple(_component_types(hints[field.name]))
        here = f"{path}.{field.name}" if path else field.name
        row = isinstance(value, tuple) and any(dataclasses.is_dataclass(item) for item in value)
        for name, item in [(f"{here}.{i}", item) for i, item in enumerate(value)] if row else [(here, value)]:
            yield Entry(name, item, bases, docs.get(field.name, ""))
            if dataclasses.is_dataclass(item):
                yield from entries(item, name)


def _component_types(hint: Any) -> Iterator[type]:
    """The classes of llmlab (or of the user) that a type hint mentions."""
    arms = typing.get_args(hint)
    if arms and typing.get_origin(hint) in (typing.Union, types.UnionType, tuple):
        for arm in arms:
            yield from _component_types(arm)
    elif isinstance(hint, type) and (dataclasses.is_dataclass(hint) or inspect.isabstract(hint)):
        yield hint


@functools.cache
def _field_docs(cls: type) -> dict[str, str]:
    """First paragraph of the docstring below each field; those of base classes too."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # a class made in an interactive session has no source
            continue
        definition = ast.parse(source).body[0]
        body = definition.body if isinstance(definition, ast.ClassDef) else []
        for field, below in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
                text = below.value.value if isinstance(below.value, ast.Constant) else None
                if isinstance(text, str):
                    docs[field.target.id] = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return docs


def concrete(base: type) -> list[type]:
    """The classes that can stand where `base` is asked for, as far as they are imported."""
    children = base.__subclasses__()
    # A class without fields that others derive from is a category, whether it has abstract methods or not.
    category = (
        inspect.isabstract(base) or not dataclasses.is_dataclass(base) or (children and not dataclasses.fields(base))
    )
    found = [] if category else [base]
    for child in children:
        found += [cls for cls in concrete(child) if cls not in found]
    return found


def _print_components(config: Any) -> None:
    """The part of the help that tyro does not print: the components, which have no flag of their own."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for entry in entries(config):
        if entry.is_component:
            absent = not dataclasses.is_dataclass(entry.value)
            name = f"[dim]{entry.value!r}[/dim]" if absent else f"[cyan]{type(entry.value).__name__}[/cyan]"
            choices = sorted({cls.__name__ for base in entry.bases for cls in concrete(base)})
            others = [choice for choice in choices if choice != type(entry.value).__name__]
            doc = escape(entry.doc) + (f" [dim](or {', '.join(others)})[/dim]" if others else "")
            table.add_row(entry.path, name, doc)
    console = Console(highlight=False)
    console.print("\n[bold]Components[/bold] are chosen in Python, in the file:\n")
    console.print(table)


# --- what there is not -----------------------------------------------------------------------------------------------


def _explain(config: Any, unknown: Sequence[str], file: str) -> str:
    """One line for every argument that is no flag; what follows an unknown flag is its value."""
    lines: list[str] = []
    known = list(entries(config))
    after_flag = False
    for argument in unknown:
        if argument.startswith("--"):
            lines.append(_explain_flag(argument.split("=", 1)[0], known, file))
            after_flag = True
        elif not after_flag:
            lines.append(f"unexpected argument {argument!r}: values follow a flag, as in --train.steps 100")
    return "\n".join(lines) if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _explain_flag(flag: str, known: Sequence[Entry], file: str) -> str:
    path = flag.removeprefix("--").replace("-", "_")
    by_path = {entry.path: entry for entry in known}
    # The longest beginning of the path that exists.
    names = path.split(".")
    beginnings = (".".join(names[:count]) for count in range(len(names), 0, -1))
    owner = next((by_path[beginning] for beginning in beginnings if beginning in by_path), None)
    values = [entry.path for entry in known if not entry.is_component]
    row = [
        entry for entry in known if entry.path.rpartition(".")[0] == path and entry.path.rpartition(".")[2].isdigit()
    ]
    if row:
        first = _some_flags(row[0].path, values)
        return f"{flag} is a row of {len(row)} components, chosen in {file}; the first one's values are {first}"
    if owner is None or not owner.is_component:
        return f"there is no {flag}{_did_you_mean(path, values)}"
    name = owner.path.rsplit(".", 1)[-1]
    classes = [cls.__name__ for base in owner.bases for cls in concrete(base)]
    if not dataclasses.is_dataclass(owner.value):
        example = f"{name}={classes[0]}(...)" if classes else f"{name}=..."
        if owner.value == ():
            example = f"{name}=({classes[0] if classes else ''}(...),)"
        others = f" (or {', '.join(classes[1:])})" if classes[1:] else ""
        return f"there is no {flag}: {owner.path} is {owner.value!r} here; set it in {file}: {example}{others}"
    kind = type(owner.value).__name__
    below = [value for value in values if value.startswith(owner.path + ".")]
    if path == owner.path:
        return f"{flag} is a component ({kind}), chosen in {file}; its values are {_some_flags(path, values)}"
    return f"there is no {flag}: {owner.path} is {kind}(...){_did_you_mean(path, below, values)}"


def _some_flags(component: str, values: Sequence[str]) -> str:
    below = [value for value in values if value.startswith(component + ".")]
    return (", ".join(_flag(value) for value in below[:8]) or "none") + (", ..." if len(below) > 8 else "")


def _did_you_mean(path: str, *candidate_lists: Sequence[str]) -> str:
    """The up to three nearest names, from the first list that has near ones."""
    last = path.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> float:
        end = candidate.rsplit(".", 1)[-1]
        whole = difflib.SequenceMatcher(None, path, candidate).ratio()
        ends = 1.0 if last in end or end in last else difflib.SequenceMatcher(None, last, end).ratio()
        return (whole + ends) / 2

    for candidates in candidate_lists:
        likely = {candidate: likeness(candidate) for candidate in candidates}
        near = sorted((name for name in candidates if likely[name] > 0.6), key=lambda name: -likely[name])
        if near := [candidate for candidate in near if likely[candidate] > likely[near[0]] - 0.1]:
            return f"; did you mean {' or '.join(_flag(candidate) for candidate in near[:3])}?"
    fields = ", ".join(_flag(candidate) for candidate in candidate_lists[0])
    return f"; it has {fields}" if len(candidate_lists) > 1 and fields else "; --help lists all flags"


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")
