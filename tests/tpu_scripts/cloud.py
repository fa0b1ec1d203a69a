"""A cloud that exists only on PATH: fake tools that record what they were told and answer what a test has scripted."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"
TOOLS = ("gcloud", "kubectl", "xpk", "sky", "sbatch", "srun", "scontrol")
ZONE = ["--zone", "us-test1-a"]
EVERY_WORKER = ["--node", "all", "--worker", "all"]


@dataclass(frozen=True)
class Answer:
    """What a tool prints and exits with. `hang`: prints, then sleeps until it is interrupted."""

    stdout: str = ""
    stderr: str = ""
    code: int = 0
    hang: bool = False


def own(state: str, name: str = "nano") -> str:
    """The answer of `describe` for a queued resource that create.sh made."""
    return f"{state}\t{name}"


ABSENT = Answer(stderr="ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: no such resource", code=1)


def workers(*statuses: str) -> str:
    """What worker.sh prints on one worker per status."""
    return "\n".join(f"llmlab-job host-{index} {status}" for index, status in enumerate(statuses))


class Cloud:
    """The fake tools in a directory, and how to run a script with them first on PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fake = directory / "fake"
        self.home = directory / "home"
        for path in (self.fake, self.home, directory / "bin"):
            path.mkdir()
        for tool in TOOLS:
            shutil.copy(Path(__file__).with_name("fake_tool.sh"), directory / "bin" / tool)
            (directory / "bin" / tool).chmod(0o755)
        (directory / "env").write_text("")
        self.environment = {
            "PATH": f"{directory / 'bin'}:/usr/bin:/bin",
            "HOME": str(self.home),
            "FAKE": str(self.fake),
            "TMPDIR": str(directory),
            "LLMLAB_ENV_FILE": str(directory / "env"),  # not the developer's own tpu_scripts/env
            "LLMLAB_ZONE": "us-test1-a",
            "LLMLAB_ACCELERATOR_TYPE": "v6e-16",
            "LLMLAB_RUNTIME_VERSION": "v2-alpha-tpuv6e",
            "LLMLAB_BUCKET": "gs://bucket/runs",
            "LLMLAB_REPOSITORY": "https://example.org/llmlab.git",
            "LLMLAB_POLL_SECONDS": "0.001",
        }

    def answer(self, topic: str, *answers: Answer | str) -> None:
        """Scripts the answers to the calls of a topic (see fake_tool.sh), in order; the last one stays."""
        (self.fake / topic).mkdir()
        for number, given in enumerate(answers, start=1):
            answer = Answer(given) if isinstance(given, str) else given
            first = "hang" if answer.hang else str(answer.code)
            text = f"{first}\n{answer.stderr}\n{answer.stdout}" + ("\n" if answer.stdout else "")
            (self.fake / topic / str(number)).write_text(text)

    def run(self, script: str, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Runs a script to its end. Settings are environment variables, without LLMLAB_."""
        environment = self.environment | {f"LLMLAB_{key}": value for key, value in settings.items()}
        return subprocess.run(
            ["bash", str(SCRIPTS / script), *words],
            env=environment,
            cwd=self.directory,
            capture_output=True,
            text=True,
            timeout=20,
            stdin=subprocess.DEVNULL,
        )

    def interrupt(self, script: str, *words: str, during: str) -> subprocess.CompletedProcess[str]:
        """Runs a script and presses Ctrl-C (a SIGINT to its process group) once a call contains the word `during`."""
        process = subprocess.Popen(
            # What a shell starts in the background ignores SIGINT, tests and their children too, and bash cannot trap
            # a signal that it was born to ignore.
            ["env", "--default-signal=INT", "bash", str(SCRIPTS / script), *words],
            env=self.environment,
            cwd=self.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 30
            while not any(during in word for call in self.calls() for word in call):
                assert time.monotonic() < deadline, f"no call with {during!r}: {self.calls()}"
                time.sleep(0.01)
            time.sleep(0.05)  # the fake has recorded its call; let it begin to hang
            os.killpg(process.pid, signal.SIGINT)
            stdout, stderr = process.communicate(timeout=30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self) -> list[list[str]]:
        """Every call so far: the tool and its words, exactly."""
        path = self.fake / "calls"
        text = path.read_text() if path.exists() else ""
        return [record.split("\0")[:-1] for record in text.split("\x1e\0")[:-1]]

    def steps(self) -> list[str]:
        """What was changed, in order: create, delete, setup, start, stop (looks are left out)."""
        return [step for call in self.calls() if (step := _step(call))]


def _step(call: list[str]) -> str | None:
    if call[:4] != ["gcloud", "compute", "tpus", "queued-resources"]:
        return None
    if call[4] in ("create", "delete"):
        return call[4]
    command = option(call, "--command") if "--command" in call else ""
    found = re.search(r"^bash llmlab-worker.sh (setup|start|stop) ", command)
    return found.group(1) if found else None


def option(call: list[str], flag: str) -> str:
    """The word after a flag."""
    return call[call.index(flag) + 1]
