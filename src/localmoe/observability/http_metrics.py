"""Metrics of HTTP: what was asked for, what came of it, and how long it took, refusals included."""

from prometheus_client import CollectorRegistry, Counter, Histogram

from localmoe.core.events import HttpAnswered

_BUCKETS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
    *(5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)


class HttpMetrics:
    """Metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "localmoe_http_requests",
            "Requests by the route that they were for, or `other`, and the answer's status; 499: the client left.",
            ["method", "route", "status"],
            registry=registry,
        )
        self._durations = Histogram(
            "localmoe_http_request_duration_seconds",
            "From a request's head to the end of its answer.",
            ["method", "route"],
            buckets=_BUCKETS_S,
            registry=registry,
        )

    def on_event(self, event: HttpAnswered) -> None:
        """Take in an event."""
        self._requests.labels(event.method, event.route, event.status).inc()
        self._durations.labels(event.method, event.route).observe(event.duration_s)
