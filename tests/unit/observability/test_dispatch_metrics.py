"""What dispatch publishes, as metrics."""

from localmoe.core.events import (
    BreakerChanged,
    EngineAnswered,
    EventBus,
    QueueChanged,
    RequestRefused,
    StreamResumed,
)
from localmoe.observability.metrics import Metrics


def test_every_event_has_its_metric() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(QueueChanged(model="m", num_waiting=3))
    bus.publish(RequestRefused(model="m", reason="overloaded"))
    for outcome in ("complete", "complete", "failed"):
        bus.publish(EngineAnswered(model="m", engine="a", outcome=outcome))
    bus.publish(StreamResumed(model="m", engine="b", failed_engine="a", num_tokens=7, gap_s=0.3))
    bus.publish(BreakerChanged(model="m", engine="a", is_open=True))
    lines = metrics.render()[0].decode().splitlines()
    for line in (
        'localmoe_dispatch_waiting{model_name="m"} 3.0',
        'localmoe_dispatch_refused_total{model_name="m",reason="overloaded"} 1.0',
        'localmoe_dispatch_answers_total{engine="a",model_name="m",outcome="complete"} 2.0',
        'localmoe_dispatch_answers_total{engine="a",model_name="m",outcome="failed"} 1.0',
        'localmoe_streams_resumed_total{engine="b",failed_engine="a",model_name="m"} 1.0',
        'localmoe_stream_resume_gap_seconds_bucket{le="0.25",model_name="m"} 0.0',
        'localmoe_stream_resume_gap_seconds_bucket{le="0.5",model_name="m"} 1.0',
        'localmoe_breaker_open{engine="a",model_name="m"} 1.0',
    ):
        assert line in lines
    bus.publish(BreakerChanged(model="m", engine="a", is_open=False))
    assert 'localmoe_breaker_open{engine="a",model_name="m"} 0.0' in metrics.render()[0].decode()
