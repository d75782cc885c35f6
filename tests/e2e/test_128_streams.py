"""128 streams at once through the real native engine: none fails, each is in time, none starves."""

import asyncio
import json
import statistics
import time
from pathlib import Path

import httpx2

from support.server import metric, running_server

MODEL = "distinct-experts"
NUM_STREAMS = 128
NUM_TOKENS = 400
TIMEOUT_S = 120.0


async def _times_s(client: httpx2.AsyncClient, index: int) -> list[float]:
    """When each of its tokens came."""
    body = {
        "model": MODEL,
        "prompt": f"{index} the quick brown fox",
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "logprobs": 0,
    }
    times_s: list[float] = []
    headers = {"x-localmoe-timeout-s": str(TIMEOUT_S)}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if not line or data == "[DONE]":
                continue
            event = json.loads(data)
            assert "error" not in event, event
            for choice in event["choices"]:
                times_s += [time.monotonic()] * len(choice["logprobs"]["tokens"] if choice["logprobs"] else ())
    return times_s


def test_128_streams_are_all_served_in_time_and_alike(tiny_home: Path) -> None:
    settings = {"ENGINE__MAX_NUM_SEQS": str(NUM_STREAMS)}

    async def all_streams(url: str) -> list[list[float]]:
        limits = httpx2.Limits(max_connections=NUM_STREAMS)
        async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
            return await asyncio.gather(*(_times_s(client, index) for index in range(NUM_STREAMS)))

    with running_server(tiny_home, MODEL, "f32", settings=settings) as (url, _):
        began_s = time.monotonic()
        streams = asyncio.run(all_streams(url))
        assert metric(url, "vllm:num_requests_running") == metric(url, "vllm:num_requests_waiting") == 0
    assert all(len(times_s) == NUM_TOKENS for times_s in streams)
    assert max(times_s[-1] for times_s in streams) - began_s < TIMEOUT_S
    # While all of them are there, each gets its share.
    since_s, until_s = max(times_s[0] for times_s in streams), min(times_s[-1] for times_s in streams)
    counts = [sum(since_s < time_s < until_s for time_s in times_s) for times_s in streams]
    mean = statistics.mean(counts)
    assert mean > NUM_TOKENS / 10, "they were not all there at a time"
    assert 0.8 * mean < min(counts), f"one got {min(counts)} tokens where {mean:.0f} are the mean"
    assert max(counts) < 1.2 * mean, f"one got {max(counts)} tokens where {mean:.0f} are the mean"
