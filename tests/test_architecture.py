"""The walls of the house: who may import whom, and what nobody may do. Read as a table, checked against the code."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llmlab"
SOURCES = sorted(PACKAGE.rglob("*.py"))

ALL = {"*"}
# Room (or top-level file) -> the rooms of llmlab that it may import besides itself.
MAY_IMPORT: dict[str, set[str]] = {
    "sharding": set(),
    "nn": {"sharding", "buckets"},  # buckets: the directory in which compiled kernels are kept
    "models": {"nn", "sharding"},
    "tokenizers": {"buckets"},
    "data": {"tokenizers", "buckets"},
    "objectives": set(),
    "optim": set(),
    "training": {"sharding", "nn", "tokenizers", "data", "objectives", "optim", "config"},
    "infer": {"nn", "models", "sharding", "tokenizers"},
    "adapt": {"nn", "models"},
    "compress": {"nn", "models"},
    # data, tokenizers: rows come with what a teacher said of them; runs: a teacher is whatever `llmlab.load` opens
    "distill": {"models", "objectives", "infer", "training", "nn", "sharding", "data", "tokenizers", "buckets", "runs"},
    "align": {"infer", "objectives", "training"},
    "evals": {"infer", "tokenizers"},
    "study": {"training", "evals", "config", "flags", "experiment", "runs", "objectives", "display", "nn"},
    "plan": {"training", "sharding"},
    "display": {"training", "plan"},
    "interpret": {"nn", "models", "infer", "training"},  # nn: what is looked into are its layers
    "privacy": {"models", "infer", "training"},
    "retrieval": {"models", "infer", "training"},
    "export": {"models", "infer", "training"},
    "config": set(),
    "buckets": set(),
    "flags": set(),
    "experiment": ALL,
    "runs": ALL,
    "cli": ALL,
    "commands": ALL,
    "__init__": ALL,
    "__main__": ALL,
}
# Imported under `if TYPE_CHECKING:` only: training takes models as values and never makes one.
MAY_NAME: dict[str, set[str]] = {"training": {"models", "experiment"}}

# Library -> the rooms that may import it; libraries that are not listed are free.
ONLY_IN: dict[str, set[str]] = {
    "pickle": set(),
    "cloudpickle": set(),
    "dill": set(),
    "shelve": set(),
    "marshal": set(),
    "joblib": set(),
    "torch": set(),
    "transformers": set(),
    "tensorflow": set(),
    "matplotlib": {"display", "commands", "study", "interpret"},
    "starlette": {"infer"},
    "uvicorn": {"infer"},
    "jinja2": {"infer", "tokenizers"},
    "prometheus_client": {"infer"},
    "llguidance": {"infer"},
    "optuna": {"study"},
    "sentencepiece": {"tokenizers"},
}

# NNX's lifted transforms and optimizer carry graph bookkeeping; jax's own act on plain parameter trees.
FORBIDDEN_NNX = {"jit", "scan", "vmap", "pmap", "grad", "value_and_grad", "remat", "cond", "while_loop", "Optimizer"}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(tree: ast.AST, *, typing_only: bool = False) -> Iterator[tuple[int, str, bool]]:
    """(line, module, whether for type checkers only) of every import, also those inside functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, typing_only) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import llmlab's modules by their full name"
            # `from llmlab import data` imports llmlab.data
            names = [f"llmlab.{alias.name}" for alias in node.names] if node.module == "llmlab" else [node.module or ""]
            yield from ((node.lineno, name, typing_only) for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from imports(ast.Module([child], []), typing_only=True)
            for child in node.orelse:
                yield from imports(ast.Module([child], []), typing_only=typing_only)
        else:
            yield from imports(node, typing_only=typing_only)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def test_every_room_is_in_the_table() -> None:
    assert {room(path) for path in SOURCES} <= MAY_IMPORT.keys()


def trespasses(path: Path, tree: ast.AST) -> Iterator[str]:
    """Every import of this file that the tables above do not allow."""
    here = room(path)
    for line, module, typing_only in imports(tree):
        parts = module.split(".")
        if parts[0] == "llmlab" and len(parts) > 1 and parts[1] not in ("__version__", here):
            allowed = MAY_IMPORT[here] | (MAY_NAME.get(here, set()) if typing_only else set())
            if parts[1] not in allowed and allowed != ALL:
                yield f"{path}:{line}: {here} may not import {module}"
        elif here not in ONLY_IN.get(parts[0], {here}):
            yield f"{path}:{line}: {parts[0]} may be imported in {', '.join(ONLY_IN[parts[0]]) or 'no room'}"


def test_rooms_import_only_what_the_table_allows() -> None:
    assert [offender for path in SOURCES for offender in trespasses(path, parsed(path))] == []


@pytest.mark.parametrize(
    ("path", "text", "count"),
    [
        ("nn/a.py", "import jax\nfrom llmlab.sharding.rules import shard\nfrom llmlab.nn import masks", 0),
        ("nn/a.py", "from llmlab.models import gpt2", 1),
        ("nn/a.py", "from llmlab import models, __version__", 1),
        ("nn/a.py", "class A:\n  def f(self):\n    try:\n      import llmlab.data as d\n    except E: pass", 1),
        ("training/a.py", "import llmlab.models", 1),
        (
            "training/a.py",
            "if TYPE_CHECKING:\n  from llmlab.models.config import T\nelse:\n  import matplotlib.pyplot",
            1,
        ),
        ("training/a.py", "def f():\n  import pickle", 1),
        ("commands/a.py", "import matplotlib, llmlab.experiment", 0),
    ],
)
def test_the_walk_finds_imports_wherever_they_are(path: str, text: str, count: int) -> None:
    assert len(list(trespasses(PACKAGE / path, ast.parse(text)))) == count


def test_modules_are_transformed_by_jax_and_never_by_nnx() -> None:
    offenders = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr in FORBIDDEN_NNX and ast.unparse(node.value) == "nnx"
    ]
    assert offenders == []


def test_data_is_never_run() -> None:
    offenders = []
    for path in SOURCES:
        runs_experiment_files = path == PACKAGE / "config.py"
        for node in ast.walk(parsed(path)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
            if called == "eval" or (called == "exec" and not runs_experiment_files):
                offenders.append(f"{path}: {ast.unparse(node)}")
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                offenders.append(f"{path}:{node.value.lineno}: {ast.unparse(node)}")
    assert offenders == []


def test_no_file_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc"}
    everything = [
        path for folder in ("llmlab", "experiments", "tests", "tpu_scripts") for path in (ROOT / folder).rglob("*")
    ]
    assert not [path for path in everything if path.stem in drawers]


def _texts() -> Iterator[Path]:
    folders = ("llmlab", "experiments", "tests", "tpu_scripts", ".ci")
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".md", ".json", ".sh", ".toml", ".txt", ".yaml", "") and path.is_file():
                yield path
    yield from (path for path in sorted(ROOT.iterdir()) if path.suffix in (".md", ".toml", ".txt"))


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"(?<![\w.])/(?:root|home|work|Users|opt|mnt)/\w|pythonhosted|\bpypi\.|(?:--|_)index[-_]url")
    offenders = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in _texts()
        if path != Path(__file__)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if machine.search(line)
    ]
    assert not offenders
    assert not [path.name for path in ROOT.iterdir() if path.suffix == ".lock"]


@pytest.mark.parametrize("module", ["llmlab", "llmlab.cli", "llmlab.config", "llmlab.flags", "llmlab.training.config"])
def test_what_the_command_line_imports_does_not_import_jax(module: str) -> None:
    program = f"import sys, {module}\nsys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
