"""Events in, Prometheus text out."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from localmoe.core.events import EngineRestarted, EngineState, EventBus, RequestFinished
from localmoe.observability.metrics import Metrics


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def finished(**fields: Any) -> RequestFinished:
    values: dict[str, Any] = {
        "model": "m",
        "api": "completions",
        "outcome": "stop",
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "time_to_first_token_s": 0.03,
        "inter_token_s": (0.02, 0.06),
        "queue_s": 0.01,
        "prefill_s": 0.02,
        "e2e_s": 0.11,
    }
    return RequestFinished(**{**values, **fields})


def state(**fields: int) -> EngineState:
    values = {
        "num_running": 2,
        "num_waiting": 5,
        "kv_blocks_used": 30,
        "kv_blocks_total": 120,
        "prefix_cache_queries": 100,
        "prefix_cache_hits": 40,
        "num_preemptions": 1,
        "num_draft_tokens": 12,
        "num_accepted_tokens": 9,
    }
    return EngineState(model="m", engine="native", **{**values, **fields})


MODEL = (("model_name", "m"),)
ENGINE = (("engine", "native"), *MODEL)


def test_finished_requests() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(finished())
    bus.publish(finished(outcome="abort", completion_tokens=0, time_to_first_token_s=None, inter_token_s=()))
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total", MODEL] == 14
    assert found["vllm:generation_tokens_total", MODEL] == 3
    assert found["vllm:request_success_total", (("finished_reason", "stop"), *MODEL)] == 1
    assert found["vllm:request_success_total", (("finished_reason", "abort"), *MODEL)] == 1
    assert found["vllm:request_queue_time_seconds_sum", MODEL] == pytest.approx(0.02)
    assert found["vllm:request_prefill_time_seconds_sum", MODEL] == pytest.approx(0.04)
    assert found["vllm:time_to_first_token_seconds_count", MODEL] == 1
    assert found["vllm:time_to_first_token_seconds_sum", MODEL] == pytest.approx(0.03)
    assert found["vllm:time_to_first_token_seconds_bucket", (("le", "0.04"), *MODEL)] == 1
    assert found["vllm:time_to_first_token_seconds_bucket", (("le", "0.02"), *MODEL)] == 0
    assert found["vllm:inter_token_latency_seconds_count", MODEL] == 2
    assert found["vllm:inter_token_latency_seconds_bucket", (("le", "0.025"), *MODEL)] == 1
    assert found["vllm:e2e_request_latency_seconds_count", MODEL] == 2
    assert found["vllm:request_decode_time_seconds_sum", MODEL] == pytest.approx(0.08)


def test_engine_states() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(state())
    bus.publish(state(num_running=0, prefix_cache_queries=150, prefix_cache_hits=40))
    found = samples(metrics)
    assert found["vllm:num_requests_running", ENGINE] == 0
    assert found["vllm:num_requests_waiting", ENGINE] == 5
    assert found["vllm:kv_cache_usage_perc", ENGINE] == 0.25
    assert found["vllm:prefix_cache_queries_total", ENGINE] == 150
    assert found["vllm:prefix_cache_hits_total", ENGINE] == 40
    assert found["localmoe_preemptions_total", ENGINE] == 1
    assert found["vllm:spec_decode_num_draft_tokens_total", ENGINE] == 12
    assert found["vllm:spec_decode_num_accepted_tokens_total", ENGINE] == 9


def test_counters_go_on_when_an_engine_begins_anew() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(state(prefix_cache_queries=100))
    bus.publish(EngineRestarted(model="m", engine="native", reason="killed"))
    bus.publish(state(prefix_cache_queries=10, kv_blocks_used=0, kv_blocks_total=0))
    found = samples(metrics)
    assert found["vllm:prefix_cache_queries_total", ENGINE] == 110
    assert found["localmoe_engine_restarts_total", ENGINE] == 1
    assert found["vllm:kv_cache_usage_perc", ENGINE] == 0


def test_two_registries_do_not_meet() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    other = Metrics(EventBus())
    bus.publish(finished())
    assert ("vllm:prompt_tokens_total", MODEL) in samples(metrics)
    assert ("vllm:prompt_tokens_total", MODEL) not in samples(other)
    assert metrics.render()[1].startswith("text/plain")
