"""What a monitor asks for: vLLM's names with `isotach_` before them, and the states that are kept.

Counts and gauges are read from the engine when they are asked for; times are observed as they pass.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from isotach.errors import UserError
from isotach.serve.engine import Stats, Usage

if TYPE_CHECKING:
    from prometheus_client.core import Metric

FIRST = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
LENGTH = tuple(float(10**power * step) for power in range(7) for step in (1, 2, 5))


class Metrics:
    """The registry of one server."""

    def __init__(self, stats: Callable[[], Stats], *, model: str) -> None:
        try:
            import prometheus_client as client
        except ImportError:
            raise UserError("serve: metrics need prometheus-client; pip install 'isotach[serve]'") from None
        self._client, self._stats, self._model = client, stats, model
        self._registry = client.CollectorRegistry(auto_describe=False)
        self._registry.register(self)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> client.Histogram:
            full = f"isotach_{name}"
            return client.Histogram(full, text, ["model_name"], registry=self._registry, buckets=buckets).labels(model)

        self._first = histogram("time_to_first_token_seconds", "From submission to the first token.", FIRST)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", BETWEEN)
        self._queued = histogram("request_queue_time_seconds", "From submission to the first reading.", FIRST)
        self._whole = histogram("e2e_request_latency_seconds", "From submission to the last token.", WHOLE)
        self._read = histogram("request_prompt_tokens", "Tokens of prompts, skipped ones too.", LENGTH)
        self._written = histogram("request_generation_tokens", "Tokens of answers.", LENGTH)
        self._http = client.Counter(
            "isotach_http_requests", "HTTP answers.", ["method", "path", "status"], registry=self._registry
        )

    def token_after(self, seconds: float) -> None:
        self._between.observe(seconds)

    def finished(self, usage: Usage, seconds: float) -> None:
        """One answer is complete."""
        if usage.first_token_s is not None:
            self._first.observe(usage.first_token_s)
        if usage.queued_s is not None:
            self._queued.observe(usage.queued_s)
        self._whole.observe(seconds)
        self._read.observe(usage.prompt_tokens)
        self._written.observe(usage.completion_tokens)

    def answered(self, method: str, path: str | None, status: int) -> None:
        """One HTTP request is over; `path` is its route's pattern, None where there is no such route."""
        self._http.labels(method, path or "", str(status)).inc()

    def text(self) -> tuple[bytes, str]:
        """What /metrics answers, and its content type."""
        return self._client.generate_latest(self._registry), self._client.CONTENT_TYPE_LATEST

    def collect(self) -> "Iterator[Metric]":
        """The engine's figures, as the registry asks for them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats()

        def gauge(name: str, text: str, value: float) -> "Metric":
            metric = GaugeMetricFamily(f"isotach_{name}", text, labels=["model_name"])
            metric.add_metric([self._model], value)
            return metric

        def counter(name: str, text: str, value: float) -> "Metric":
            metric = CounterMetricFamily(f"isotach_{name}", text, labels=["model_name"])
            metric.add_metric([self._model], value)
            return metric

        def counters(name: str, text: str, label: str, values: "dict[str, int]") -> "Metric":
            metric = CounterMetricFamily(f"isotach_{name}", text, labels=["model_name", label])
            for key, value in values.items():
                metric.add_metric([self._model, key], value)
            return metric

        yield gauge("num_requests_running", "Requests that read or write.", stats.running + stats.reading)
        yield gauge("num_requests_reading", "Of these, requests that read their prompt.", stats.reading)
        yield gauge("num_requests_waiting", "Requests that were not begun.", stats.waiting)
        where = GaugeMetricFamily("isotach_state_bytes", "Bytes of states.", labels=["model_name", "where"])
        for place, size in (("slots", stats.slot_bytes), ("cache", stats.cache_bytes), ("disk", stats.disk_bytes)):
            where.add_metric([self._model, place], size)
        yield where
        yield gauge("state_memory_bytes", "Bytes that states may take in memory.", stats.memory)
        used = (stats.slot_bytes + stats.cache_bytes) / max(1, stats.memory)
        yield gauge("state_usage_perc", "Share of that memory in use; 1 is all of it.", used)
        yield counter("prompt_tokens", "Tokens of prompts, skipped ones too.", stats.tokens_read + stats.tokens_skipped)
        yield counter("generation_tokens", "Tokens written.", stats.tokens_written)
        finished = {key: value for key, value in stats.finished.items() if key in ("eos", "stop", "length")}
        success = {"stop": finished.get("eos", 0) + finished.get("stop", 0), "length": finished.get("length", 0)}
        yield counters("request_success", "Complete answers.", "finished_reason", success)
        others = {key: value for key, value in stats.finished.items() if key not in finished}
        yield counters("request_other", "Requests that ended otherwise.", "finished_reason", others)
        yield counter("prefix_cache_queries", "Tokens looked up.", stats.tokens_read + stats.tokens_skipped)
        yield counter("prefix_cache_hits", "Tokens skipped, for which a kept state stood.", stats.tokens_skipped)
        yield counter("state_cache_hits", "Requests that skipped tokens.", stats.hits)
        misses = {str(key): value for key, value in stats.misses.items()}
        yield counters("state_cache_misses", "Requests that might have skipped more tokens.", "reason", misses)
        yield counter("state_cache_evictions", "Kept states dropped for lack of room.", stats.evictions)
