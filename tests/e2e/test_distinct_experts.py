"""The whole service, as a user starts it, over the small mixture whose experts all differ."""

import asyncio
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.server import engine_pid, metric, resident_bytes, running_server

MODEL = "distinct-experts"
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny_home: Path) -> Iterator[tuple[str, int]]:
    # A small cache, so that soon all of its pages have been used and memory that grows on is a leak.
    with running_server(tiny_home, MODEL, "f32", settings={"ENGINE__KV_CACHE_BYTES": str(12 << 20)}) as server:
        yield server


def completion(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, "temperature": 0, "ignore_eos": True, **fields}


async def stream(
    client: httpx2.AsyncClient,
    body: dict[str, Any],
    *,
    stop_after: int | None = None,
    begun: asyncio.Event | None = None,
) -> list[Any]:
    """The events of a streamed completion; leaves after `stop_after` of them, sets `begun` at the first."""
    events: list[Any] = []
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                events.append(data if data == "[DONE]" else json.loads(data))
                if begun is not None:
                    begun.set()
                if len(events) == stop_after:
                    break
    return events


def test_the_gateway_loads_no_torch(server: tuple[str, int]) -> None:
    url, pid = server
    httpx2.post(f"{url}/v1/chat/completions", json={"model": MODEL, "messages": CHAT, "max_tokens": 2})
    assert "torch" not in Path(f"/proc/{pid}/maps").read_text()
    assert "torch" in Path(f"/proc/{engine_pid(pid)}/maps").read_text()


def test_streaming_and_not_streaming_agree(server: tuple[str, int]) -> None:
    url, _ = server
    body = completion("hello world", max_tokens=24, logprobs=2)
    whole = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]

    async def streamed() -> list[Any]:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            return await stream(client, body)

    *chunks, done = asyncio.run(streamed())
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"] == "length"


def test_a_seed_fixes_the_answer(server: tuple[str, int]) -> None:
    url, _ = server

    def ask(seed: int) -> str:
        body = completion("the quick", max_tokens=24, seed=seed) | {"temperature": 1.0}
        text: str = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        return text

    assert ask(1) == ask(1) != ask(2)


def test_scoring_a_prompt_as_evaluation_harnesses_do(server: tuple[str, int]) -> None:
    """The prompt comes back with a log-probability for every token but the first, and the same as a prompt's part."""
    url, _ = server

    def score(prompt: str) -> list[float | None]:
        body = completion(prompt, max_tokens=0, echo=True, logprobs=1)
        choice = httpx2.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]
        assert choice["text"] == prompt
        logprobs: list[float | None] = choice["logprobs"]["token_logprobs"]
        return logprobs

    short, long = score("hello"), score("hello the lazy dog")
    assert short[0] is None
    assert all(isinstance(value, float) and value < 0 for value in long[1:])
    assert long[1 : len(short)] == pytest.approx(short[1:], abs=1e-4)


def test_64_streams_a_third_of_them_cancelled_and_1000_requests_leave_nothing_behind(
    server: tuple[str, int],
) -> None:
    url, pid = server
    rng = random.Random(0)

    async def storm(num_requests: int) -> list[list[Any]]:
        gate = asyncio.Semaphore(64)
        async with httpx2.AsyncClient(
            base_url=url, timeout=120, limits=httpx2.Limits(max_connections=64)
        ) as client:

            async def one(i: int) -> list[Any]:
                body = completion("hello " * rng.randint(1, 60), max_tokens=rng.randint(8, 48))
                async with gate:
                    events = await stream(client, body, stop_after=body["max_tokens"] // 2 if i % 3 == 0 else None)
                assert all("error" not in event for event in events)
                if i % 3:
                    assert events[-1] == "[DONE]"
                    assert events[-2]["choices"][0]["finish_reason"] == "length"
                return events

            return await asyncio.gather(*map(one, range(num_requests)))

    def kv_usage_settled() -> float:
        """Cancellations arrive a moment after the client has left."""
        for _ in range(100):
            usage = metric(url, "vllm:kv_cache_usage_perc")
            if usage == 0:
                break
            asyncio.run(asyncio.sleep(0.05))
        return usage

    asyncio.run(storm(200))
    assert kv_usage_settled() == 0
    before = resident_bytes(pid), resident_bytes(engine_pid(pid))
    asyncio.run(storm(1000))
    assert kv_usage_settled() == 0
    assert metric(url, "vllm:num_requests_running") == metric(url, "vllm:num_requests_waiting") == 0
    after = resident_bytes(pid), resident_bytes(engine_pid(pid))
    for process, was, now in zip(("gateway", "engine"), before, after, strict=True):
        assert now - was < 16 << 20, f"the {process} grew from {was >> 20} to {now >> 20} MiB"


def test_killing_the_engine_breaks_no_stream_off(server: tuple[str, int]) -> None:
    url, pid = server

    async def run_8_streams(kill: bool) -> list[list[Any]]:
        begun = [asyncio.Event() for _ in range(8)]
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            streams = [
                asyncio.create_task(stream(client, completion(f"{i} hello", max_tokens=900), begun=event))
                for i, event in enumerate(begun)
            ]
            await asyncio.gather(*(event.wait() for event in begun))
            if kill:
                os.kill(engine_pid(pid), signal.SIGKILL)
            return await asyncio.gather(*streams)

    def texts(answers: list[list[Any]]) -> list[str]:
        assert all(events[-1] == "[DONE]" for events in answers)
        return ["".join(event["choices"][0]["text"] for event in events[:-1]) for events in answers]

    undisturbed = texts(asyncio.run(run_8_streams(kill=False)))
    assert texts(asyncio.run(run_8_streams(kill=True))) == undisturbed
    assert metric(url, "vllm:num_requests_running") == metric(url, "vllm:kv_cache_usage_perc") == 0
    assert metric(url, "localmoe_engine_restarts_total") == 1
    assert metric(url, "localmoe_streams_resumed_total") == 8
