"""Compilations as processes: answers, the cache, and what goes wrong, with a worker that compiles nothing."""

import json
from pathlib import Path
from typing import Any

import pytest

from llmlab.plan.jobs import Compiler
from llmlab.plan.report import Memory, Plan

WORKER = """
import json, os, sys
from pathlib import Path
request = json.loads(sys.stdin.read())
with open(request["log"], "a") as log:
    log.write(os.environ["JAX_PLATFORMS"] + "\\n")
print("something of the compiler's own")
print("@test " + json.dumps({"stage": "compile"}), flush=True)
print("the compiler is worried", file=sys.stderr)
if request["do"] == "refuse":
    print("@test " + json.dumps({"error": "no such thing"}))
    sys.exit(2)
if request["do"] == "crash":
    raise MemoryError("gone")
print("@test " + json.dumps({"plan": request["plan"]}))
"""

PLAN = Plan(
    topology="v5p:2x2x1", num_chips=4, mesh={"data": 4}, tokens=8, num_parameters=3,
    memory=Memory(capacity=10, parameters=1, optimizer=2, other=0, batch=1),
)  # fmt: skip


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    (tmp_path / "worker_of_test.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return Compiler(
        module="worker_of_test",
        mark="@test ",
        remarks=lambda text: [line for line in text.splitlines() if "worried" in line],
        cache=tmp_path / "cache",
        versions={"jax": "1"},
    )


def request(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {"do": "answer", "file": None, "log": str(tmp_path / "log"), "plan": PLAN.to_json(), **changes}


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().split()


def test_an_answer_is_computed_once_and_carries_what_the_compiler_printed(compiler: Compiler, tmp_path: Path) -> None:
    stages: list[str] = []
    first = compiler.answer(request(tmp_path), stages.append)
    again = compiler.answer(request(tmp_path), stages.append)
    assert first == again
    assert first.warnings == ("the compiler is worried",)
    assert (stages, calls(tmp_path)) == (["compile"], ["cpu"])


def test_another_request_file_or_version_is_another_answer(compiler: Compiler, tmp_path: Path) -> None:
    file = tmp_path / "experiment.py"
    file.write_text("one")
    keys = {compiler.key(request(tmp_path)), compiler.key(request(tmp_path, topology="v4:2x2x1"))}
    keys.add(compiler.key(request(tmp_path, file=str(file))))
    file.write_text("two")
    keys.add(compiler.key(request(tmp_path, file=str(file))))
    other = Compiler(**{**vars(compiler), "versions": {"jax": "2"}})
    keys.add(other.key(request(tmp_path)))
    assert len(keys) == 5


def test_a_refusal_is_the_users_error_and_a_crash_is_not(compiler: Compiler, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such thing"):
        compiler.answer(request(tmp_path, do="refuse"))
    with pytest.raises(RuntimeError, match="gone"):
        compiler.answer(request(tmp_path, do="crash"))
    assert not (tmp_path / "cache").exists()


def test_several_at_once_answer_each_for_itself(compiler: Compiler, tmp_path: Path) -> None:
    requests = [request(tmp_path, number=0), request(tmp_path, do="crash"), request(tmp_path, number=2)]
    found = dict(compiler.answers(requests, at_once=2))
    assert [type(found[index]) for index in range(3)] == [Plan, RuntimeError, Plan]
    assert len(calls(tmp_path)) == 3


def test_a_plan_is_plain_json_with_what_follows_from_it() -> None:
    data = json.loads(json.dumps(PLAN.to_json()))
    assert data["memory"]["total"] == 4
    assert data["memory"]["fits"] is True
    assert Plan.from_json(data) == PLAN
