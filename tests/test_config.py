"""Configs survive the trip to JSON and back, and reading one never runs anything that is not a config."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmlab.config import ABSENT, compact, config_hash, difference, from_json, load, load_experiment_file, save, to_json
from llmlab.training.config import Train

EXPERIMENT = '''
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


class Color(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Any norm."""


@dataclass(frozen=True, kw_only=True)
class RMSNorm(Norm):
    """Root mean square."""

    epsilon: float = 1e-6
    """Added to the variance."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention."""

    num_heads: int = 4
    """Query heads."""
    norm: Norm | None = None
    """Normalises queries and keys."""

    def __post_init__(self):
        if 12 % self.num_heads:
            raise ValueError(f"num_heads={self.num_heads} does not divide 12")


@dataclass(frozen=True)
class Model:
    """The model."""

    pattern: tuple[Attention, ...]
    """Repeated through depth."""
    final_norm: Norm | None = RMSNorm()
    """Before the head."""
    dims: tuple[int, int] = (1, 2)
    """Two dims."""
    betas: tuple[float, ...] = ()
    """Any number of floats."""
    mode: Literal["auto", "fast", 3] = "auto"
    """How."""
    color: Color = Color.RED
    """Which."""
    path: Path | None = None
    """Where."""
    rates: dict[str, float] | None = None
    """By name."""
    mixture: tuple[tuple[str, float], ...] = (("a", 0.5),)
    """Name and weight."""
    peak_lr: float = 1e-3
    """Highest rate."""
    flag: bool = False
    """Yes or no."""
    anything: Any = None
    """No matter what."""

    @dataclass(frozen=True)
    class Nested:
        """A class within a class."""

        inner: int = 0


def config():
    return Model(pattern=(Attention(), Attention(num_heads=6, norm=RMSNorm(epsilon=1e-3))))
'''


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    path = tmp_path_factory.mktemp("experiments") / "mine.py"
    path.write_text(EXPERIMENT)
    return load_experiment_file(path)


def test_loading_what_was_saved_gives_an_equal_object(module: ModuleType) -> None:
    config = module.config()
    loaded = from_json(to_json(config), module.Model, experiment=module)
    assert loaded == config
    assert type(loaded.pattern[1].norm) is module.RMSNorm


@given(
    numbers=st.lists(st.floats(allow_nan=False)),
    mode=st.sampled_from(["auto", "fast", 3]),
    name=st.text(),
    rates=st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False)),
    flag=st.booleans(),
    anything=st.none() | st.booleans() | st.integers() | st.text(),
)
def test_every_value_that_fits_its_hint_survives(module, numbers, mode, name, rates, flag, anything) -> None:
    config = module.Model(
        pattern=(),
        final_norm=None,
        betas=tuple(numbers),
        mode=mode,
        color=module.Color.BLUE,
        path=Path("some") / "where",
        rates=rates,
        mixture=((name, 1.0), (name, 2.0)),
        flag=flag,
        anything=anything,
    )
    text = to_json(config)
    assert from_json(text, module.Model, experiment=module) == config
    json.loads(text, parse_constant=pytest.fail)  # no Infinity or NaN: other languages could not read them


def test_not_a_number_survives(module: ModuleType) -> None:
    config = module.Model(pattern=(), peak_lr=math.nan)
    assert math.isnan(from_json(to_json(config), module.Model, experiment=module).peak_lr)


def test_a_saved_config_loads_after_its_experiment_file_has_changed(tmp_path: Path) -> None:
    path, run = tmp_path / "mine.py", tmp_path / "run"
    run.mkdir()
    path.write_text(EXPERIMENT)
    config = load_experiment_file(path).config()
    path.write_text("raise RuntimeError('no longer what it was')")
    save(config, run)
    loaded = load(run, object)
    assert type(loaded) is not type(config)  # it comes from the run's copy of the file
    assert difference(loaded, config) == []
    changed = dataclasses.replace(config, final_norm=None, color=type(config.color).BLUE)
    assert [path for path, _, _ in difference(loaded, changed)] == ["final_norm", "color"]


def test_a_config_of_llmlabs_classes_is_saved_without_a_copy_of_the_file(tmp_path: Path) -> None:
    train = Train(steps=1, batch_size=1, sequence_length=1)
    save(train, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert load(tmp_path, Train) == train
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json: this JSON is no Train:"):
        load(tmp_path, Train)
    with pytest.raises(FileNotFoundError, match="no run directory"):
        load(tmp_path / "nowhere", Train)


def test_a_nested_class_and_a_class_of_llmlab_survive(module: ModuleType) -> None:
    nested = module.Model.Nested(inner=3)
    assert from_json(to_json(nested), module.Model.Nested, experiment=module) == nested
    train = Train(steps=10, batch_size=4, sequence_length=8, precision="bfloat16")
    assert from_json(to_json(train), Train) == train
    assert json.loads(to_json(train))["class"] == "llmlab.training.config.Train"


def test_saving_lists_every_value_that_does_not_fit_its_hint(module: ModuleType) -> None:
    config = module.Model(pattern=[], dims=(1, 2, 3), mode="slow", path="text", rates={"a": "b"}, anything=print)
    with pytest.raises(ValueError, match="cannot be written as JSON") as caught:
        to_json(config)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["pattern", "dims", "mode", "path", "rates.a", "anything"]
    assert lines[0].strip() == "pattern: expected tuple[Attention, ...], got []"


def test_a_class_from_elsewhere_is_refused_when_saving(module: ModuleType) -> None:
    model = module.Model(pattern=(), anything=pytest.Config.InvocationParams(args=(), plugins=None, dir=Path()))
    # (attrs classes are no dataclasses) a dataclass of another library:
    assert "anything" in _problems(lambda: to_json(model))


def _problems(action) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  every caller looks at the whole text
        action()
    return str(caught.value)


def test_loading_lists_every_unknown_and_ill_typed_field(module: ModuleType) -> None:
    data = json.loads(to_json(module.config()))
    data["colour"] = "RED"
    data["pattern"][0]["num_heads"] = "four"
    data["pattern"][1]["norm"]["class"] = "experiment.Attention"
    text = _problems(lambda: from_json(json.dumps(data), module.Model, experiment=module))
    for expected in (
        "colour: Model has no such field",
        "pattern.0.num_heads: expected int, got 'four'",
        "pattern.1.norm: expected Norm | None",
    ):
        assert expected in text.replace('"', "'")


def test_a_field_that_has_come_since_a_config_was_written_takes_its_default(module: ModuleType) -> None:
    data = json.loads(to_json(module.config()))
    del data["betas"]
    loaded = from_json(json.dumps(data), module.Model, experiment=module)
    assert loaded == dataclasses.replace(module.config(), betas=())
    del data["pattern"]  # has none
    assert "pattern: missing" in _problems(lambda: from_json(json.dumps(data), module.Model, experiment=module))


def test_loading_runs_the_classes_own_checks(module: ModuleType) -> None:
    text = to_json(module.config()).replace('"num_heads": 4', '"num_heads": 5')
    assert "pattern.0: num_heads=5 does not divide 12" in _problems(
        lambda: from_json(text, module.Model, experiment=module)
    )


@pytest.mark.parametrize(
    "tag",
    [
        "os.system",
        "subprocess.Popen",
        "this.s",  # importing it would print
        "llmlab",
        "llmlab.config.Path",
        "llmlab.config.json.JSONDecoder",
        "llmlab.config.from_json",
        "llmlab.config.__class__",
        "llmlab.no_such_module.Thing",
        "llmlab.training.config.Missing",
        "llmlab.__main__.main",
        "experiment.Path",
        "experiment.config",
        "experiment.nothing",
        "",
        "...",
        None,
        3,
        ["llmlab.training.config.Train"],
    ],
)
def test_a_tag_that_names_no_config_class_is_refused_and_not_imported(module: ModuleType, tag: object, capsys) -> None:
    text = json.dumps({"class": tag, "steps": 1})
    before = set(sys.modules)
    _problems(lambda: from_json(text, object, experiment=module))
    assert not {name for name in set(sys.modules) - before if not name.startswith("llmlab")}
    assert capsys.readouterr().out == ""


def test_a_class_of_the_experiment_needs_its_file(module: ModuleType) -> None:
    assert "was not given" in _problems(lambda: from_json(to_json(module.config()), module.Model))


def test_the_top_level_class_is_checked(module: ModuleType) -> None:
    assert "expected Train, got Model" in _problems(
        lambda: from_json(to_json(module.config()), Train, experiment=module)
    )
    assert "not JSON" in _problems(lambda: from_json("{", Train))


def test_difference_names_the_paths_that_differ(module: ModuleType) -> None:
    left = module.config()
    right = module.Model(
        pattern=(module.Attention(num_heads=2), *left.pattern[1:], module.Attention()),
        final_norm=None,
        dims=(1, 3),
        rates={"a": 1.0},
    )
    assert difference(left, left) == []
    assert difference(left, right) == [
        ("pattern.0.num_heads", 4, 2),
        ("pattern.2", ABSENT, module.Attention()),
        ("final_norm", module.RMSNorm(), None),
        ("dims", (1, 2), (1, 3)),
        ("rates", None, {"a": 1.0}),
    ]


def test_the_hash_depends_on_values_only(module: ModuleType, tmp_path: Path) -> None:
    elsewhere = tmp_path / "other_name.py"
    elsewhere.write_text(EXPERIMENT)
    again = load_experiment_file(elsewhere)
    assert again.Model is not module.Model
    assert config_hash(again.config()) == config_hash(module.config())
    assert config_hash(module.Model(pattern=(), peak_lr=1)) == config_hash(module.Model(pattern=(), peak_lr=1.0))
    assert config_hash(module.Model(pattern=(), peak_lr=2)) != config_hash(module.Model(pattern=(), peak_lr=1.0))


def test_the_hash_is_the_same_in_another_process() -> None:
    program = (
        "from llmlab.config import config_hash; from llmlab.training.config import Train;"
        "print(config_hash(Train(steps=3, batch_size=2, sequence_length=4)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert found == config_hash(Train(steps=3, batch_size=2, sequence_length=4))


def test_the_same_file_is_the_same_module_and_a_changed_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "experiment.py"
    path.write_text("VALUE = 1\ndef config(): return VALUE\n")
    first = load_experiment_file(path)
    assert load_experiment_file(path) is first
    path.write_text("VALUE = 2\ndef config(): return VALUE\n")
    assert load_experiment_file(path).config() == 2


def test_a_file_may_import_its_sibling_but_not_shadow_a_library(tmp_path: Path) -> None:
    (tmp_path / "sibling_of_this_test.py").write_text("VALUE = 7\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    path = tmp_path / "experiment.py"
    path.write_text("import json, sibling_of_this_test as s\ndef config(): return s.VALUE\n")
    before = list(sys.path)
    assert load_experiment_file(path).config() == 7
    assert sys.path == before
    del sys.modules["sibling_of_this_test"]


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "quickstart.py").write_text("def config(): ...\n")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*quikstart.py; did you mean quickstart.py"):
        load_experiment_file(tmp_path / "quikstart.py")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\n", ["there is no function config()"]),
        ("def config(:\n", ["line 1", "def config(:", "SyntaxError"]),
        ("import no_such_library\n", ["line 1", "import no_such_library", "ModuleNotFoundError"]),
        ("def helper():\n    return 1 / 0\n\nhelper()\n", ["line 4", "line 2, in helper", "ZeroDivisionError"]),
    ],
)
def test_an_error_inside_the_file_shows_the_files_own_lines(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "experiment.py"
    path.write_text(text)
    message = _problems(lambda: load_experiment_file(path))
    for part in expected:
        assert part in message
    assert "importlib" not in message
    assert "config.py" not in message.replace(str(path), "")


def test_a_directory_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "config.yaml"):
        assert "is not an experiment" in _problems(lambda path=path: load_experiment_file(path))


def test_the_compact_form_shows_what_is_not_default(module: ModuleType) -> None:
    assert (
        compact(module.config()) == "Model(pattern=(Attention(), Attention(num_heads=6, norm=RMSNorm(epsilon=0.001))))"
    )
    assert compact((1.0, "a")) == "(1.0, 'a')"
    assert compact(ABSENT) == "absent"
