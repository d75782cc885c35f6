"""Answers from the cache, over HTTP; and a real Redis that goes and comes."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.cli.answer_cache import LeveledAnswerCache, NoAnswerCache, make_answer_cache
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.core.identity import Role
from localmoe.core.protocols import Generator
from localmoe.gateway.app import create_app
from localmoe.gateway.cache.config import CacheConfig
from localmoe.gateway.cache.disk import DiskLevel
from localmoe.gateway.cache.levels import Cache
from localmoe.gateway.cache.memory import MemoryLevel
from localmoe.gateway.cache.redis import RedisLevel
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.authenticator import Authenticator
from localmoe.gateway.middleware.stack import Guard
from localmoe.text.text_model import TextModel
from support.identity import MemoryKeyStore, bearer
from support.redis_server import RedisServer, needs_redis
from support.tiny_text import encode, make_services, served_model

HEADER = "x-localmoe-cache"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@pytest.fixture
def backend(text_model: TextModel) -> ScriptedBackend:
    return ScriptedBackend(lambda request: _count(request) or encode(text_model, "hello world, again"))


asked: list[str] = []


def _count(request: Any) -> None:
    asked.append(request.id)


@pytest.fixture(autouse=True)
def forget() -> None:
    asked.clear()


@asynccontextmanager
async def gateway_over(
    text: TextModel, generator: Generator, *, keys: MemoryKeyStore | None = None, config: CacheConfig | None = None
) -> AsyncIterator[httpx2.AsyncClient]:
    bus = EventBus()
    app = create_app(
        {"tiny": served_model(text, generator)},
        services=make_services(bus),
        config=Current(GatewayConfig(cache=config or CacheConfig(enabled=True))),
        bus=bus,
        guard=Guard() if keys is None else Guard(identity=Authenticator(keys, None)),
    )
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def caching_gateway(
    text: TextModel, backend: ScriptedBackend, home: Path, *, keys: MemoryKeyStore | None = None, **settings: Any
) -> AsyncIterator[httpx2.AsyncClient]:
    await backend.start()
    config = CacheConfig(**{"enabled": True, **settings})
    cache = make_answer_cache(config, home=home)
    await cache.start()
    generator = cache.over(backend, text, version="1")
    try:
        async with gateway_over(text, generator, keys=keys, config=config) as client:
            yield client
    finally:
        await cache.stop()


async def ask(client: httpx2.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> httpx2.Response:
    answer = await client.post("/v1/chat/completions", json={**ASK, **body}, headers=headers or {})
    assert answer.status_code == 200, answer.text
    return answer


async def test_the_second_answer_is_from_memory(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        first, second = await ask(client), await ask(client)
    assert (first.headers[HEADER], second.headers[HEADER]) == ("miss", "hit; level=memory")
    assert first.json()["choices"] == second.json()["choices"]
    assert first.json()["usage"] == second.json()["usage"]
    assert first.json()["id"] != second.json()["id"]
    assert len(asked) == 1


async def test_streams_and_other_apis_share_an_entry(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        await ask(client)
        streamed = await ask(client, stream=True)
        body = {"model": "tiny", "text": "hi", "temperature": 0}
        inference = await client.post("/v1/inference", json=body)
        body = {"model": "tiny", "max_tokens": 200, "messages": ASK["messages"], "temperature": 0}
        messages = [await client.post("/v1/messages", json=body) for _ in range(2)]
    assert streamed.headers[HEADER] == "hit; level=memory"
    assert streamed.text.count("data:") > 2
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert (inference.headers[HEADER], inference.json()["text"]) == ("hit; level=memory", "hello world, again")
    assert [answer.headers[HEADER] for answer in messages] == ["miss", "hit; level=memory"]
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("headers", "first", "then"),
    [
        ({HEADER: "bypass"}, "bypass", "miss"),
        ({"cache-control": "no-store"}, "bypass", "miss"),
        ({"cache-control": "max-age=0, no-cache"}, "bypass", "hit; level=memory"),
        ({"cache-control": "max-age=100"}, "miss", "hit; level=memory"),
    ],
)
async def test_clients_go_past_the_cache(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path, headers: dict[str, str], first: str, then: str
) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        assert (await ask(client, headers)).headers[HEADER] == first
        assert (await ask(client)).headers[HEADER] == then


async def test_an_unknown_wish_is_refused(text_model: TextModel, backend: ScriptedBackend, tmp_path: Path) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        refused = await client.post("/v1/chat/completions", json=ASK, headers={HEADER: "please"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, HEADER)


async def test_only_repeatable_answers_have_the_header(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        for _ in range(2):
            assert HEADER not in (await ask(client, temperature=1)).headers
        assert HEADER not in (await client.get("/v1/models")).headers
        assert (await ask(client, temperature=1, seed=5)).headers[HEADER] == "miss"
        assert (await ask(client, temperature=1, seed=5)).headers[HEADER] == "hit; level=memory"
        assert (await ask(client, temperature=1, seed=6)).headers[HEADER] == "miss"


async def test_several_answers_are_a_hit_together(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        await ask(client, temperature=1, seed=5)
        both = await ask(client, temperature=1, seed=5, n=2)
        again = await ask(client, temperature=1, seed=5, n=2)
    assert (both.headers[HEADER], again.headers[HEADER]) == ("miss", "hit; level=memory")
    assert len(again.json()["choices"]) == 2


async def test_answers_cut_by_stop_strings_are_kept(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with caching_gateway(text_model, backend, tmp_path) as client:
        first, second = await ask(client, stop=["wor"]), await ask(client, stop=["wor"])
        whole = await ask(client)
    assert second.headers[HEADER] == "hit; level=memory"
    assert first.json()["choices"] == second.json()["choices"]
    assert first.json()["usage"] == second.json()["usage"]
    assert whole.json()["choices"][0]["message"]["content"] == "hello world, again"


@pytest.mark.parametrize("shared", [False, True])
async def test_nobody_learns_what_others_asked(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path, shared: bool
) -> None:
    keys = MemoryKeyStore()
    anna, bert = (bearer(keys.make(Role.USER)) for _ in range(2))
    async with caching_gateway(text_model, backend, tmp_path, keys=keys, shared=shared) as client:
        summaries = [(await ask(client, headers)).headers[HEADER] for headers in (anna, anna, bert)]
    assert summaries == ["miss", "hit; level=memory", "hit; level=memory" if shared else "miss"]


async def test_disk_outlives_the_server(text_model: TextModel, backend: ScriptedBackend, tmp_path: Path) -> None:
    async with caching_gateway(text_model, backend, tmp_path, disk_bytes=1 << 20) as client:
        await ask(client)
        await _until(lambda: list((tmp_path / "answers").glob("*/*.entry")))
    level = DiskLevel(tmp_path / "answers", max_bytes=1 << 20, ttl_s=100, max_entry_bytes=1 << 20)
    await level.start()
    memory = MemoryLevel(max_bytes=1 << 20, max_entries=9, ttl_s=100)
    cache = Cache(memory, [level], max_entry_bytes=1 << 20)
    restarted = LeveledAnswerCache(CacheConfig(enabled=True), home=tmp_path)
    restarted._cache = cache
    generator = restarted.over(backend, text_model, version="1")
    async with gateway_over(text_model, generator) as client:
        assert (await ask(client)).headers[HEADER] == "hit; level=disk"
        assert (await ask(client)).headers[HEADER] == "hit; level=memory"
    await cache.stop()
    assert len(asked) == 1


async def test_where_it_is_off_there_is_no_header(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    assert isinstance(make_answer_cache(CacheConfig(), home=tmp_path), NoAnswerCache)
    async with caching_gateway(text_model, backend, tmp_path, enabled=False) as client:
        for _ in range(2):
            assert HEADER not in (await ask(client)).headers
    assert len(asked) == 2


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as server:
        yield server


async def _until(condition: Any, timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


@needs_redis
async def test_gateways_share_answers_by_redis(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path, redis: RedisServer
) -> None:
    async with caching_gateway(text_model, backend, tmp_path / "a", redis_url=redis.url) as first:
        summaries: list[str] = []
        for number in range(200):  # once it has found Redis, entries go there
            await ask(first, max_tokens=100 + number)
            async with caching_gateway(text_model, backend, tmp_path / "b", redis_url=redis.url) as second:
                await asyncio.sleep(0.05)
                summaries.append((await ask(second, max_tokens=100 + number)).headers[HEADER])
            if summaries[-1] == "hit; level=redis":
                break
    assert summaries[-1] == "hit; level=redis"


@needs_redis
async def test_redis_killed_and_restarted_under_load(
    text_model: TextModel,
    backend: ScriptedBackend,
    tmp_path: Path,
    redis: RedisServer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No request fails or waits for it, and it is used again by itself."""
    times_s: list[float] = []
    levels: list[str] = []
    stop = asyncio.Event()
    # Next to nothing fits into memory; and a Redis that is only busy is not given up.
    settings = {"redis_url": redis.url, "memory_entries": 1, "redis_timeout_s": 1.0}
    async with caching_gateway(text_model, backend, tmp_path, **settings) as client:

        async def load(worker: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                begun_s = time.monotonic()
                answer = await ask(client, max_tokens=100 + (worker * 7 + number) % 40)
                times_s.append(time.monotonic() - begun_s)
                levels.append(answer.headers[HEADER])

        def hits() -> int:
            return levels.count("hit; level=redis")

        async def more_hits() -> None:
            before = hits()
            await _until(lambda: hits() > before + 20)

        # More at once than there are connections.
        tasks = [asyncio.create_task(load(worker)) for worker in range(40)]
        await more_hits()
        redis.kill()
        before = len(levels)
        await _until(lambda: len(levels) > before + 200)
        assert set(levels[-20:]) <= {"miss", "hit; level=memory"}
        redis.start()
        await more_hits()
        redis.pause()  # it hangs, which is worse
        before, slow = len(levels), len(times_s)
        await _until(lambda: len(levels) > before + 200)
        hung_s = sorted(times_s[slow:])
        redis.resume()
        await more_hits()
        stop.set()
        await asyncio.gather(*tasks)
    assert max(hung_s) < 2
    # One request found out each time; the others did not try.
    assert 2 <= sum("does without Redis" in record.message for record in caplog.records) <= 4


@needs_redis
async def test_a_redis_that_is_full_or_foreign_is_left_in_peace(redis: RedisServer) -> None:
    level = RedisLevel(redis.url, ttl_s=100, timeout_s=1, max_entry_bytes=1000)
    await level.start()
    await _until(lambda: level.is_well)
    key = bytes(32)
    await level.put(key, b"data")
    assert await level.get(key) == b"data"
    client = level._redis
    await client.set(b"localmoe:cache:" + key, b"something of somebody else")
    assert await level.get(key) is None
    await client.delete(b"localmoe:cache:" + key)
    await client.lpush(b"localmoe:cache:" + key, b"x")
    assert await level.get(key) is None
    await client.config_set("maxmemory", "1")
    await level.put(key, b"data")
    assert level.is_well
    await level.stop()


async def test_a_redis_that_was_never_there_costs_nothing(
    text_model: TextModel, backend: ScriptedBackend, tmp_path: Path
) -> None:
    async with caching_gateway(text_model, backend, tmp_path, redis_url="redis://127.0.0.1:1/0") as client:
        assert (await ask(client)).headers[HEADER] == "miss"
        assert (await ask(client)).headers[HEADER] == "hit; level=memory"
