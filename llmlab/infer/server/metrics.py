"""What Prometheus reads: how many requests, tokens and blocks, how long clients wait.

Counters and histograms are counted here; what the engine knows is read from it when somebody asks. The registry is the
server's own, so that two servers in one process do not mix.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from llmlab.infer.server.gate import Gate
    from llmlab.infer.server.service import Generator

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Seconds. From a step of a small model to the longest request that the default limits allow.
_LATENCIES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_FIRST_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The server's numbers."""

    def __init__(self, engine: "Generator | None", gate: "Gate") -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            "llmlab_requests", "Requests, by endpoint and status.", ("endpoint", "status"), registry=self.registry
        )
        self._samples = Counter(
            "llmlab_samples", "Texts that were written, by finish reason.", ("reason",), registry=self.registry
        )
        self._seconds = Histogram(
            "llmlab_request_seconds", "Time of answered requests.", buckets=_LATENCIES, registry=self.registry
        )
        self._first = Histogram(
            "llmlab_time_to_first_token_seconds",
            "Time from a request's arrival to its first new token.",
            buckets=_FIRST_TOKEN,
            registry=self.registry,
        )
        self._between = Histogram(
            "llmlab_time_per_token_seconds",
            "Time of each further token of a request, averaged over those that came together.",
            buckets=_BETWEEN_TOKENS,
            registry=self.registry,
        )
        self.registry.register(_Engine(engine, gate))

    def answered(self, endpoint: str, status: int) -> None:
        """Counts an answer, whatever it was."""
        self._requests.labels(endpoint, str(status)).inc()

    def request_done(self, seconds: float, reasons: Sequence[str]) -> None:
        """Counts a request that was answered in full, and why its samples ended."""
        self._seconds.observe(seconds)
        for reason in reasons:
            self._samples.labels(reason).inc()

    def clock(self, arrived: float) -> "Clock":
        """Measures the tokens of a request that arrived then (`time.perf_counter`)."""
        return Clock(arrived, self._first, self._between)

    def text(self) -> bytes:
        """All of them in Prometheus's notation."""
        return generate_latest(self.registry)


class Clock:
    """How long one request's tokens take."""

    def __init__(self, arrived: float, first: Histogram, between: Histogram) -> None:
        self._last, self._first, self._between = arrived, first, between
        self._begun = False

    def tokens(self, count: int) -> None:
        """Counts tokens that have come just now."""
        if not count:
            return
        now = time.perf_counter()
        if not self._begun:
            self._begun = True
            self._first.observe(now - self._last)
        else:
            self._between.observe((now - self._last) / count)
        self._last = now


class _Engine(Collector):
    """What the engine and the gate know at the moment of asking."""

    def __init__(self, engine: "Generator | None", gate: "Gate") -> None:
        self._engine, self._gate = engine, gate

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not ask the engine."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        yield GaugeMetricFamily("llmlab_requests_active", "Requests that are being answered.", self._gate.inside)
        if self._engine is None:
            return
        stats = self._engine.stats()
        for name, text, value in (
            ("llmlab_samples_running", "Samples that are being written.", stats.running),
            ("llmlab_samples_waiting", "Requests and preempted samples that wait.", stats.waiting),
            ("llmlab_blocks", "Blocks of keys and values.", stats.blocks_total),
            ("llmlab_blocks_free", "Blocks that no sample uses.", stats.blocks_free),
            ("llmlab_blocks_cached", "Free blocks that hold a prefix.", stats.blocks_cached),
        ):
            yield GaugeMetricFamily(name, text, value)
        for name, text, value in (
            ("llmlab_prompt_tokens", "Prompt tokens of admitted requests.", stats.prompt_tokens),
            ("llmlab_generated_tokens", "New tokens.", stats.generated_tokens),
            ("llmlab_prefix_hit_tokens", "Prompt tokens found in the prefix cache.", stats.prefix_hit_tokens),
            ("llmlab_preemptions", "Samples that had to make room.", stats.preemptions),
        ):
            yield CounterMetricFamily(name, text, value)
