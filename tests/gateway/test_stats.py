"""`/v1/stats/memory` and `/v1/stats/performance`."""

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.events import EventBus, RequestFinished
from localmoe.observability.performance import Performance
from localmoe.text.text_model import TextModel
from support.replicas import FakeClock
from support.tiny_text import encode


async def test_performance_of_the_answers_in_the_window(serve, text_model: TextModel) -> None:
    async with serve(ScriptedBackend(encode(text_model, "hello world"))) as client:
        empty = await client.get("/v1/stats/performance")
        for _ in range(3):
            await client.post("/v1/completions", json={"model": "tiny", "prompt": "hi", "max_tokens": 4})
        stats = (await client.get("/v1/stats/performance", params={"window_s": 30, "model": "tiny"})).json()
        unknown = await client.get("/v1/stats/performance", params={"model": "other"})
    assert empty.json()["measured"] == {}
    assert (stats["window_s"], stats["model"]) == (30, "tiny")
    tokens = stats["measured"]["completion_tokens"]
    assert (tokens["count"], tokens["mean"]) == (3, tokens["sum"] / 3)
    assert tokens["min"] <= tokens["mean"] <= tokens["max"]
    assert stats["measured"]["time_to_first_token_s"]["max"] <= stats["measured"]["e2e_s"]["max"]
    assert unknown.status_code == 404


@pytest.mark.parametrize("window_s", ["0", "-1", "nan", "inf", "3601", "x"])
async def test_a_window_that_is_none_is_refused(serve, window_s: str) -> None:
    async with serve(ScriptedBackend([5])) as client:
        response = await client.get("/v1/stats/performance", params={"window_s": window_s})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "window_s")


def test_answers_are_forgotten_after_an_hour_and_counted_by_their_window() -> None:
    bus, clock = EventBus(), FakeClock()
    performance = Performance(bus, clock=clock)

    def finish(e2e_s: float) -> None:
        bus.publish(
            RequestFinished(
                model="m",
                api="a",
                outcome="stop",
                prompt_tokens=1,
                completion_tokens=1,
                time_to_first_token_s=None,
                inter_token_s=(),
                queue_s=None,
                prefill_s=None,
                e2e_s=e2e_s,
            )
        )

    finish(1.0)
    clock.now_s += 100.0
    finish(2.0)
    assert performance.summaries(50.0, None)["e2e_s"].sum == 2.0
    assert performance.summaries(150.0, None)["e2e_s"].sum == 3.0
    assert performance.summaries(150.0, "other") == {}
    clock.now_s += 3550.0
    finish(4.0)
    assert performance.summaries(1e6, None)["e2e_s"].sum == 6.0


async def test_memory_of_this_machine(serve) -> None:
    async with serve(ScriptedBackend([5])) as client:
        stats = (await client.get("/v1/stats/memory")).json()
    ram = stats["machine"][0]
    assert ram["name"] == "ram"
    assert 0 < ram["available_bytes"] <= ram["total_bytes"]
    assert stats["engines"] == []
