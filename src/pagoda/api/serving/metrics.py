"""The page at /metrics: Prometheus text under vLLM's names, so that dashboards and routers find what they know."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import psutil
from prometheus_client import CollectorRegistry, Counter, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from pagoda.api.serving.engine import Engine

_LABELS = ["model_name", "engine"]
_FIRST_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10)
_TOTAL_S = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_COUNTS = tuple(float(base * 10**power) for power in range(6) for base in (1, 2, 5))


def _resident_bytes(pid: int | None) -> float:
    """Memory that a process holds now; 0 for one that has ended."""
    try:
        return 0.0 if pid is None else float(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0.0


class Metrics:
    """Counts of one server. Each has its own registry, so that several servers in one process stay apart."""

    def __init__(self, model_name: str, engine: Callable[[], Engine]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, engine))
        ProcessCollector(registry=self._registry)
        self._values = (model_name, "0")
        first = self._histogram("time_to_first_token_seconds", "Time to the first token", _FIRST_S)
        following = self._histogram("inter_token_latency_seconds", "Time between two tokens", _TOKEN_S)
        self.first_token, self.next_tokens = first.observe, following.observe
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, of one call", _TOKEN_S
        )
        self._total = self._histogram("e2e_request_latency_seconds", "Time from request to last token", _TOTAL_S)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of one call", _COUNTS)
        self._generated = self._histogram("request_generation_tokens", "Tokens generated for one sequence", _COUNTS)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest sequence of one call", _COUNTS
        )
        self._limit = self._histogram("request_params_max_tokens", "Most tokens that a call may generate", _COUNTS)
        self._decode = self._histogram("request_decode_time_seconds", "Time from the first token to the last", _TOTAL_S)
        self._n = self._histogram("request_params_n", "Sequences per call", (1, 2, 5, 10, 20))
        self._success = self._counter("request_success", "Sequences that ended, by reason", "finished_reason")
        self._rejected = self._counter("admission_rejections", "Requests that were turned away, by reason", "reason")

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> _Histogram:
        made = _Histogram(f"vllm:{name}", text, self._values, buckets)
        self._registry.register(made)
        return made

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(f"vllm:{name}", text, [*_LABELS, label], registry=self._registry)

    def rejected(self, reason: str) -> None:
        self._rejected.labels(*self._values, reason).inc()

    def finished(
        self,
        *,
        prompt_tokens: int,
        completion_tokens: Sequence[int],
        finish_reasons: Sequence[str | None],
        first_token_s: float | None,
        total_s: float,
        max_tokens: int | None,
    ) -> None:
        """Count a call that is over. `max_tokens` is what it might generate in one sequence."""
        self._total.observe(total_s)
        self._prompt.observe(prompt_tokens)
        self._n.observe(len(completion_tokens))
        for tokens, reason in zip(completion_tokens, finish_reasons, strict=True):
            self._generated.observe(tokens)
            self._success.labels(*self._values, reason or "abort").inc()
        most = max(completion_tokens)
        self._longest.observe(most)
        if max_tokens is not None:
            self._limit.observe(max_tokens)
        if first_token_s is not None:
            self._decode.observe(total_s - first_token_s)
        if first_token_s is not None and most > 1:
            self._per_token.observe((total_s - first_token_s) / (most - 1))

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _Histogram:
    """A histogram for one thread: the library's takes locks and walks over all buckets, for every token."""

    def __init__(self, name: str, text: str, values: tuple[str, ...], bounds: tuple[float, ...]) -> None:
        self._name, self._text, self._values = name, text, values
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=_LABELS)
        names = map(floatToGoString, (*self._bounds, float("inf")))
        family.add_metric(self._values, list(zip(names, accumulate(self._counts), strict=True)), self._sum)
        yield family


class _EngineCollector:
    """Reads the engines' own counters at the moment somebody looks; several replicas have a number each."""

    def __init__(self, model_name: str, engine: Callable[[], Engine]) -> None:
        self._model_name = model_name
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for number, engine in enumerate(self._engine().engines):
            values = (self._model_name, str(number))
            for name, text, value in _gauges(engine):
                family = families.setdefault(name, GaugeMetricFamily(name, text, labels=_LABELS))
                family.add_sample(name, dict(zip(_LABELS, values, strict=True)), value)
            for name, text, value in _counters(engine):
                family = families.setdefault(name, CounterMetricFamily(name, text, labels=_LABELS))
                family.add_sample(f"{name}_total", dict(zip(_LABELS, values, strict=True)), value)
        yield from families.values()
        yield self._cache_config()

    def _cache_config(self) -> Metric:
        gauge = GaugeMetricFamily(
            "vllm:cache_config_info", "Size of the KV cache", labels=[*_LABELS, "block_size", "num_gpu_blocks"]
        )
        for number, engine in enumerate(self._engine().engines):
            sizes = (str(engine.info.block_size), str(engine.info.num_blocks))
            gauge.add_metric([self._model_name, str(number), *sizes], 1)
        return gauge


def _gauges(engine: Engine) -> tuple[tuple[str, str, float], ...]:
    """Name, text, value."""
    stats = engine.stats
    now = stats.scheduler
    usage = now.blocks_used / now.blocks_total if now.blocks_total else 0.0
    return (
        ("vllm:num_requests_running", "Sequences in the running batch", now.running),
        ("vllm:num_requests_waiting", "Sequences that wait", now.waiting),
        ("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1", usage),
        ("vllm:gpu_cache_usage_perc", "The same under its older name", usage),
        ("pagoda:engine_ready", "1 if the engine takes requests", float(engine.ready)),
        ("pagoda:engine_resident_memory_bytes", "Memory of the engine process", _resident_bytes(engine.pid)),
        ("pagoda:engine_last_step_seconds", "Duration of the latest step", stats.last_step_s),
    )


def _counters(engine: Engine) -> tuple[tuple[str, str, float], ...]:
    """Name, text, value."""
    stats = engine.stats
    now = stats.scheduler
    return (
        ("vllm:num_preemptions", "Sequences put back to make room", now.preemptions),
        ("vllm:spec_decode_num_drafts", "Drafts that were checked", now.spec_decode_num_drafts),
        ("vllm:spec_decode_num_draft_tokens", "Tokens of those drafts", now.spec_decode_num_draft_tokens),
        ("vllm:spec_decode_num_accepted_tokens", "Those that were right", now.spec_decode_num_accepted_tokens),
        ("vllm:prompt_tokens", "Prompt tokens computed or found in the cache", now.prompt_tokens),
        ("vllm:generation_tokens", "Tokens generated", now.generation_tokens),
        ("vllm:prefix_cache_queries", "Prompt tokens looked up", now.prefix_queries_tokens),
        ("vllm:prompt_tokens_cached", "Prompt tokens found in the cache", now.prefix_hits_tokens),
        ("vllm:prefix_cache_hits", "Prompt tokens found", now.prefix_hits_tokens),
        ("pagoda:engine_restarts", "How often the engine was started again", engine.restarts),
        ("pagoda:engine_steps", "Steps computed", stats.steps),
    )
