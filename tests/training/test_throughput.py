from dataclasses import dataclass

import jax
import pytest

from llmlab.training.throughput import Peak, Throughput, measured_peak, peak, published_peak, readable_flops


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, peak: Peak | None = None) -> Throughput:
    return Throughput(flops_per_token=6e6, tokens_per_step=1000, total_steps=100, peak=peak, clock=clock)


def test_speed_is_tokens_over_seconds_and_mfu_is_flops_over_peak() -> None:
    clock = Clock()
    throughput = meter(clock, Peak(1.2e11, "a card"))
    clock.now += 30  # compilation
    throughput.start(1)
    clock.now += 4
    speed = throughput.measure(21)
    assert speed["tokens_per_second"] == 20 * 1000 / 4
    assert speed["model_flops_per_second"] == 5000 * 6e6
    assert speed["mfu"] == 3e10 / 1.2e11
    assert speed["eta_seconds"] == pytest.approx((100 - 21) * 4 / 20)


def test_pauses_cost_time_but_not_speed() -> None:
    clock = Clock()
    throughput = meter(clock)
    throughput.start(0)
    clock.now += 2
    with throughput.pause():
        clock.now += 8
    speed = throughput.measure(10)
    assert speed["tokens_per_second"] == 10 * 1000 / 2
    assert speed["eta_seconds"] == 90 * (10 / 10)
    clock.now += 1  # and the pause is not subtracted twice
    assert throughput.measure(20)["tokens_per_second"] == 10 * 1000 / 1


def test_without_a_peak_there_is_no_mfu_and_the_convention_says_so() -> None:
    clock = Clock()
    throughput = meter(clock)
    clock.now += 1
    assert "mfu" not in throughput.measure(1)
    assert "no MFU" in throughput.convention


def test_nothing_is_measured_where_no_step_was_made() -> None:
    clock = Clock()
    throughput = meter(clock)
    clock.now += 1
    assert throughput.measure(0) == {}


@pytest.mark.parametrize(
    ("kind", "units", "gigahertz"),  # matrix units of 128 x 128 in what jax calls a device, and their clock
    [("TPU v2", 1, 0.70), ("TPU v3", 2, 0.94), ("TPU v4", 8, 1.05), ("TPU v5 lite", 4, 1.50), ("TPU v5p", 8, 1.75)],
)
def test_published_tpu_peaks_are_matrix_units_times_clock(kind: str, units: int, gigahertz: float) -> None:
    # 2%: the published figures are rounded.
    assert published_peak(kind) == pytest.approx(units * 128 * 128 * 2 * gigahertz * 1e9, rel=0.02)


def test_both_names_of_a_tpu_mean_the_same() -> None:
    for one, other in (("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e")):
        assert published_peak(one) == published_peak(other) is not None


@pytest.mark.parametrize(
    ("kind", "sparse_teraflops"),  # the figure that the data sheets print, with 2:4 sparsity
    [
        ("NVIDIA A100-SXM4-80GB", 624),
        ("NVIDIA H100 80GB HBM3", 1979),
        ("NVIDIA H100 PCIe", 1513),
        ("NVIDIA H200", 1979),
        ("NVIDIA L4", 242),
        ("NVIDIA B200", 4500),
    ],
)
def test_published_gpu_peaks_are_half_the_sparse_figure(kind: str, sparse_teraflops: float) -> None:
    # 0.5%: the data sheets round.
    assert published_peak(kind) == pytest.approx(sparse_teraflops / 2 * 1e12, rel=5e-3)


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_devices_without_a_data_sheet_figure_have_no_published_peak(kind: str) -> None:
    assert published_peak(kind) is None


@dataclass(frozen=True)
class FakeDevice:
    device_kind: str
    platform: str = "gpu"
    process_index: int = 0


def test_a_published_peak_is_multiplied_by_the_devices() -> None:
    total = peak([FakeDevice("NVIDIA H100 80GB HBM3")] * 8)
    assert total.flops_per_second == 8 * 989e12
    assert "8 x 989 TFLOP/s" in total.source
    assert "bfloat16 dense, data sheet" in total.source


def test_simulated_cpu_devices_share_one_measured_peak() -> None:
    assert len(jax.devices()) == 8
    total = peak()
    assert " x " not in total.source
    assert "float32 matrix product, measured" in total.source
    # Loose on purpose: the machine's other work may halve it, but eight devices must not multiply it by eight.
    assert total.flops_per_second < 4 * measured_peak(jax.devices()[0])


@pytest.mark.parametrize(
    ("flops", "text"),
    [(989e12, "989 TFLOP/s"), (2.25e15, "2,250 TFLOP/s"), (92.44e9, "92.4 GFLOP/s"), (3.2e6, "3.2 MFLOP/s")],
)
def test_rates_are_readable(flops: float, text: str) -> None:
    assert readable_flops(flops) == text
