"""Compilations as processes: one, or several at once, each answered from the cache where it was done before.

An answer depends on the request, on the experiment's file, on the versions of the compiler and on llmlab's own source,
and is kept under a hash of all of them.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import llmlab
from llmlab.plan.report import Plan
from llmlab.plan.topology import ENVIRONMENT

Stage = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """How to have requests answered."""

    module: str
    """The worker, for `python -m`: reads a request on stdin and writes lines that begin with `mark`."""
    mark: str
    """Begins the worker's messages: {"stage": name}, {"error": text} or {"plan": plan}."""
    remarks: Callable[[str], list[str]]
    """Finds in the compiler's own output what the plan should warn of."""
    cache: Path
    """Directory of answers."""
    versions: Mapping[str, str]
    """Of what decides the answer."""

    def answer(self, request: Mapping[str, Any], stage: Stage = lambda name: None) -> Plan:
        """The plan for a request.

        Args:
            request: plain data; "file" names the experiment's file, whose content counts too.
            stage: called as the worker goes on; not at all where the answer is in the cache.

        Raises:
            ValueError: the request cannot be answered; the message is the worker's.
            RuntimeError: the worker failed; the message has the end of its output.
        """
        path = self.cache / f"{self.key(request)}.json"
        if path.exists():
            return Plan.from_json(json.loads(path.read_text(encoding="utf-8")))
        answer, stderr = self._ask(request, stage)
        plan = Plan.from_json(answer)
        plan = replace(plan, warnings=(*plan.warnings, *self.remarks(stderr)))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        temporary.write_text(json.dumps(plan.to_json()), encoding="utf-8")
        temporary.replace(path)
        return plan

    def answers(self, requests: Sequence[Mapping[str, Any]], *, at_once: int) -> Iterator[tuple[int, Plan | Exception]]:
        """(index of the request, its plan or what went wrong) as they come, `at_once` compiling side by side."""
        with ThreadPoolExecutor(max_workers=at_once) as threads:
            futures = {threads.submit(self.answer, request): index for index, request in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    error = future.exception()
                    if error is not None and not isinstance(error, (ValueError, RuntimeError)):
                        raise error
                    yield futures[future], future.result() if error is None else error
            except BaseException:  # also when the caller stops to listen: what has not begun need not
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def key(self, request: Mapping[str, Any]) -> str:
        """Hash of all that the answer depends on."""
        file = request.get("file")
        content = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
        parts = [{**request, "file": content}, dict(self.versions), source_digest()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _ask(self, request: Mapping[str, Any], stage: Stage) -> tuple[dict[str, Any], str]:
        """The worker's plan, and what was written to its stderr."""
        root = str(Path(llmlab.__file__).parents[1])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": paths}
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr,
            subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                text=True,
            ) as process,
        ):
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps(dict(request)))
                process.stdin.close()
                messages = self._listen(process.stdout, stage)
                code = process.wait()
            except BaseException:
                process.kill()
                raise
            stderr.seek(0)
            output = stderr.read()
        if "error" in messages:
            raise ValueError(messages["error"])
        if code or "plan" not in messages:
            raise RuntimeError(f"the process that compiles ended with code {code}:\n{output[-3000:]}")
        return messages["plan"], output

    def _listen(self, lines: Any, stage: Stage) -> dict[str, Any]:
        messages: dict[str, Any] = {}
        for line in lines:
            if line.startswith(self.mark):
                message = json.loads(line.removeprefix(self.mark))
                if "stage" in message:
                    stage(message["stage"])
                messages |= message
        return messages


def source_digest() -> str:
    """SHA-256 (hex) of llmlab's own source files."""
    root = Path(llmlab.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
