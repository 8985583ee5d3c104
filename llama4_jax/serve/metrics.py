"""Figures for Prometheus, under vLLM's names where they mean the same, so that its dashboards show this server too."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama4_jax.infer.engine import Stats

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)


class Metrics:
    """One server's figures, in a registry of its own.

    - stats: gives what the engine is doing now: running, waiting, slots, found, misses
    """

    def __init__(self, model: str, stats: Callable[[], Stats]):
        self.registry = CollectorRegistry()
        labels = {"labelnames": ("model_name",), "registry": self.registry}

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, **labels).labels(model)

        def histogram(name: str, text: str, buckets: tuple[int | float, ...]) -> Histogram:
            return Histogram(name, text, buckets=buckets, **labels).labels(model)

        self.prompt_tokens = counter("vllm:prompt_tokens", "Tokens of prompts")
        self.generated_tokens = counter("vllm:generation_tokens", "Tokens that were generated")
        self.prefix_queries = counter("vllm:prefix_cache_queries", "Tokens of prompts that a cache was asked for")
        self.prefix_hits = counter("vllm:prefix_cache_hits", "Tokens of prompts that came from a cache")
        self.first_token = histogram("vllm:time_to_first_token_seconds", "From request to first token", _FIRST)
        self.between_tokens = histogram("vllm:inter_token_latency_seconds", "From one token to the next", _BETWEEN)
        self.whole = histogram("vllm:e2e_request_latency_seconds", "From request to last token", _WHOLE)
        self.gone = counter("llama4:clients_gone", "Requests whose client went away before the end")
        self.slow = counter("llama4:slow_readers", "Streams that ended because their client did not read them")
        self._ends = Counter(
            "vllm:request_success",
            "Replies that ended, by why",
            labelnames=("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._answers = Counter(
            "llama4:http_responses",
            "Answers by path and status",
            labelnames=("path", "status"),
            registry=self.registry,
        )
        self._model = model
        self.registry.register(_Engine(model, stats))

    def ended(self, reason: str) -> None:
        self._ends.labels(self._model, reason).inc()

    def answered(self, path: str, status: int) -> None:
        self._answers.labels(path, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engine(Collector):
    """What the engine is doing, read when it is asked for."""

    def __init__(self, model: str, stats: Callable[[], Stats]):
        self._model, self._stats = model, stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        figures = {
            "vllm:num_requests_running": ("Requests that have a slot", stats.running),
            "vllm:num_requests_waiting": ("Requests that wait for one", stats.waiting),
            "llama4:slots": ("Slots", stats.slots),
        }
        for name, (text, value) in figures.items():
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        found = CounterMetricFamily(
            "llama4:prefix_cache_found", "Prompts of which something came from a cache", labels=("model_name", "where")
        )
        for where, count in list(stats.found.items()):
            found.add_metric((self._model, where), count)
        yield found
        misses = CounterMetricFamily(
            "llama4:prefix_cache_misses", "Prompts of which nothing came from a cache", labels=("model_name", "reason")
        )
        for reason, count in list(stats.misses.items()):
            misses.add_metric((self._model, reason), count)
        yield misses
