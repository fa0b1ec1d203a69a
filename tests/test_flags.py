"""Values change on the command line, and whatever is no flag gets a message that says what to do instead."""

import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmlab.config import load_experiment_file
from llmlab.flags import entries, parse

EXPERIMENT = '''
import abc
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Norm(abc.ABC):
    @abc.abstractmethod
    def build(self): ...


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """Root mean square."""

    epsilon: float = 1e-6
    """Added to the variance [of a row]."""

    def build(self): ...


@dataclass(frozen=True, kw_only=True)
class LayerNorm(RMSNorm):
    """Mean and variance."""

    bias: bool = True
    """Whether to add a learned bias."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Scaled dot-product attention."""

    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int | None = None
    """Key and value heads."""
    qk_norm: Norm | None = None
    """Normalises queries and keys."""

    def __post_init__(self):
        if 12 % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide 12")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay."""

    peak_lr: float = 1e-3
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    groups: tuple[Attention, ...] = ()
    """Parameter groups."""
    nesterov: bool = False
    """Look ahead."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long."""

    steps: int = 100
    """Updates."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim."""

    model: tuple[Attention, ...] = (Attention(), Attention())
    """The blocks."""
    norm: Norm | None = LayerNorm()
    """The last norm."""
    optimizer: AdamW = AdamW()
    """The optimizer."""
    train: Train = Train()
    """The run."""
    initialize_from: str | None = None
    """Where the weights come from."""


def config():
    return Experiment()
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("experiments") / "mine.py"
    path.write_text(EXPERIMENT)
    return load_experiment_file(path)


def run(module: ModuleType, *argv: str) -> Any:
    return parse(module.config(), argv, prog="llmlab train mine.py", file="mine.py")


def refusal(module: ModuleType, *argv: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        run(module, *argv)
    return str(caught.value)


def test_without_flags_the_config_is_what_the_file_says(module: ModuleType) -> None:
    assert run(module) == module.config()


def test_each_flag_changes_its_field_and_nothing_else(module: ModuleType) -> None:
    changed = run(
        module,
        *("--optimizer.peak-lr", "3e-4", "--train.precision=bfloat16", "--optimizer.betas", "0.8", "0.9"),
        *("--model.1.num_kv_heads", "2", "--norm.bias", "False", "--initialize-from", "somewhere"),
        *("--optimizer.nesterov", "True"),
    )
    assert changed == module.Experiment(
        model=(module.Attention(), module.Attention(num_kv_heads=2)),
        norm=module.LayerNorm(bias=False),
        optimizer=module.AdamW(peak_lr=3e-4, betas=(0.8, 0.9), nesterov=True),
        train=module.Train(precision="bfloat16"),
        initialize_from="somewhere",
    )


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("--optimiser.peak-lr", "--optimizer.peak-lr"),
        ("--optimizer.peek-lr", "--optimizer.peak-lr"),
        ("--optimizer.peek_lr", "--optimizer.peak-lr"),
        ("--optimizer.lr", "--optimizer.peak-lr"),
        ("--peak-lr", "--optimizer.peak-lr"),
        ("--train.step", "--train.steps"),
        ("--steps", "--train.steps"),
        ("--norm.epsilom", "--norm.epsilon"),
        ("--initialise-from", "--initialize-from"),
    ],
)
def test_a_typo_suggests_the_nearest_name_first(module: ModuleType, typo: str, meant: str) -> None:
    for argv in ([typo, "3"], [f"{typo}=3"], [typo, "-3"]):
        message = refusal(module, *argv)
        assert message.startswith(f"there is no {typo}")
        assert message.split("did you mean ")[1].split(" or ")[0].rstrip("?") == meant


def test_all_unknown_flags_are_listed_at_once(module: ModuleType) -> None:
    message = refusal(module, "--train.step", "3", "--optimizer.peek-lr", "1", "2")
    assert [line.strip() for line in message.splitlines() if line] == [
        "there is no --train.step: train is Train(...); did you mean --train.steps?",
        "there is no --optimizer.peek-lr: optimizer is AdamW(...); did you mean --optimizer.peak-lr?",
    ]


def test_a_stray_value_is_refused(module: ModuleType) -> None:
    assert "unexpected argument 'stray'" in refusal(module, "stray", "--train.steps", "3")


def test_an_absent_component_says_how_to_set_it_in_python(module: ModuleType) -> None:
    for flag in ("--model.0.qk-norm.epsilon", "--model.0.qk_norm"):
        assert refusal(module, flag, "1") == (
            f"there is no {flag}: model.0.qk_norm is None here; set it in mine.py: qk_norm=RMSNorm(...) (or LayerNorm)"
        )
    assert "groups=(Attention(...),)" in refusal(module, "--optimizer.groups.0.num-heads", "3")


def test_a_component_is_no_flag_and_its_values_are_named(module: ModuleType) -> None:
    message = refusal(module, "--norm", "RMSNorm")
    assert message == (
        "--norm is a component (LayerNorm), chosen in mine.py; its values are --norm.epsilon, --norm.bias"
    )
    assert "--model is a row of 2 components" in refusal(module, "--model", "3")


def test_a_name_like_no_other_lists_what_the_component_has(module: ModuleType) -> None:
    assert "it has --train.steps, --train.precision" in refusal(module, "--train.xyzzy", "3")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--train.steps", "many"], "invalid literal for int"),
        (["--train.precision", "float8"], "float32"),
        (["--train.steps"], "Missing value"),
        (["--model.0.num-heads", "5"], "num_heads=5 does not divide 12"),
    ],
)
def test_a_value_that_does_not_fit_exits_with_2(module: ModuleType, argv: list[str], expected: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        run(module, *argv)
    assert caught.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


def test_help_lists_every_field_with_its_default_and_its_doc(module: ModuleType, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        run(module, "--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for entry in entries(module.config()):
        assert entry.doc
        assert entry.doc in text
        name = entry.path if entry.is_component else "--" + entry.path.replace("_", "-")
        lines = text[text.index(name) :].splitlines()[:2]
        if not entry.is_component and not isinstance(entry.value, tuple):
            assert f"(default: {entry.value})" in " ".join(lines)
    # What only Python can set: what it is now, and what could stand there.
    line = next(line for line in text.splitlines() if line.startswith("model.1.qk_norm"))
    assert " ".join(line.split()) == "model.1.qk_norm None Normalises queries and keys. (or LayerNorm, RMSNorm)"


def test_thirty_two_blocks_parse_fast(module: ModuleType) -> None:
    config = module.Experiment(model=tuple(module.Attention() for _ in range(32)))
    start = time.process_time()
    parsed = parse(config, ["--model.31.num-heads", "2"], prog="llmlab", file="mine.py")
    seconds = time.process_time() - start
    assert parsed.model[31].num_heads == 2
    assert seconds < 2  # 0.1 s on an idle core; the type checks of tests and a busy machine add to it


def test_a_file_missing_its_docstrings_still_parses(tmp_path: Path) -> None:
    path = tmp_path / "bare.py"
    path.write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\ndef config(): return A()\n"
    )
    bare = load_experiment_file(path)
    assert parse(bare.config(), ["--x", "2"], prog="llmlab").x == 2
    assert [entry.doc for entry in entries(bare.config())] == [""]
