"""The metrics of `GET /metrics`, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server. Safe for use from several threads."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "llama_requests",
            "Requests by path and HTTP status; 499: the client left.",
            ["path", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("llama_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.first_token = Histogram(
            "llama_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "llama_time_per_output_token_seconds",
            "Between the tokens of a choice after its first one; one observation per request.",
            buckets=_SECONDS_PER_TOKEN,
            registry=registry,
        )
        self.duration = Histogram(
            "llama_request_duration_seconds",
            "From the arrival of a completion request to its end.",
            buckets=_SECONDS,
            registry=registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose value is asked for at each read."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def watch_count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a counter whose value is asked for at each read."""
        self._registry.register(_Count(name, text, value))

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)


class _Count(Collector):
    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> Iterable[Metric]:
        yield CounterMetricFamily(self._name, self._text, value=self._value())
