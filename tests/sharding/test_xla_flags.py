"""XLA's flags: who gets which, that the user's come first, and that the compilers know them all."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmlab.sharding import xla_flags
from llmlab.sharding.cluster import has_tpu
from llmlab.sharding.xla_flags import TABLE, added, expected_platform
from tests import tpu_compiler


@pytest.mark.parametrize(
    ("platforms", "expected"), [("cpu", "cpu"), ("cuda", "gpu"), ("gpu,cpu", "gpu"), ("tpu,cpu", "tpu")]
)
def test_jax_platforms_says_what_to_expect(platforms: str, expected: str, tmp_path: Path) -> None:
    assert expected_platform({"JAX_PLATFORMS": platforms}, devices=tmp_path) == expected


def test_without_it_device_files_say_what_to_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"libtpu"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in installed or None)
    assert expected_platform({}, devices=tmp_path) == "cpu"
    (tmp_path / "nvidia0").touch()
    assert expected_platform({}, devices=tmp_path) == "cpu"  # a GPU that this jax cannot use
    installed.add("jax_cuda12_plugin")
    assert expected_platform({}, devices=tmp_path) == "gpu"
    (tmp_path / "accel0").touch()
    assert expected_platform({}, devices=tmp_path) == "tpu"


def test_flags_that_are_set_stay_and_the_rest_of_the_table_is_added() -> None:
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    (variable, value), *others = added("gpu", {"XLA_FLAGS": given}).items()
    assert (variable, others) == ("XLA_FLAGS", [])
    assert value.endswith(given)
    assert value.count("latency_hiding") == 1
    assert "--xla_gpu_enable_pipelined_all_gather=true" in value.split()
    assert added("gpu", {"XLA_FLAGS": value}) == {}
    assert list(added("tpu", {})) == ["LIBTPU_INIT_ARGS"]
    assert added("cpu", {}) == {}


def test_flags_are_applied_unless_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_own=1")
    monkeypatch.setattr(xla_flags, "expected_platform", lambda environment: "tpu")
    environment = xla_flags.os.environ
    xla_flags.apply("none")
    monkeypatch.setenv("LLMLAB_XLA_FLAGS", "none")
    xla_flags.apply()
    assert environment["LIBTPU_INIT_ARGS"] == "--xla_own=1"
    monkeypatch.setenv("LLMLAB_XLA_FLAGS", "sometimes")
    with pytest.raises(ValueError, match="LLMLAB_XLA_FLAGS=sometimes is neither default nor none"):
        xla_flags.apply()
    xla_flags.apply("default")
    assert "--xla_tpu_enable_async_collective_fusion=true" in environment["LIBTPU_INIT_ARGS"].split()
    assert "--xla_own=1" in environment["LIBTPU_INIT_ARGS"].split()


def test_xla_knows_every_flag_for_gpus() -> None:
    """It parses all platforms' flags on all platforms, and ends the process at one that it does not know."""
    code = "import os; os.environ['XLA_FLAGS'] = {!r}; import jax; jax.devices()"
    known = added("gpu", {})["XLA_FLAGS"]
    results = [
        subprocess.run([sys.executable, "-c", code.format(flags)], capture_output=True, text=True, check=False)
        for flags in (known, f"{known} --xla_gpu_hide_everything=true")
    ]
    assert results[0].returncode == 0, results[0].stderr
    assert "xla_gpu_hide_everything" in results[1].stderr


PROGRAM = """
import json, os
os.environ["LIBTPU_INIT_ARGS"] = ARGUMENTS
import jax, jax.numpy as jnp
from jax.experimental import topologies
from llmlab.sharding import Mesh

for name in ("v5p:2x2x1", "v5e:2x2", "v6e:2x2"):
    mesh = Mesh(fsdp=4, data=1).build(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32, sharding=mesh.sharding(("embed", None), (512, 512)))
    jax.jit(lambda a, b: jnp.sum(a @ b)).lower(x, x).compile()
print(json.dumps({"done": True}))
"""


def test_the_tpu_compiler_knows_every_flag() -> None:
    flags = added("tpu", {})["LIBTPU_INIT_ARGS"]
    assert tpu_compiler.run(PROGRAM.replace("ARGUMENTS", repr(flags))) == {"done": True}
    with pytest.raises(AssertionError, match="xla_tpu_hide_everything"):
        tpu_compiler.run(PROGRAM.replace("ARGUMENTS", repr(f"{flags} --xla_tpu_hide_everything=true")))
    assert TABLE["tpu"].variable == "LIBTPU_INIT_ARGS"


@pytest.mark.parametrize("call", ["apply", "leave_out_absent_tpu"])
def test_an_installed_libtpu_does_not_complain_where_there_is_no_tpu(call: str) -> None:
    if importlib.util.find_spec("libtpu") is None or has_tpu():
        pytest.skip("libtpu is not installed, or there is a TPU")
    program = "from llmlab.sharding import xla_flags; xla_flags.CALL(); import jax; print(jax.default_backend())"
    program = program.replace("CALL", call)
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu"] or expected_platform({}) == "gpu"
    assert "TPU" not in done.stderr
