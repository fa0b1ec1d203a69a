"""The command answers at once, and says what is wrong in one line and an exit code."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

import llmlab
from llmlab import __version__, cli

LLMLAB = [sys.executable, "-m", "llmlab"]


def call(*argv: str) -> tuple[int, str, str]:
    done = subprocess.run([*LLMLAB, *argv], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_help_answers_in_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert call("--help")[0] == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # 0.03 s on an idle core


def test_help_and_version_import_nothing_heavy() -> None:
    program = "import sys\nfrom llmlab.cli import main\nmain(['--help'])\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert not loaded & {"jax", "flax", "numpy", "tyro", "rich", "matplotlib", "tensorflow", "sentencepiece", "orbax"}
    for command, (_, summary) in [entry for section in cli.COMMANDS.values() for entry in section.items()]:
        assert f"{command} " in done.stdout
        assert summary in done.stdout
    assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_every_public_name_is_there_and_an_unknown_one_is_not() -> None:
    for name in llmlab.__all__:
        assert getattr(llmlab, name) is not None
    assert set(dir(llmlab)) >= set(llmlab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        llmlab.lode  # noqa: B018  the access is the test


@pytest.mark.parametrize("command", [name for section in cli.COMMANDS.values() for name in section])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main([command, "--help"])
    except SystemExit as done:  # argparse exits by itself
        code = done.code
    assert code == 0
    assert f"llmlab {command}" in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out.strip() == cli.help_text(color=False)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"llmlab {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["tokeniser"], "did you mean tokenizer?"),
        (["xyzzy"], "there are train, config"),
        (["experiments/quickstart.py"], "did you mean llmlab train experiments/quickstart.py?"),
        (["--jsn"], "no option --jsn"),
        (["config", "no/such/file.py"], "there is no file"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(argv: list[str], expected: str, capsys) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert len(err.splitlines()) == 1


def _command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    (tmp_path / "fake_command.py").write_text(f"def main(argv):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "fake_command", raising=False)
    monkeypatch.setitem(cli.COMMANDS, "Test", {"fake": ("fake_command", "for this test")})


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return 0", 0),
        ("return 42", 42),
        ("raise KeyboardInterrupt", 130),
        ("open('/no/such/file')", 2),
        ("from llmlab.config import from_json; from_json('{', int)", 2),
        ("raise RuntimeError('odd')", 1),
        ("import base64; base64.b64decode('x')", 1),  # binascii.Error is a ValueError, but not one of llmlab's
    ],
)
def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, body: str, code: int) -> None:
    _command(tmp_path, monkeypatch, body)
    assert cli.main(["fake"]) == code
    assert ("Traceback" in capsys.readouterr().err) == (code == 1)


def test_a_reader_that_stops_reading_is_no_error() -> None:
    program = (
        "import sys; from llmlab import cli; from llmlab.commands import config\n"
        "config.main = lambda argv: print('line\\n' * 100_000) or 0\n"
        "sys.exit(cli.main(['config']))"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "line\n"
    writer.stdout.close()
    assert writer.stderr is not None
    assert writer.stderr.read() == ""
    writer.stderr.close()
    assert writer.wait() == 0
