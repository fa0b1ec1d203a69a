"""How fast a run is: tokens/s, model FLOP/s, model FLOP utilisation, time left.

    model FLOP/s = tokens/s x FLOPs per token of the model's formula
    MFU          = model FLOP/s / (number of devices x peak FLOP/s of one)         (Chowdhery et al. 2022, appendix B)

Published MFU differs by convention, so ours is printed beside the number. The numerator counts what the model needs
(see `ModelConfig.flops`), not what the hardware ran: rematerialisation raises the time and not the count. The
denominator is the vendor's dense bfloat16 figure, whatever precision the run uses. A device without such a figure (a
CPU, a consumer card) is measured: the best of a few large matrix products. That says how much of this machine's own
speed the run gets, and nothing that could be compared with the vendors' figures; the convention says which one it is.
"""

import functools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

# Device kind as jax names it (a regular expression) -> dense bfloat16 FLOP/s with float32 accumulation.
# TPU: Google Cloud's system architecture pages, per chip; on v2, v3 and 7x jax's device is one of a chip's two cores.
# NVIDIA: data sheets; those give the figure with 2:4 sparsity, twice the dense one, for all since Hopper and Ada.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"TPU v2", 22.5e12),
    (r"TPU v3", 61.5e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 lite|TPU v6e", 918e12),
    (r"TPU7x", 2307e12 / 2),
    (r"NVIDIA A100.*", 312e12),
    (r"NVIDIA A10", 125e12),
    (r"NVIDIA A40", 149.7e12),
    (r"NVIDIA A30", 165e12),
    (r"NVIDIA H100 PCIe", 756e12),
    (r"NVIDIA (H100|H200) NVL", 835e12),
    (r"NVIDIA (H100|H200|H800|GH200).*", 989e12),
    (r"NVIDIA B200.*", 2250e12),
    (r"NVIDIA GB200.*", 2500e12),
    (r"NVIDIA L4", 121e12),
    (r"NVIDIA L40", 181e12),
    (r"NVIDIA L40S", 362e12),
)

FLOP_CONVENTION = "matmul FLOPs of forward and backward, every key of the sequence counted, no rematerialisation"


@runtime_checkable
class Device(Protocol):
    """What is asked of a jax.Device here (jaxlib's class has no type stubs)."""

    @property
    def device_kind(self) -> str: ...
    @property
    def platform(self) -> str: ...
    @property
    def process_index(self) -> int: ...


@dataclass(frozen=True)
class Peak:
    """The most that the devices of a run could do."""

    flops_per_second: float
    """Of all devices together."""
    source: str
    """Where the number is from: "989 TFLOP/s, NVIDIA H100 80GB HBM3, bfloat16 dense, data sheet"."""


def published_peak(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device by the vendor's data sheet; None for a kind not in the table.

    `device_kind` is what `jax.devices()[0].device_kind` says. A slice of a GPU (MIG) has none.
    """
    if " MIG " in device_kind:
        return None
    return next((peak for pattern, peak in _PEAKS if re.fullmatch(pattern, device_kind)), None)


def peak(devices: Sequence[Device] | None = None) -> Peak:
    """The peak of `devices` (default: all of the run): published where it is, else measured here (about 0.2 s)."""
    import jax

    devices = jax.devices() if devices is None else devices
    kind, count = devices[0].device_kind, len(devices)
    one = published_peak(kind)
    if one is not None:
        each = f"{count} x " if count > 1 else ""
        return Peak(one * count, f"{each}{readable_flops(one)}, {kind}, bfloat16 dense, data sheet")
    local = next(device for device in devices if device.process_index == jax.process_index())
    one = measured_peak(local)
    if local.platform == "cpu":  # the CPU devices of a process are simulated: they share its cores
        count = len({device.process_index for device in devices})
    each = f"{count} x " if count > 1 else ""
    return Peak(one * count, f"{each}{readable_flops(one)}, {kind}, {_measured_dtype(local)} matrix product, measured")


def measured_peak(device: Any, *, dim: int | None = None, repeats: int = 8) -> float:
    """FLOP/s of the best of `repeats` products of two [dim, dim] matrices on the device.

    The best, not the mean: whatever else the machine does can only make a product slower. float32 on a CPU, which has
    no faster type in general; bfloat16 elsewhere.
    """
    import jax
    import jax.numpy as jnp

    dim = dim or (1024 if device.platform == "cpu" else 8192)
    x = jax.device_put(jnp.full((dim, dim), 1.0 / dim, _measured_dtype(device)), device)
    product = _square()
    product(x).block_until_ready()  # compiled, and the threads awake
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * dim**3 / best


@functools.cache
def _square() -> Any:
    """A product that is compiled once in a process, however many runs it has."""
    import jax

    return jax.jit(lambda a: a @ a)


def _measured_dtype(device: Device) -> str:
    return "float32" if device.platform == "cpu" else "bfloat16"


class Throughput:
    """Measures speed between calls of `measure`, leaving out what happens inside `pause()`.

        meter = Throughput(flops_per_token=..., tokens_per_step=..., total_steps=..., peak=peak())
        meter.start(step)                      # after the first step of this session: compilation is not speed
        ... metrics |= meter.measure(step)     # wait for the step's results first, or this measures the dispatch
        with meter.pause(): evaluate()

    Args:
        flops_per_token: forward and backward, by the model's formula.
        tokens_per_step: of the global batch.
        total_steps: of the whole run, for the time left.
        peak: of all devices; None leaves `mfu` out.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        flops_per_token: float,
        tokens_per_step: int,
        total_steps: int,
        peak: Peak | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.flops_per_token = flops_per_token
        self.tokens_per_step = tokens_per_step
        self.total_steps = total_steps
        self.peak = peak
        self._clock = clock
        self.start(0)

    def start(self, step: int) -> None:
        """Begins to measure at this step."""
        self._first_step = self._last_step = step
        self._began = self._last_time = self._clock()
        self._paused = 0.0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (evaluation, saving) counts for the time left, not for the speed."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    def measure(self, step: int) -> dict[str, float]:
        """Speed since the last call: `tokens_per_second`, `model_flops_per_second`, `mfu`, `eta_seconds`.

        Empty where no step was made since. The time left assumes that steps, evaluations and savings go on costing
        what they cost on average since `start`.
        """
        now = self._clock()
        seconds = now - self._last_time - self._paused
        steps = step - self._last_step
        if steps <= 0 or seconds <= 0:
            return {}
        self._last_step, self._last_time, self._paused = step, now, 0.0
        tokens_per_second = steps * self.tokens_per_step / seconds
        flops_per_second = tokens_per_second * self.flops_per_token
        speed = {"tokens_per_second": tokens_per_second, "model_flops_per_second": flops_per_second}
        if self.peak is not None:
            speed["mfu"] = flops_per_second / self.peak.flops_per_second
        seconds_per_step = (now - self._began) / (step - self._first_step)
        return speed | {"eta_seconds": max(0, self.total_steps - step) * seconds_per_step}

    @property
    def convention(self) -> str:
        """What `mfu` means, in one line: to print and record beside the number."""
        if self.peak is None:
            return f"model FLOP/s: {FLOP_CONVENTION}; no MFU: the devices' peak is unknown"
        return f"MFU: {FLOP_CONVENTION} / peak {self.peak.source}"


def readable_flops(flops_per_second: float) -> str:
    """A rate for people: "989 TFLOP/s", "92.4 GFLOP/s"."""
    for prefix, unit in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops_per_second >= 10 * unit or prefix == "M":
            break
    value = flops_per_second / unit
    return f"{value:,.0f} {prefix}FLOP/s" if value >= 100 else f"{value:.1f} {prefix}FLOP/s"
