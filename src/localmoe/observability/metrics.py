"""Prometheus metrics, fed by core events.

Names that begin with `vllm:` are vLLM's, with its label and its histogram buckets (vllm/v1/metrics/loggers.py), so
that dashboards and autoscalers made for it work; `localmoe_` names are ours.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from localmoe.core.events import (
    ConfigReloaded,
    EngineRestarted,
    EngineState,
    Event,
    EventBus,
    HttpAnswered,
    RequestFinished,
)
from localmoe.observability.config_metrics import ConfigMetrics
from localmoe.observability.dispatch_metrics import DispatchMetrics
from localmoe.observability.http_metrics import HttpMetrics
from localmoe.observability.tier_metrics import TierMetrics, increase

_MODEL = ["model_name"]
_ENGINE = ["model_name", "engine"]
"""As vLLM labels what belongs to one of several engines."""
_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKEN_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)


class Metrics:
    """All metrics of one process, in a registry of their own."""

    def __init__(self, bus: EventBus) -> None:
        self._registry = registry = CollectorRegistry()
        self._last: dict[tuple[str, str], EngineState] = {}
        self._running = Gauge(
            "vllm:num_requests_running", "Requests in the engine's batch.", _ENGINE, registry=registry
        )
        self._waiting = Gauge(
            "vllm:num_requests_waiting", "Requests in the engine's queue.", _ENGINE, registry=registry
        )
        self._kv_usage = Gauge(
            "vllm:kv_cache_usage_perc", "Share of cache blocks in use; 1 is all.", _ENGINE, registry=registry
        )
        self._prefix_queries = Counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up.", _ENGINE, registry=registry
        )
        self._prefix_hits = Counter(
            "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", _ENGINE, registry=registry
        )
        self._draft_tokens = Counter(
            "vllm:spec_decode_num_draft_tokens", "Draft tokens run.", _ENGINE, registry=registry
        )
        self._accepted_tokens = Counter(
            "vllm:spec_decode_num_accepted_tokens", "Draft tokens that proved right.", _ENGINE, registry=registry
        )
        self._prompt_tokens = Counter("vllm:prompt_tokens", "Prompt tokens.", _MODEL, registry=registry)
        self._generation_tokens = Counter("vllm:generation_tokens", "Generated tokens.", _MODEL, registry=registry)
        self._finished = Counter(
            "vllm:request_success",
            "Finished requests: stop, length, abort or error.",
            [*_MODEL, "finished_reason"],
            registry=registry,
        )
        self._ttft = self._histogram("time_to_first_token", "Arrival to first token.", _TTFT_BUCKETS_S)
        self._itl = self._histogram("inter_token_latency", "Between tokens.", _TOKEN_BUCKETS_S)
        self._e2e = self._histogram("e2e_request_latency", "Arrival to last token.", _REQUEST_BUCKETS_S)
        self._queue = self._histogram("request_queue_time", "Arrival to first scheduling.", _REQUEST_BUCKETS_S)
        self._prefill = self._histogram("request_prefill_time", "Scheduling to first token.", _REQUEST_BUCKETS_S)
        self._decode = self._histogram("request_decode_time", "First to last token.", _REQUEST_BUCKETS_S)
        self._preemptions = Counter(
            "localmoe_preemptions",
            "Requests put back because the cache was full.",
            _ENGINE,
            registry=registry,
        )
        self._restarts = Counter(
            "localmoe_engine_restarts",
            "Engine processes that died and were replaced.",
            _ENGINE,
            registry=registry,
        )
        self._tiers = TierMetrics(registry)
        self._dispatch = DispatchMetrics(registry)
        self._http = HttpMetrics(registry)
        self._config = ConfigMetrics(registry)
        bus.subscribe(self._on_event)

    def render(self) -> tuple[bytes, str]:
        """The exposition document and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}_seconds", documentation, _MODEL, buckets=buckets, registry=self._registry)

    def _on_event(self, event: Event) -> None:
        match event:
            case RequestFinished():
                self._on_finished(event)
            case EngineState():
                self._on_state(event)
            case ConfigReloaded():
                self._config.on_event(event)
            case HttpAnswered():
                self._http.on_event(event)
            case EngineRestarted():
                self._restarts.labels(event.model, event.engine).inc()
            case _:
                self._dispatch.on_event(event)

    def _on_finished(self, event: RequestFinished) -> None:
        self._prompt_tokens.labels(event.model).inc(event.prompt_tokens)
        self._generation_tokens.labels(event.model).inc(event.completion_tokens)
        self._finished.labels(event.model, event.outcome).inc()
        self._e2e.labels(event.model).observe(event.e2e_s)
        if event.time_to_first_token_s is not None:
            self._ttft.labels(event.model).observe(event.time_to_first_token_s)
            self._decode.labels(event.model).observe(sum(event.inter_token_s))
        if event.queue_s is not None:
            self._queue.labels(event.model).observe(event.queue_s)
        if event.prefill_s is not None:
            self._prefill.labels(event.model).observe(event.prefill_s)
        inter_token = self._itl.labels(event.model)
        for gap_s in event.inter_token_s:
            inter_token.observe(gap_s)

    def _on_state(self, event: EngineState) -> None:
        who = (event.model, event.engine)
        last = self._last.get(who)
        self._last[who] = event
        self._running.labels(*who).set(event.num_running)
        self._waiting.labels(*who).set(event.num_waiting)
        self._kv_usage.labels(*who).set(event.kv_blocks_used / max(1, event.kv_blocks_total))
        for counter, total, before in (
            (
                self._prefix_queries,
                event.prefix_cache_queries,
                last.prefix_cache_queries if last else 0,
            ),
            (self._prefix_hits, event.prefix_cache_hits, last.prefix_cache_hits if last else 0),
            (self._preemptions, event.num_preemptions, last.num_preemptions if last else 0),
            (self._draft_tokens, event.num_draft_tokens, last.num_draft_tokens if last else 0),
            (self._accepted_tokens, event.num_accepted_tokens, last.num_accepted_tokens if last else 0),
        ):
            increase(counter.labels(*who), total, before)
        self._tiers.on_state(event, last)
