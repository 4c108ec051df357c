"""The metrics of `GET /metrics`, in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics(Collector):
    """Counters of one server. Safe for use from several threads.

    Attributes:
        service: asked for its numbers at each read; None until there is one.
    """

    def __init__(self) -> None:
        self.service: Service | None = None
        self._registry = registry = CollectorRegistry()
        by_status = "Requests by path and HTTP status; 499: the client left."
        self.requests = Counter("llama_requests", by_status, ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("llama_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        seconds = partial(Histogram, registry=registry, buckets=_SECONDS)
        self.first_token = seconds(
            "llama_time_to_first_token_seconds", "From the arrival of a request to its first token."
        )
        self.per_token = seconds(
            "llama_time_per_output_token_seconds",
            "Between the tokens of a choice after its first one; one observation per request.",
            buckets=_SECONDS_PER_TOKEN,
        )
        self.duration = seconds(
            "llama_request_duration_seconds", "From the arrival of a completion request to its end."
        )
        registry.register(self)

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """The numbers of the service, for the registry."""
        if (service := self.service) is None:
            return
        yield GaugeMetricFamily("llama_requests_open", "Requests that are not finished.", service.n_requests)
        yield GaugeMetricFamily("llama_sequences_running", "Sequences in slots of the cache.", service.engine.n_running)
        yield GaugeMetricFamily("llama_sequences_waiting", "Sequences that wait for a slot.", service.n_waiting)
        yield CounterMetricFamily("llama_generated_tokens", "Generated tokens.", service.n_generated)
        cached = "Prompt tokens that the cache held already."
        yield CounterMetricFamily("llama_cached_prompt_tokens", cached, service.engine.n_reused)
