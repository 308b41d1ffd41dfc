"""What `/metrics` shows, in Prometheus' text format; names are near vLLM's."""

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from finback.engine.llm import LLM
from finback.server.turn import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """A registry of its own, so that several servers may live in one process."""

    def __init__(self, llm: LLM, model: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(llm, model))
        self._label = model
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.", _SECONDS)
        self._per_token = self._histogram("time_per_output_token_seconds", "Between tokens, after the first.", _PER_TOKEN)
        self._whole = self._histogram("e2e_request_latency_seconds", "From the request to its end.", _SECONDS)
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._generated = self._counter("generation_tokens", "Tokens of answers, thinking included.")
        self._reasoning = self._counter("reasoning_tokens", "Tokens of thoughts.")
        self._requests = Counter(
            "finback:request_success", "Answers by how they ended.", ["model_name", "finished_reason"], registry=self.registry
        )
        self._errors = Counter(
            "finback:request_errors", "Errors by HTTP status.", ["model_name", "status"], registry=self.registry
        )

    def _histogram(self, name: str, words: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"finback:{name}", words, ["model_name"], registry=self.registry, buckets=buckets)
        return made.labels(self._label)

    def _counter(self, name: str, words: str) -> Counter:
        return Counter(f"finback:{name}", words, ["model_name"], registry=self.registry).labels(self._label)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def finished(self, usage: Usage, reasons: Iterable[str | None], seconds: float, seconds_after_first: float | None) -> None:
        """A request has ended; answers without a reason were left by their reader."""
        self._whole.observe(seconds)
        self._prompt.inc(usage.prompt_tokens)
        self._generated.inc(usage.completion_tokens)
        self._reasoning.inc(usage.reasoning_tokens)
        if seconds_after_first is not None and usage.completion_tokens > 1:
            self._per_token.observe(seconds_after_first / (usage.completion_tokens - 1))
        for reason in reasons:
            self._requests.labels(self._label, reason or "abort").inc()

    def error(self, status: int) -> None:
        self._errors.labels(self._label, str(status)).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, llm: LLM, model: str) -> None:
        self._llm, self._model = llm, model

    def collect(self) -> Iterator[Metric]:
        llm, stats = self._llm, self._llm.scheduler_stats
        total = max(1, llm.num_blocks)
        yield self._gauge("num_requests_running", "Requests that run.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Requests that wait.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of cache blocks that requests hold.", stats.blocks_used / total)
        yield self._gauge("kv_cache_blocks_cached", "Free blocks that keep a prefix.", stats.blocks_cached)
        yield self._count("prefix_cache_queries", "Tokens of prompts that were looked up.", stats.prefix_query_tokens)
        yield self._count("prefix_cache_hits", "Those that were found.", stats.prefix_hit_tokens)
        yield self._count("num_preemptions", "Requests that had to give their blocks back for a while.", stats.num_preemptions)
        yield self._count("spec_decode_num_draft_tokens", "Tokens that MTP drafted.", llm.stats.drafted_tokens)
        yield self._count("spec_decode_num_accepted_tokens", "Drafts that were right.", llm.stats.accepted_tokens)
        yield self._count("engine_steps", "Passes through the model.", llm.stats.steps)

        yield from self._experts()

    def _experts(self) -> Iterator[Metric]:
        load = GaugeMetricFamily(
            "finback:expert_load", "Tokens of a layer's busiest expert by those of the mean one.", labels=["model_name", "router"]
        )
        tokens = CounterMetricFamily("finback:expert_tokens", "Tokens by expert.", labels=["model_name", "router", "expert"])
        for router, counts in enumerate(self._llm.expert_counts.tolist()):
            load.add_metric([self._model, str(router)], max(counts) * len(counts) / max(1, sum(counts)))
            for expert, count in enumerate(counts):
                tokens.add_metric([self._model, str(router), str(expert)], count)
        yield load
        yield tokens

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"finback:{name}", words, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _count(self, name: str, words: str, value: float) -> Metric:
        family = CounterMetricFamily(f"finback:{name}", words, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
