"""Counters of HTTP requests."""

from localmoe.core.events import EventBus, HttpAnswered
from localmoe.observability.metrics import Metrics


def test_requests_are_counted_by_what_came_of_them() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    for status in (200, 200, 429):
        bus.publish(HttpAnswered(method="POST", route="/v1/completions", status=status, duration_s=0.3))
    bus.publish(HttpAnswered(method="other", route="other", status=401, duration_s=0.001))
    text = metrics.render()[0].decode()
    labels = 'method="POST",route="/v1/completions"'
    assert f'localmoe_http_requests_total{{{labels},status="200"}} 2.0' in text
    assert f'localmoe_http_requests_total{{{labels},status="429"}} 1.0' in text
    assert 'localmoe_http_requests_total{method="other",route="other",status="401"} 1.0' in text
    assert f'localmoe_http_request_duration_seconds_bucket{{le="0.25",{labels}}} 0.0' in text
    assert f'localmoe_http_request_duration_seconds_bucket{{le="0.5",{labels}}} 3.0' in text
