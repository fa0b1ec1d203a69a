"""What holds for every launching script alike."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import SCRIPTS, Cloud

EXPERIMENT = "experiments/quickstart.py"
# Script -> words that make it do all that it can.
RUNS = {
    "create.sh": ["--wait", "nano"],
    "status.sh": ["nano"],
    "setup.sh": ["nano"],
    "run.sh": ["nano", EXPERIMENT],
    "logs.sh": ["--follow", "nano"],
    "ssh.sh": ["nano", "df", "-h"],
    "babysit.sh": ["--delete-on-exit", "nano", EXPERIMENT],
    "delete.sh": ["--yes", "nano"],
    "xpk.sh": ["nano", EXPERIMENT],
    "gke.sh": ["nano", EXPERIMENT],
    "sky.sh": ["nano", EXPERIMENT],
    "slurm.sh": ["nano", EXPERIMENT],
    "slurm/train.sbatch": ["llmlab", "train", EXPERIMENT],
    "worker.sh": ["start", "nano", "llmlab", "train", EXPERIMENT],
}
SHELL_FILES = sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*/*.sbatch")])


def test_the_table_of_scripts_is_complete():
    assert {str(path.relative_to(SCRIPTS)) for path in SHELL_FILES} == {*RUNS, "lib.sh"}


def test_shellcheck_has_nothing_to_say():
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (it comes with the dev extra)")
    found = subprocess.run([shellcheck, *map(str, SHELL_FILES)], capture_output=True, text=True, cwd="/")
    assert found.stdout + found.stderr == ""
    assert found.returncode == 0


@pytest.mark.parametrize("script", RUNS)
def test_help_says_how_to_use_it(cloud: Cloud, script: str):
    result = cloud.run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ")
    assert "--dry-run" in result.stdout
    assert cloud.calls() == []


@pytest.mark.parametrize("script", RUNS)
def test_dry_run_prints_commands_and_calls_nothing(cloud: Cloud, script: str):
    before = sorted(cloud.directory.rglob("*"))
    result = cloud.run(script, "--dry-run", *RUNS[script], IMAGE="registry/llmlab", CLUSTER="pool")
    assert result.returncode == 0, result.stderr
    assert "nano" in result.stdout or EXPERIMENT in result.stdout
    assert cloud.calls() == []
    assert sorted(cloud.directory.rglob("*")) == before


# Scripts that decide by what they see (status, delete, babysit) print a plan instead; gke.sh has its own test.
STRAIGHT = ["create.sh", "setup.sh", "run.sh", "logs.sh", "ssh.sh", "xpk.sh", "sky.sh", "slurm.sh"]


@pytest.mark.parametrize("script", STRAIGHT)
def test_a_dry_run_prints_the_very_words_that_are_run(cloud: Cloud, script: str):
    words = [word for word in RUNS[script] if word != "--wait"]
    words += ["--name", 'it\'s $HOME `x` "y" \\ *'] if EXPERIMENT in words else []
    settings = {"IMAGE": "registry/llmlab", "CLUSTER": "pool"}
    printed = cloud.run(script, "--dry-run", *words, **settings).stdout
    for line in printed.splitlines():
        subprocess.run(["bash", "-c", line], env=cloud.environment, cwd=cloud.directory, check=True)
    pasted = cloud.calls()
    (cloud.fake / "calls").unlink()
    assert cloud.run(script, *words, **settings).returncode == 0
    assert cloud.calls() == pasted != []


@pytest.mark.parametrize("script", [script for script in RUNS if script not in ("worker.sh", "slurm/train.sbatch")])
def test_a_name_the_cloud_cannot_carry_is_refused_with_one_it_can(cloud: Cloud, script: str):
    words = ["My run $1" if word == "nano" else word for word in RUNS[script]]
    result = cloud.run(script, *words, IMAGE="registry/llmlab", CLUSTER="pool")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "try my-run-1\n" in result.stderr


@pytest.mark.parametrize(
    ("name", "proposal"), [("$(reboot)", "reboot"), ("9lives", "lives"), ("a" * 41, "a" * 40), ("42", "run-1")]
)
def test_the_proposed_name_is_accepted(cloud: Cloud, name: str, proposal: str):
    result = cloud.run("create.sh", name)
    assert (result.returncode, cloud.calls()) == (2, [])
    assert f"try {proposal}\n" in result.stderr
    assert cloud.run("create.sh", proposal).returncode == 0


def test_settings_come_from_flag_then_environment_then_file_and_nothing_in_them_is_executed(cloud: Cloud):
    marker = cloud.directory / "executed"
    (cloud.directory / "env").write_text(
        "# a comment\n\n"
        "LLMLAB_ZONE=from-file\n"
        "LLMLAB_PROJECT=from-file   # and a remark\n"
        f'LLMLAB_NETWORK="$(touch {marker}) `touch {marker}` $HOME"\n'
        "LLMLAB_SUBNETWORK='two words'\n"
    )
    assert cloud.run("create.sh", "--subnetwork", "from flag", "nano", ZONE="from-environment").returncode == 0
    (call,) = cloud.calls()
    assert call[call.index("--network") + 1] == f"$(touch {marker}) `touch {marker}` $HOME"
    assert call[call.index("--subnetwork") + 1] == "from flag"
    assert call[-4:] == ["--zone", "from-environment", "--project", "from-file"]
    assert not marker.exists()


def test_an_unknown_setting_or_flag_is_an_error_that_names_it(cloud: Cloud):
    (cloud.directory / "env").write_text("LLMLAB_ZOEN=a\n")
    result = cloud.run("create.sh", "nano")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "env:1: there is no setting LLMLAB_ZOEN" in result.stderr
    assert "LLMLAB_ZONE" in result.stderr
    (cloud.directory / "env").write_text("")
    result = cloud.run("create.sh", "--zoen", "a", "nano")
    assert (result.returncode, cloud.calls()) == (2, [])
    assert "there is no flag --zoen" in result.stderr


def test_env_example_names_every_setting_and_only_those(cloud: Cloud):
    shutil.copy(SCRIPTS / "env.example", cloud.directory / "env")
    assert cloud.run("create.sh", "--dry-run", "nano").returncode == 0  # no unknown setting
    given = {line.split("=")[0] for line in (SCRIPTS / "env.example").read_text().splitlines() if line[:1] not in "#"}
    (cloud.directory / "env").write_text("LLMLAB_NONE=1\n")
    known = cloud.run("create.sh", "nano").stderr.split("there are ")[1].split()
    assert given == set(known) - {"LLMLAB_SOURCE"}  # SOURCE: the repository itself unless a flag says otherwise


def test_scripts_are_executable():
    assert [path.name for path in SHELL_FILES if path.name != "lib.sh" and not os.access(path, os.X_OK)] == []
