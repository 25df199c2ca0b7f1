"""What Prometheus reads of a server: vLLM's names, so that its dashboards fit, and the load of the experts."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from accessory.infer.engine import Engine
from accessory.infer.request import Running
from accessory.model.moe.offload.experts import OffloadedExperts

disable_created_metrics()  # a second line for each would say when it began

SECONDS = [m * 10.0**e for e in range(-3, 3) for m in (1, 2.5, 5)]
TOKENS = [m * 10.0**e for e in range(5) for m in (1, 2, 5)]


@dataclass
class Times:
    """Of a request, by ``time.monotonic``: when it was asked, and when its first and its latest token came."""

    asked: float
    first: float | None = None
    last: float | None = None


class Metrics:
    """``registry`` has them all; those of what the engine holds now are looked up when they are asked for."""

    def __init__(self, engine: Engine, model: str):
        self.registry, self._engine, self._model = CollectorRegistry(), engine, model
        self._finished = Counter(
            "vllm:request_success", "requests, by how they ended", ["model_name", "finished_reason"], registry=self.registry
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "tokens of prompts")
        self._answer_tokens = self._counter("vllm:generation_tokens", "tokens of answers")
        self._to_first = self._histogram("vllm:time_to_first_token_seconds", "from the asking to the first token", SECONDS)
        self._between = self._histogram("vllm:inter_token_latency_seconds", "from one token to the next", SECONDS)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "from the asking to the end", SECONDS)
        self._queued = self._histogram("vllm:request_queue_time_seconds", "until a request was let in", SECONDS)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "from there to the first token", SECONDS)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "from there to the last token", SECONDS)
        self._prompts = self._histogram("vllm:request_prompt_tokens", "tokens of a prompt", TOKENS)
        self._answers = self._histogram("vllm:request_generation_tokens", "tokens of an answer", TOKENS)
        self._limits = self._histogram("vllm:request_params_max_tokens", "max_tokens of a request", TOKENS)
        self.registry.register(self)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, about: str, buckets: list[float]) -> Histogram:
        return Histogram(name, about, ["model_name"], buckets=buckets, registry=self.registry).labels(self._model)

    def token(self, request: Running, times: Times) -> None:
        """``request`` has got one."""
        now = time.monotonic()
        self._answer_tokens.inc()
        if times.last is None:
            self._prompt_tokens.inc(len(request.prompt))
            self._to_first.observe(now - times.asked)
            times.first = now
        else:
            self._between.observe(now - times.last)
        times.last = now

    def ended(self, request: Running, times: Times) -> None:
        now = time.monotonic()
        self._finished.labels(self._model, request.finish_reason).inc()
        self._prompts.observe(len(request.prompt))
        self._answers.observe(len(request.answer))
        self._limits.observe(min(request.sampling.max_tokens, self._engine.max_seq_len - len(request.prompt)))
        self._whole.observe(now - times.asked)
        if request.admitted is not None:
            self._queued.observe(request.admitted - times.asked)
            if times.first is not None and times.last is not None:
                self._prefill.observe(times.first - request.admitted)
                self._decode.observe(times.last - times.first)

    def collect(self) -> Iterator[Metric]:
        """What the registry asks for."""
        engine, pool = self._engine, self._engine.pool
        yield self._gauge("vllm:num_requests_running", "requests that were let in", len(engine.running))
        yield self._gauge("vllm:num_requests_waiting", "requests that wait to be let in", len(engine.waiting))
        in_use = 1 - (pool.free + pool.reserved) / pool.count
        yield self._gauge("vllm:kv_cache_usage_perc", "share of the cache's pages that requests hold", in_use)
        asked, shared = engine.prompt_tokens, engine.shared_tokens
        yield self._sum("vllm:prefix_cache_queries", "tokens of prompts that were looked up in the cache", asked)
        yield self._sum("vllm:prefix_cache_hits", "those that it had", shared)
        load = CounterMetricFamily(
            "accessory:expert_tokens", "tokens that each expert has run", labels=["model_name", "layer", "expert"]
        )
        for layer, experts in enumerate(engine.expert_load.tolist()):
            for expert, count in enumerate(experts):
                load.add_metric([self._model, str(layer), str(expert)], count)
        yield load
        if layers := engine.model.offloaded:
            yield from self._offload(layers)

    def _offload(self, layers: list[OffloadedExperts]) -> Iterator[Metric]:
        """Of this rank."""
        figures = {
            "used": "experts that a batch used",
            "hits": "those of them that were on the device, or on their way",
            "guessed_hits": "those of the hits that a guess had brought",
            "foretold": "experts that were used where a guess had been made",
            "right": "those of them that it had named",
            "moved": "experts that were brought to the device",
        }
        for name, about in figures.items():
            family = CounterMetricFamily(f"accessory:offload_{name}", about, labels=["model_name", "layer"])
            for number, layer in enumerate(layers):
                family.add_metric([self._model, str(number)], getattr(layer.slots.tally, name))
            yield family
        yield self._sum("accessory:offload_bytes", "bytes that were moved for it", sum(each.moved_bytes for each in layers))
        yield self._sum("accessory:offload_waited_seconds", "spent waiting", sum(each.waited_s for each in layers))

    def _gauge(self, name: str, about: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _sum(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(name, about, labels=["model_name"])
        family.add_metric([self._model], value)
        return family
