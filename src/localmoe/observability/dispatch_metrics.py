"""Metrics of dispatch: who waits, who answered, what failed and who went on."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from localmoe.core.events import BreakerChanged, EngineAnswered, QueueChanged, RequestRefused, StreamResumed

_GAP_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)


class DispatchMetrics:
    """Metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._waiting = Gauge(
            "localmoe_dispatch_waiting", "Requests that wait for an engine.", ["model_name"], registry=registry
        )
        self._refused = Counter(
            "localmoe_dispatch_refused",
            "Requests that no engine was given: overloaded, unavailable or deadline.",
            ["model_name", "reason"],
            registry=registry,
        )
        self._answers = Counter(
            "localmoe_dispatch_answers",
            "Requests that an engine was given, by what came of it: complete, abort, deadline or failed.",
            ["model_name", "engine", "outcome"],
            registry=registry,
        )
        self._resumed = Counter(
            "localmoe_streams_resumed",
            "Answers that an engine took over after another had failed.",
            ["model_name", "engine", "failed_engine"],
            registry=registry,
        )
        self._gap = Histogram(
            "localmoe_stream_resume_gap_seconds",
            "Last chunk of the failed engine to first chunk of its successor.",
            ["model_name"],
            buckets=_GAP_BUCKETS_S,
            registry=registry,
        )
        self._open = Gauge(
            "localmoe_breaker_open",
            "1 while an engine gets no requests, or one at a time, because it has failed too often.",
            ["model_name", "engine"],
            registry=registry,
        )

    def on_event(
        self, event: QueueChanged | RequestRefused | EngineAnswered | StreamResumed | BreakerChanged
    ) -> None:
        """Take in an event."""
        match event:
            case QueueChanged():
                self._waiting.labels(event.model).set(event.num_waiting)
            case RequestRefused():
                self._refused.labels(event.model, event.reason).inc()
            case EngineAnswered():
                self._answers.labels(event.model, event.engine, event.outcome).inc()
            case StreamResumed():
                self._resumed.labels(event.model, event.engine, event.failed_engine).inc()
                self._gap.labels(event.model).observe(event.gap_s)
            case BreakerChanged():
                self._open.labels(event.model, event.engine).set(event.is_open)
