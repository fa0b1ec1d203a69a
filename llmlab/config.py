"""Configs: frozen dataclass trees, their JSON form, their command-line flags, and the Python files that hold them.

A config is plain Python: it is written in a file, checked by a type checker, and compared with `==`. This module
carries it elsewhere and back without loss:

    to_json / from_json     text in a run directory. Every dataclass carries its class ("class": "llmlab.optim.AdamW"),
                            so a field typed as a base class comes back as what it was.
    save / load             the same as a file, with a copy of the experiment file where its classes are needed.
    load_experiment_file    the Python file itself.
    difference              what two configs disagree on, path by path.

Reading a config never imports anything but llmlab's own modules and the experiment file that it is given, and never
calls anything but the constructor of a dataclass: config.json files are data, and may come from strangers.
"""

import contextlib
import dataclasses
import difflib
import enum
import hashlib
import importlib
import importlib.util
import json
import math
import os
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

# Modules made from experiment files are called this plus a hash of path and text; their classes are tagged
# "experiment.Name", whatever the file is called and wherever it lies.
_EXPERIMENT_MODULE = "llmlab_experiment_"
_EXPERIMENT_TAG = "experiment"
_CLASS = "class"  # a keyword of Python, so that no field can have this name


# --- JSON ------------------------------------------------------------------------------------------------------------


def to_json(config: Any) -> str:
    """The config as indented JSON text that `from_json` turns back into an equal object.

    Raises ValueError, listing every offender, where a value does not match its field's type hint or has no JSON form.
    """
    problems: list[str] = []
    data = _encode(config, type(config), "", problems)
    if problems:
        raise ValueError(_listed(f"this {type(config).__name__} cannot be written as JSON", problems))
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def from_json(text: str, expected: type[T], *, experiment: types.ModuleType | None = None) -> T:
    """The object that `to_json` wrote.

    `expected` is the class (or a base class) of the result; `experiment` is the loaded experiment file, needed where
    the config holds classes that are defined there. Raises ValueError that lists every unknown, missing or ill-typed
    field at once.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    problems: list[str] = []
    config = _decode(data, expected, "", problems, experiment)
    if problems:
        raise ValueError(_listed(f"this JSON is no {expected.__name__}", problems))
    return config


def save(config: Any, directory: Path) -> None:
    """Writes `config.json`, and beside it a copy of the experiment's file where the config holds classes from there."""
    files, homes = {"config.json": to_json(config).encode()}, set[str]()
    _homes(config, homes)
    if homes:  # first, so that config.json never stands without it
        files = {"experiment.py": sys.modules[homes.pop()].__dict__["__source__"], **files}
    for name, content in files.items():
        temporary = directory / f".{name}.{os.getpid()}"
        temporary.write_bytes(content)
        temporary.replace(directory / name)


def load(directory: Path, expected: type[T]) -> T:
    """The config that `save` wrote. Raises FileNotFoundError and, naming the file, the ValueErrors of `from_json`."""
    own, path = directory / "experiment.py", directory / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FileNotFoundError(f"{directory} is no run directory: it has no config.json") from None
    try:
        return from_json(text, expected, experiment=load_experiment_file(own) if own.exists() else None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def defining_file(config: Any) -> Path | None:
    """The experiment file that defines classes of this tree, where there is one."""
    homes = set[str]()
    _homes(config, homes)
    return Path(str(sys.modules[homes.pop()].__file__)) if homes else None


def _homes(config: Any, found: set[str]) -> None:
    """Adds the names of the experiment modules that define classes of this tree; there is at most one in practice."""
    if dataclasses.is_dataclass(config):
        if type(config).__module__.startswith(_EXPERIMENT_MODULE):
            found.add(type(config).__module__)
        for field in dataclasses.fields(config):
            _homes(getattr(config, field.name), found)
    elif isinstance(config, (tuple, dict)):
        for item in config.values() if isinstance(config, dict) else config:
            _homes(item, found)


def config_hash(config: Any, length: int = 8) -> str:
    """Hexadecimal digest of the config's JSON form: equal configs have equal hashes, on every machine."""
    return json_hash(json.loads(to_json(config)), length)


def json_hash(data: Any, length: int = 8) -> str:
    """The `config_hash` of a config whose JSON form was read from a file: its classes are not needed for that."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


def _listed(headline: str, problems: Sequence[str]) -> str:
    return headline + ":" + "".join(f"\n  {problem}" for problem in problems)


def _at(path: str, name: str | int) -> str:
    return f"{path}.{name}" if path else str(name)


def _tag(cls: type) -> str | None:
    """How JSON names a class: None if it lives where reading could not find it again."""
    if "<locals>" in cls.__qualname__:
        return None
    if cls.__module__.startswith(_EXPERIMENT_MODULE):
        return f"{_EXPERIMENT_TAG}.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}" if cls.__module__.split(".")[0] == "llmlab" else None


def _resolve(tag: Any, experiment: types.ModuleType | None) -> type:
    """The dataclass that a tag names. Raises ValueError for anything else, before importing anything foreign."""
    parts = tag.split(".") if isinstance(tag, str) else [""]
    if len(parts) < 2 or not all(part.isidentifier() and not part.startswith("__") for part in parts):
        raise ValueError(f"{tag!r} is not the name of a class")
    if parts[0] == _EXPERIMENT_TAG:
        if experiment is None:
            raise ValueError(f"{tag} is defined in the experiment's own file, which was not given")
        found, home = _attribute(experiment, parts[1:]), experiment.__name__
    elif parts[0] == "llmlab":
        found, home = None, "llmlab"
        for split in range(len(parts) - 1, 0, -1):  # the longest prefix that is a module; the rest are classes
            name = ".".join(parts[:split])
            if name in sys.modules or _is_module(name):
                found = _attribute(importlib.import_module(name), parts[split:])
                break
    else:
        raise ValueError(f"{tag} is neither llmlab's nor the experiment file's; other modules are never imported")
    if not (
        isinstance(found, type) and f"{found.__module__}.".startswith(f"{home}.") and dataclasses.is_dataclass(found)
    ):
        raise ValueError(f"{tag} does not exist or is not a config class")
    return found


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent is a class or does not exist
        return False


def _attribute(owner: Any, names: Sequence[str]) -> Any:
    for name in names:
        owner = vars(owner).get(name) if isinstance(owner, (type, types.ModuleType)) else None
    return owner


def _fields(cls: type) -> dict[str, Any]:
    """Name -> resolved type hint of every field that the constructor takes, in order."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def field_types(cls: type) -> dict[str, Any]:
    """Name -> type of every field that a config class's constructor takes, in order."""
    return dict(_fields(cls))


def mismatches(value: Any, hint: Any, path: str = "") -> list[str]:
    """Where a value does not match a type, as lines that begin with the place; empty where it does."""
    problems: list[str] = []
    _encode(value, hint, path, problems)
    return problems


def _arms(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; a tuple of one for anything else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _show(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return "None" if hint is types.NoneType else hint.__name__
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(_show(arm) for arm in typing.get_args(hint))
    origin = typing.get_origin(hint)
    if isinstance(origin, type):
        inner = ", ".join("..." if arm is Ellipsis else _show(arm) for arm in typing.get_args(hint))
        return f"{origin.__name__}[{inner}]"
    return str(hint).removeprefix("typing.")


def _encode(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    """JSON form of a value that must match the hint; appends to problems where it does not."""
    if len(arms := _arms(hint)) > 1:
        return _first_arm(arms, path, problems, value, lambda arm, found: _encode(value, arm, path, found))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _encode_dataclass(value, hint, path, problems)
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is tuple and isinstance(value, tuple) and (hints := _element_hints(inner, len(value))) is not None:
        return [_encode(item, hints[i], _at(path, i), problems) for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        inner = inner or (str, Any)
        return {key: _encode(item, inner[1], _at(path, key), problems) for key, item in value.items()}
    if origin is Path and isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, enum.Enum) and type(value) is hint:
        return value.name
    if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else repr(float(value))  # JSON has no infinity
    if _is_scalar(value, hint):
        return value
    problems.append(f"{path}: expected {_show(hint)}, got {value!r}")
    return None


def _encode_dataclass(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
    cls, tag = type(value), _tag(type(value))
    if tag is None:
        problems.append(
            f"{path or 'top level'}: {cls.__name__} is defined in {cls.__module__}, where reading does not look; "
            "define it at the top level of the experiment's file"
        )
    elif hint is not Any and not (isinstance(hint, type) and isinstance(value, hint)):
        problems.append(f"{path}: expected {_show(hint)}, got {cls.__name__}")
    else:
        fields = _fields(cls).items()
        return {_CLASS: tag} | {n: _encode(getattr(value, n), inner, _at(path, n), problems) for n, inner in fields}
    return None


def _decode(data: Any, hint: Any, path: str, problems: list[str], experiment: types.ModuleType | None) -> Any:
    """The value that `_encode` wrote under that hint; appends to problems where it did not."""
    if len(arms := _arms(hint)) > 1:
        return _first_arm(arms, path, problems, data, lambda arm, found: _decode(data, arm, path, found, experiment))
    if isinstance(data, dict) and _CLASS in data:
        return _decode_dataclass(data, hint, path, problems, experiment)
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is tuple and isinstance(data, list) and (hints := _element_hints(inner, len(data))) is not None:
        return tuple(_decode(item, hints[i], _at(path, i), problems, experiment) for i, item in enumerate(data))
    if origin is dict and isinstance(data, dict):
        inner = inner or (str, Any)
        return {key: _decode(item, inner[1], _at(path, key), problems, experiment) for key, item in data.items()}
    if origin is Path and isinstance(data, str):
        return Path(data)
    if isinstance(hint, type) and issubclass(hint, enum.Enum) and isinstance(data, str) and data in hint.__members__:
        return hint[data]
    if origin is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if origin is float and isinstance(data, str) and data in ("inf", "-inf", "nan"):
        return float(data)
    if _is_scalar(data, hint):
        return data
    problems.append(f"{path or 'top level'}: expected {_show(hint)}, got {_short(data)}")
    return None


def _decode_dataclass(
    data: dict[str, Any], hint: Any, path: str, problems: list[str], experiment: types.ModuleType | None
) -> Any:
    place, before = path or "top level", len(problems)
    try:
        cls = _resolve(data[_CLASS], experiment)
    except ValueError as error:
        problems.append(f"{place}: {error}")
        return None
    if hint is not Any and not (isinstance(hint, type) and issubclass(cls, hint)):
        problems.append(f"{place}: expected {_show(hint)}, got {cls.__name__}")
        return None
    hints = _fields(cls)
    for name in data:
        if name not in hints and name != _CLASS:
            problems.append(f"{_at(path, name)}: {cls.__name__} has no such field; it has {', '.join(hints) or 'none'}")
    # A field that has come since has a default, by which everything is as it was: older runs stay readable.
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    problems += [f"{_at(path, name)}: missing" for name in hints if name not in data and name in required]
    values = {
        name: _decode(data[name], inner, _at(path, name), problems, experiment)
        for name, inner in hints.items()
        if name in data
    }
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:  # the class's own validation
        problems.append(f"{place}: {error}")
        return None


def _first_arm(
    arms: tuple[Any, ...], path: str, problems: list[str], value: Any, convert: Callable[[Any, list[str]], Any]
) -> Any:
    """The conversion by the first alternative of a union that fits."""
    attempts: list[list[str]] = [[] for _ in arms]
    for arm, found in zip(arms, attempts, strict=True):
        result = convert(arm, found)
        if not found:
            return result
    # An alternative that was the right one but for something further inside says what is wrong.
    refused = f"{path}: expected"
    inside = [found for found in attempts if not all(problem.startswith(refused) for problem in found)]
    problems += inside[0] if inside else [f"{refused} {' | '.join(map(_show, arms))}, got {value!r}"]
    return None


def _element_hints(inner: tuple[Any, ...], length: int) -> tuple[Any, ...] | None:
    """The hint of every element of a tuple; None where the tuple's length does not fit its hint."""
    if not inner:
        return (Any,) * length
    if len(inner) == 2 and inner[1] is Ellipsis:
        return (inner[0],) * length
    return inner if len(inner) == length else None


def _is_scalar(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(hint))
    if hint is Any:
        return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
    if hint is None or hint is types.NoneType:
        return value is None
    return hint in (bool, int, str) and type(value) is hint


def _short(data: Any) -> str:
    text = json.dumps(data)
    return text if len(text) <= 80 else text[:77] + "..."


# --- difference ------------------------------------------------------------------------------------------------------


class _Absent(enum.Enum):
    ABSENT = "absent"

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent.ABSENT
"""Stands for the side of a difference that has no such element."""


def difference(left: Any, right: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Every (path, left value, right value) on which two configs disagree; empty for equal configs.

    Where the classes differ, the two objects are one entry: their fields do not compare.
    """
    if dataclasses.is_dataclass(left) and dataclasses.is_dataclass(right) and _same_class(left, right):
        left, right = ({name: getattr(side, name) for name in _fields(type(side))} for side in (left, right))
    if isinstance(left, tuple) and isinstance(right, tuple) and _has_parts(left + right):
        entries: list[tuple[str, Any, Any]] = []
        for i in range(max(len(left), len(right))):
            pair = [side[i] if i < len(side) else ABSENT for side in (left, right)]
            entries += difference(pair[0], pair[1], _at(path, i))
        return entries
    if isinstance(left, dict) and isinstance(right, dict):
        keys = [*left, *(key for key in right if key not in left)]
        return [
            entry for key in keys for entry in difference(left.get(key, ABSENT), right.get(key, ABSENT), _at(path, key))
        ]
    if isinstance(left, enum.Enum) and isinstance(right, enum.Enum) and _same_class(left, right):
        left, right = left.name, right.name
    same = left == right or (left != left and right != right)  # the second: nan equals nan here
    return [] if same else [(path, left, right)]


def _same_class(left: Any, right: Any) -> bool:
    """Whether two objects are of one class; an experiment's class and the one in its run's copy of the file are."""
    tag = _tag(type(left))
    return type(left) is type(right) or (tag is not None and tag == _tag(type(right)))


def compact(value: Any) -> str:
    """Python form of a value, with only those fields of configs that are not at their defaults."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(compact, value)) + ("," if len(value) == 1 else "") + ")"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    parts = []
    for field in dataclasses.fields(value):
        content = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.init and (type(content) is not type(default) or content != default):
            parts.append(f"{field.name}={compact(content)}")
    return f"{type(value).__name__}({', '.join(parts)})"


def _has_parts(items: Sequence[Any]) -> bool:
    """Whether a tuple is a row of components rather than one value: (1, 2) is compared as a whole."""
    return any(dataclasses.is_dataclass(item) for item in items)


# --- experiment files ------------------------------------------------------------------------------------------------


def load_experiment_file(path: str | Path) -> types.ModuleType:
    """The module that a Python file defines; the same object for the same path and text.

    The file may import its siblings by name. Raises FileNotFoundError for a missing file and ValueError, with the
    lines of the file that led there, for an error inside it or a file without a `config()` function.
    """
    path = Path(path).resolve()
    if path.is_dir() or path.suffix != ".py":
        raise ValueError(f"{path} is not an experiment: an experiment is a Python file with a config() function")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise FileNotFoundError(f"there is no file {path}{hint}") from None
    name = _EXPERIMENT_MODULE + hashlib.sha256(bytes(path) + b"\0" + text).hexdigest()[:16]
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the path ends in .py
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__source__"] = text  # the file as it was when it ran, for the run's copy
    sys.modules[name] = module  # dataclasses and inspect look a class's module up here
    sys.path.append(str(path.parent))  # at the end: a sibling must not shadow a library
    try:
        with own_errors(path):
            exec(compile(text, path, "exec", dont_inherit=True), module.__dict__)
            if not callable(getattr(module, "config", None)):
                raise ValueError("there is no function config() that returns an Experiment")
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextlib.contextmanager
def own_errors(path: Path) -> Iterator[None]:
    """Turns an exception raised while running a user's file into a ValueError that shows that file's lines only."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = "".join(traceback.format_list(frames))
        what = "".join(traceback.format_exception_only(error))
        raise ValueError(f"{path} cannot be used:\n{where}{what}".rstrip()) from error
