"""The real TPU compiler, which needs no TPU; in a process of its own, away from the CPU backend."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(program: str) -> Any:
    """What a program prints last, as JSON; the test is skipped where libtpu is not installed.

    The program asks for the compiler by topology: `jax.experimental.topologies.get_topology_desc(platform="tpu",
    topology_name="v5p:2x2x1")`.
    """
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; pip install 'llmlab[tpu]' brings it")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",  # nothing runs
        "LLMLAB_CPU_KERNELS": "0",  # which a TPU does not have
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # two tests may compile at once; there is no TPU to quarrel about
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
