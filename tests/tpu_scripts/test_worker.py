"""worker.sh on a machine of our own: jobs really run, end, are stopped, and leave what babysit.sh reads."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tpu_scripts.cloud import SCRIPTS, Cloud, option

NASTY = ["a b", "$HOME", "it's", '"quoted"', "`id`", "$(id)", "back\\slash", "*", "", "line\nbreak", "ünï"]


class Worker:
    """A home directory with worker.sh in it, and a fake llmlab that records its words."""

    def __init__(self, home: Path) -> None:
        self.home = home
        shutil.copy(SCRIPTS / "worker.sh", home / "llmlab-worker.sh")
        (home / "llmlab").mkdir()
        (home / "llmlab-venv" / "bin").mkdir(parents=True)

        self.tool("mountpoint", '[[ -e "$2/mounted" ]]')
        self.tool("gcsfuse", 'printf "%s\\0" "$@" >>"$HOME/mounts"; touch "${@: -1}/mounted"')

    def llmlab(self, body: str) -> None:
        self.tool("llmlab", body)

    def tool(self, name: str, body: str) -> None:
        path = self.home / "llmlab-venv" / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\nset -u\n{body}\n")
        path.chmod(0o755)

    def shell(self, command: str) -> subprocess.CompletedProcess[str]:
        """What ssh does with a command: the login shell reads it, in the home directory."""
        environment = {"HOME": str(self.home), "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        return subprocess.run(
            ["bash", "-c", command], cwd=self.home, env=environment, capture_output=True, text=True, timeout=20
        )

    def tell(self, *words: str) -> str:
        return self.shell(shlex.join(["bash", "llmlab-worker.sh", *words])).stdout

    def status(self) -> str:
        return self.tell("state", "nano").split(" ", 2)[2].strip()

    def wait(self, status: str) -> None:
        deadline = time.monotonic() + 10
        while (now := self.status()) != status:
            assert time.monotonic() < deadline, f"{now} and not {status}"
            time.sleep(0.02)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    home = tmp_path / "worker"
    home.mkdir()
    worker = Worker(home)
    yield worker
    pid = home / "llmlab-jobs" / "nano" / "pid"
    if pid.exists() and worker.status() == "running":
        os.killpg(os.getpgid(int(pid.read_text())), signal.SIGKILL)


def test_every_word_reaches_llmlab_on_the_worker(cloud: Cloud, worker: Worker):
    worker.llmlab('printf "%s\\0" "$@" >"$HOME/words"')
    assert cloud.run("run.sh", "nano", "my experiments/a $b.py", *NASTY, "--out", "gs://b/a $b").returncode == 0
    assert worker.shell(option(cloud.calls()[0], "--command")).returncode == 0
    worker.wait("exited 0")
    words = (worker.home / "words").read_text().split("\0")[:-1]
    mounted = f"{worker.home}/llmlab-buckets/b"
    assert words == ["train", "my experiments/a $b.py", *NASTY, "--out", f"{mounted}/a $b"]
    mounts = (worker.home / "mounts").read_text().split("\0")[:-1]
    assert mounts == ["--implicit-dirs", "--metadata-cache-ttl-secs", "0", "b", mounted]


def test_a_bucket_is_mounted_once_and_only_for_out(worker: Worker):
    worker.llmlab('printf "%s\\0" "$@" >"$HOME/words"')
    command = ["llmlab", "train", "a.py", "--initialize-from", "gs://b/other", "--out=gs://b/runs/a"]
    for _ in range(2):
        worker.tell("start", "nano", *command)
        worker.wait("exited 0")
    words = (worker.home / "words").read_text().split("\0")[:-1]
    out = f"--out={worker.home}/llmlab-buckets/b/runs/a"
    assert words == ["train", "a.py", "--initialize-from", "gs://b/other", out]
    assert (worker.home / "mounts").read_text().count("--implicit-dirs") == 1


def test_a_bucket_that_cannot_be_mounted_starts_nothing_and_says_why(worker: Worker):
    worker.llmlab('touch "$HOME/started"')
    worker.tool("gcsfuse", 'echo "no permission for $3" >&2; exit 1')
    worker.tell("start", "nano", "llmlab", "train", "a.py", "--out", "gs://b/a")
    worker.wait("exited 1")
    assert not (worker.home / "started").exists()
    assert "no permission" in worker.tell("logs", "nano", "20", "once")


@pytest.mark.parametrize("code", [0, 1, 2, 42])
def test_the_exit_code_is_kept(worker: Worker, code: int):
    worker.llmlab(f"echo hello; exit {code}")
    assert worker.status() == "absent"
    assert worker.tell("start", "nano", "llmlab", "train").endswith(" started\n")
    worker.wait(f"exited {code}")
    log = worker.tell("logs", "nano", "100", "once")
    assert "hello\n" in log
    assert f"exit code {code}\n" in log


def test_starting_twice_is_starting_once_and_another_command_is_refused(worker: Worker):
    worker.llmlab('echo "$@" >>"$HOME/starts"; sleep 20')
    assert worker.tell("start", "nano", "llmlab", "train", "a").endswith(" started\n")
    assert worker.tell("start", "nano", "llmlab", "train", "a").endswith(" running\n")
    other = worker.shell("bash llmlab-worker.sh start nano llmlab train b")
    assert other.returncode == 3
    assert "another command runs" in other.stderr
    setup = worker.shell("bash llmlab-worker.sh setup clone nowhere main")
    assert setup.returncode == 3
    assert "its code is not replaced under it" in setup.stderr
    await_file(worker.home / "starts")
    assert (worker.home / "starts").read_text() == "train a\n"


# Answers a SIGTERM as llmlab does: saves for a while, then 42.
SAVES = 'trap "echo one more signal >>\\"$HOME/signals\\"; sleep 0.2; exit 42" TERM; touch "$HOME/up"; sleep 20 & wait'


def await_file(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_stop_lets_it_save(worker: Worker):
    worker.llmlab(SAVES.replace("sleep 20", "sleep 0.6"))
    worker.tell("start", "nano", "llmlab", "train")
    await_file(worker.home / "up")
    assert worker.tell("stop", "nano").endswith(" exited 42\n")


def test_a_shutdown_that_signals_every_process_reaches_llmlab_once(worker: Worker):
    worker.llmlab(SAVES)
    worker.tell("start", "nano", "llmlab", "train")
    await_file(worker.home / "up")
    pid = int((worker.home / "llmlab-jobs" / "nano" / "pid").read_text())
    os.killpg(os.getpgid(pid), signal.SIGTERM)
    worker.wait("exited 42")
    assert (worker.home / "signals").read_text() == "one more signal\n"


def test_a_machine_that_went_down_leaves_a_killed_job(worker: Worker):
    worker.llmlab('touch "$HOME/up"; exec sleep 20')
    worker.tell("start", "nano", "llmlab", "train")
    await_file(worker.home / "up")
    pid = int((worker.home / "llmlab-jobs" / "nano" / "pid").read_text())
    os.killpg(os.getpgid(pid), signal.SIGKILL)
    worker.wait("exited 137")


def test_setup_installs_a_clone_and_an_upload_with_a_python_that_is_new_enough(worker: Worker, tmp_path: Path):
    shutil.rmtree(worker.home / "llmlab-venv")
    shutil.rmtree(worker.home / "llmlab")
    source = tmp_path / "source $1"
    source.mkdir()
    git = ["git", "-C", str(source), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet", "-b", "main"], ["commit", "--quiet", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    binaries = tmp_path / "python"
    binaries.mkdir()
    python = binaries / "python3.12"
    python.write_text(
        "#!/usr/bin/env bash\n"
        "[[ $1 == -m ]] || exit 0\n"
        'echo "$@" >>"$HOME/log"\n'
        "mkdir -p llmlab-venv/bin\n"
        "cat >llmlab-venv/bin/pip <<'PIP'\n"
        '#!/bin/sh\necho pip "$@" >>"$HOME/log"\n'
        "PIP\n"
        "cp llmlab-venv/bin/pip llmlab-venv/bin/python\n"
        "chmod +x llmlab-venv/bin/*\n"
    )
    python.chmod(0o755)
    command = shlex.join(["bash", "llmlab-worker.sh", "setup", "clone", str(source), "main"])
    result = worker.shell(f'PATH="{binaries}:$PATH"; {command}')
    assert result.returncode == 0, result.stderr
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "second"], check=True)
    assert worker.shell(command).returncode == 0  # again: the new commit, the same environment
    history = subprocess.check_output(["git", "-C", str(worker.home / "llmlab"), "log", "--format=%s"], text=True)
    assert history == "second\nfirst\n"
    install = "pip install --quiet -c llmlab/constraints.txt -e llmlab[tpu]\n"
    assert (worker.home / "log").read_text() == f"-m venv llmlab-venv\n{install}{install}"

    (source / "a b$.py").write_text("code")
    subprocess.run(["tar", "-C", str(source), "-czf", str(worker.home / "up.tar.gz"), "./a b$.py"], check=True)
    assert worker.shell("bash llmlab-worker.sh setup upload up.tar.gz").returncode == 0
    assert [path.name for path in (worker.home / "llmlab").iterdir()] == ["a b$.py"]
