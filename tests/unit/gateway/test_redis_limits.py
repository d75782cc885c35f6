"""Limits that several gateways count together, in a real Redis that dies and comes back."""

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmoe.core.current import Current
from localmoe.core.errors import RateLimitedError
from localmoe.core.identity import Principal, Role
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.limits.config import LimitsConfig
from localmoe.gateway.limits.limiter import Limiter
from support.redis_server import RedisServer, needs_redis

pytestmark = needs_redis
WHO = Principal(id="jwt:https://login.example/:alice", name="alice", role=Role.USER)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


def limiter_of(redis: RedisServer, **limits: int) -> Limiter:
    return Limiter(Current(GatewayConfig(limits=LimitsConfig(redis_url=redis.url, **limits))))


async def admitted(limiter: Limiter, num_requests: int) -> int:
    count = 0
    for _ in range(num_requests):
        try:
            (await limiter.begin(WHO)).end()
            count += 1
        except RateLimitedError:
            pass
    return count


async def test_gateways_count_together(redis: RedisServer) -> None:
    gateways = [limiter_of(redis, requests_per_minute=50) for _ in range(4)]
    assert sum(await asyncio.gather(*(admitted(gateway, 30) for gateway in gateways))) == 50
    for gateway in gateways:
        headers = await gateway.headers(WHO)
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert 0 < int(headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 120
        with pytest.raises(RateLimitedError) as refused:
            await gateway.begin(WHO)
        assert refused.value.retry_after_s is not None
        assert 0 < refused.value.retry_after_s <= 120
        await gateway.aclose()


async def test_tokens_are_charged_settled_and_given_back(redis: RedisServer) -> None:
    first, second = (limiter_of(redis, requests_per_minute=0, tokens_per_minute=1000) for _ in range(2))
    ticket = await first.begin(WHO)
    charged = await ticket.charge(300, 100)
    assert (await second.headers(WHO))["x-ratelimit-remaining-tokens"] == "700"
    ticket.settle(charged, prompt_tokens=300, answer_tokens=500)
    await first.drain()
    assert (await second.headers(WHO))["x-ratelimit-remaining-tokens"] == "200"
    ticket.settle(await ticket.charge(100, 100), prompt_tokens=0, answer_tokens=0)  # more was expected
    await first.drain()
    assert (await second.headers(WHO))["x-ratelimit-remaining-tokens"] == "200"
    ticket.settle(0, prompt_tokens=0, answer_tokens=5000)
    await first.drain()
    with pytest.raises(RateLimitedError, match="tokens"):
        await (await second.begin(WHO)).charge(1, 0)
    for gateway in (first, second):
        await gateway.aclose()


async def test_killed_and_restarted_under_load(
    redis: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localmoe.gateway.limits.limiter._REDIS_RETRY_S", 0.2)
    caplog.set_level(logging.WARNING)
    gateways = [limiter_of(redis, requests_per_minute=10**9) for _ in range(2)]
    durations_s: list[float] = []
    stop = asyncio.Event()

    async def load(limiter: Limiter) -> int:
        count = 0
        while not stop.is_set():
            started_s = time.monotonic()
            (await limiter.begin(WHO)).end()  # none is refused, none fails
            durations_s.append(time.monotonic() - started_s)
            count += 1
            await asyncio.sleep(0.002)
        return count

    def said(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    async def until(words: str, times: int) -> None:
        async with asyncio.timeout(20):
            while said(words) < times * len(gateways):  # noqa: ASYNC110 - the log has no event for it
                await asyncio.sleep(0.02)

    workers = [asyncio.create_task(load(gateway)) for gateway in gateways for _ in range(8)]
    for times in (1, 2, 3):
        await asyncio.sleep(0.2)
        await asyncio.to_thread(redis.kill)
        await until("Redis does not answer", times)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(redis.start)
        await until("Redis answers again", times)
    stop.set()
    assert sum(await asyncio.gather(*workers)) > 500
    assert said("Redis does not answer") == said("Redis answers again") == 3 * len(gateways)  # once each time
    # Both tell of the same count, which is that of both since Redis began anew.
    told = [int((await gateway.headers(WHO))["x-ratelimit-remaining-requests"]) for gateway in gateways]
    assert told[0] == told[1] < 10**9
    (await gateways[0].begin(WHO)).end()
    assert int((await gateways[1].headers(WHO))["x-ratelimit-remaining-requests"]) == told[1] - 1
    assert max(durations_s) < 2.0
    assert sorted(durations_s)[len(durations_s) // 2] < 0.1
    for gateway in gateways:
        await gateway.aclose()


async def test_while_it_is_away_each_gateway_counts_for_itself(redis: RedisServer) -> None:
    gateways = [limiter_of(redis, requests_per_minute=10) for _ in range(2)]
    redis.kill()
    assert await asyncio.gather(*(admitted(gateway, 30) for gateway in gateways)) == [10, 10]
    for gateway in gateways:
        await gateway.aclose()


async def test_one_that_hangs_holds_nobody_up() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    limiter = Limiter(Current(GatewayConfig(limits=LimitsConfig(redis_url=url, requests_per_minute=10))))
    started_s = time.monotonic()
    assert await admitted(limiter, 30) == 10
    assert time.monotonic() - started_s < 2.0
    await limiter.aclose()
    server.close()
