"""How processes find each other, and what they tell each other, in real processes that need no devices."""

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmlab.sharding.cluster import Address, detected, explicit, has_tpu

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def test_flags_come_before_variables_and_are_completed_by_them() -> None:
    variables = {"LLMLAB_COORDINATOR": "a:1", "LLMLAB_NUM_PROCESSES": "4", "LLMLAB_PROCESS_ID": "3"}
    assert explicit(None, None, None, {}) is None
    assert explicit(None, None, None, variables) == Address(coordinator="a:1", num_processes=4, process_id=3)
    assert explicit("b:2", None, 0, variables) == Address(coordinator="b:2", num_processes=4, process_id=0)


@pytest.mark.parametrize(
    ("values", "variables", "message"),
    [
        (("a:1", None, 0), {}, r"there is --coordinator=a:1, --process-id=0; add --num-processes \(or LLMLAB_NUM"),
        (("a:1", 2, 2), {}, "process_id=2 is not one of num_processes=2; they are numbered from 0 to 1"),
        (("a", 2, 0), {}, "coordinator='a' is not HOST:PORT"),
        (("a:1", 0, 0), {}, "num_processes=0 must be at least 1"),
        (("a:1", 2, None), {"LLMLAB_PROCESS_ID": "one"}, "LLMLAB_PROCESS_ID='one' is not a whole number"),
    ],
)
def test_an_address_that_cannot_be_is_refused(
    values: tuple[Any, Any, Any], variables: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explicit(*values, variables)


@pytest.mark.parametrize(
    ("environment", "tpu", "kind"),
    [
        ({}, False, None),
        (SLURM, False, "slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, False, None),
        ({name: SLURM[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}, False, None),  # a batch script without srun
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, None),
        ({"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2"}, True, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_PLATFORMS": "cpu"}, True, None),
        ({}, True, "tpu"),  # the metadata server of a TPU machine knows
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ],
)
def test_schedulers_are_recognised(environment: dict[str, str], tpu: bool, kind: str | None) -> None:
    assert detected(environment, tpu=tpu) == kind


def test_tpu_chips_are_recognised_by_their_device_files(tmp_path: Path) -> None:
    assert not has_tpu(tmp_path)
    (tmp_path / "vfio").mkdir()
    (tmp_path / "vfio" / "vfio").touch()  # the driver without a device
    assert not has_tpu(tmp_path)
    (tmp_path / "vfio" / "0").touch()
    assert has_tpu(tmp_path)
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "accel0").touch()
    assert has_tpu(tmp_path / "older")


TALK = """
import json, signal, sys, time
from llmlab.sharding import cluster

port, index = sys.argv[1:]
before = signal.getsignal(signal.SIGTERM)
cluster.join(coordinator=f"localhost:{port}", num_processes=3, process_id=int(index), timeout=60)
here = cluster.here()


def failing():
    raise FileNotFoundError("no such corpus")


def outcome(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


said = {
    "first": here.is_first,
    "led": [here.lead("number", lambda: 10 * here.index + turn) for turn in range(2)],
    "gathered": here.gather("names", f"p{here.index}"),
    "error": outcome(lambda: here.lead("broken", failing)),
    "same": outcome(lambda: here.check_same(tokenizer="abc", data=f"fingerprint of {here.index % 2}")),
    "signals": signal.getsignal(signal.SIGTERM) == before,
}
if here.index == 0:
    try:
        here.meet("the end")
    except cluster.Departed as error:
        said["departed"] = [str(error), error.exit_code, error.signal]
        here.depart(str(error), exit_code=error.exit_code, signal=error.signal)
print(json.dumps(said), flush=True)
if here.index == 1:  # as in a collective that waits for the one that leaves
    cluster._NOTICE_SECONDS = 0.5
    with here.watched():
        time.sleep(600)
if here.index == 2:
    here.depart("stopped by SIGTERM", exit_code=42, signal=15)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.scale
def test_three_processes_decide_together_hear_of_errors_and_leave_together() -> None:
    command = [sys.executable, "-c", TALK, str(free_port())]
    processes = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [42, 42, 42], outputs
    said = [json.loads(output.splitlines()[-1]) for output, _ in outputs]
    assert [s["first"] for s in said] == [True, False, False]
    assert all(s["led"] == [0, 1] for s in said)
    assert all(s["gathered"] == ["p0", "p1", "p2"] for s in said)
    assert said[0]["error"] == "FileNotFoundError: no such corpus"
    assert all(s["error"] == "ValueError: process 0: no such corpus" for s in said[1:])
    assert all("the data of process 1 is not that of process 0" in s["same"] for s in said)
    assert all(s["signals"] for s in said)
    assert said[0]["departed"] == ["process 2 left: stopped by SIGTERM", 42, 15]
    assert "error: process 2 left: stopped by SIGTERM" in outputs[1][1]


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_in_vain_ends_with_a_message(index: int) -> None:
    join = (
        "from llmlab.sharding import cluster; cluster.join(coordinator=%r, num_processes=2, process_id=%d, timeout=1)"
    )
    address = f"localhost:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", join % (address, index)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert f"error: 2 processes did not meet at {address} within 1 s (this is process {index}); start" in done.stderr
