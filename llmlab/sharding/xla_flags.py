"""XLA's flags for hiding communication behind computation: a table by platform, applied before jax starts.

A sharded step spends a good part of its time in collectives. The compiler can start one early, compute something else
and collect the result late, but by default it holds back, since that costs memory: results in flight have buffers.
For training the trade is nearly always right, so `llmlab train` asks for it:

    gpu   XLA_FLAGS           the latency-hiding scheduler; collectives of one loop iteration moved into the one before
    tpu   LIBTPU_INIT_ARGS    sums fused with the computation that runs meanwhile, gathers started ahead of use

Flags that are set already are left as they are, so the variables override the table by flag; `--xla-flags none` or
LLMLAB_XLA_FLAGS=none takes nothing of it. What a run used stands in its provenance.json, under "variables".

XLA ends the process at a flag that it does not know. The flags here are known to the compilers of the versions that the
tests run with, which they check.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax

from llmlab.sharding.cluster import has_tpu

Choice = Literal["default", "none"]
Platform = Literal["cpu", "gpu", "tpu"]

VARIABLE = "LLMLAB_XLA_FLAGS"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What one platform is given."""

    variable: str
    """Environment variable that its compiler reads."""
    values: Mapping[str, str]
    """Flag to value."""


TABLE: Mapping[Platform, Flags] = {
    "gpu": Flags(
        variable="XLA_FLAGS",
        values={
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            "xla_gpu_enable_pipelined_all_gather": "true",
            "xla_gpu_enable_pipelined_reduce_scatter": "true",
            "xla_gpu_enable_pipelined_all_reduce": "true",
        },
    ),
    "tpu": Flags(
        variable="LIBTPU_INIT_ARGS",
        values={
            # Not of gathers (..._fuse_all_gather): newer compilers refuse that but on v5e, for fear of wrong results.
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            "xla_tpu_overlap_compute_collective_tc": "true",
            "xla_enable_async_all_gather": "true",
            "xla_enable_async_collective_permute": "true",
            # The all-reduce of gradients over the data axis, where it shares the network with nothing.
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    ),
}


def expected_platform(environment: Mapping[str, str], *, devices: Path = Path("/dev")) -> Platform:
    """What jax will run on, as far as it can be told without starting it: JAX_PLATFORMS, else the device files."""
    first = environment.get("JAX_PLATFORMS", "").split(",")[0]
    if first:
        return "tpu" if first == "tpu" else "gpu" if first in ("gpu", "cuda", "rocm") else "cpu"
    if has_tpu(devices) and importlib.util.find_spec("libtpu") is not None:
        return "tpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if (devices / "nvidia0").exists() and any(importlib.util.find_spec(name) is not None for name in plugins):
        return "gpu"
    return "cpu"


def added(platform: Platform, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the table changes, with their new values: the platform's flags before those that are set."""
    flags = TABLE.get(platform)
    if flags is None:
        return {}
    before = environment.get(flags.variable, "")
    given = {flag.lstrip("-").partition("=")[0] for flag in before.split()}
    new = [f"--{name}={value}" for name, value in flags.values.items() if name not in given]
    return {flags.variable: " ".join([*new, *before.split()])} if new else {}


def leave_out_absent_tpu() -> None:
    """Keeps an installed libtpu from looking for a TPU where there is none, and from complaining at length. To be
    called before jax touches a device."""
    platform = expected_platform(os.environ)
    if platform == "cpu" and not os.environ.get("JAX_PLATFORMS") and importlib.util.find_spec("libtpu") is not None:
        jax.config.update("jax_platforms", "cpu")


def apply(choice: Choice | None = None) -> None:
    """Sets the flags of this machine's platform. To be called before jax touches a device.

    Args:
        choice: "none" for no flags; None for what LLMLAB_XLA_FLAGS says, which is "default" where it is not set.

    Raises:
        ValueError: LLMLAB_XLA_FLAGS is neither.
    """
    leave_out_absent_tpu()
    platform = expected_platform(os.environ)
    chosen = choice or os.environ.get(VARIABLE) or "default"
    if chosen not in ("default", "none"):
        raise ValueError(f"{VARIABLE}={chosen} is neither default nor none; flags themselves go into XLA_FLAGS")
    if chosen == "default":
        os.environ.update(added(platform, os.environ))
