"""A backend over an engine elsewhere in a cluster, without Ray: the engine's side of the wire is played."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from localmoe.backends import ray_handle
from localmoe.backends.ray_config import RayConfig
from localmoe.backends.ray_handle import EngineReport, RayBackend
from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import BackendUnavailableError, EngineDiedError, EngineStartError
from localmoe.core.events import EngineRestarted, EngineState, Event, EventBus
from localmoe.core.request import Request, SamplingParams, TokenChunk

REQUEST = Request(id="a", model="m", prompt_ids=[1, 2], sampling=SamplingParams(max_tokens=3))
READY = EngineReport(is_ready=True)


class PlayedEngine:
    """Sends what is put into its queues; None ends a stream, an exception breaks it off."""

    def __init__(self) -> None:
        self.reports: asyncio.Queue[EngineReport | Exception | None] = asyncio.Queue()
        self.chunks: asyncio.Queue[TokenChunk | Exception | None] = asyncio.Queue()
        self.num_answering = 0
        self.requests: list[Request] = []

    async def stream(self, method: str, *arguments: bytes) -> AsyncGenerator[bytes, None]:
        queue: asyncio.Queue[EngineReport | TokenChunk | Exception | None]
        queue = self.reports if method == "watch" else self.chunks  # type: ignore[assignment]
        self.requests += [msgspec.msgpack.decode(one, type=Request) for one in arguments]
        self.num_answering += method == "generate"
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield msgspec.msgpack.encode([item] if isinstance(item, TokenChunk) else item)
        finally:
            self.num_answering -= method == "generate"

    async def call(self, method: str) -> bytes:
        raise NotImplementedError(method)


@asynccontextmanager
async def backend_over(engine: PlayedEngine, events: list[Event] | None = None) -> AsyncIterator[RayBackend]:
    bus = EventBus()
    if events is not None:
        bus.subscribe(events.append)
    backend = RayBackend(model="m", name="native", engine=engine, twin=ScriptedBackend([1], capacity=7), bus=bus)
    try:
        yield backend
    finally:
        await backend.stop()


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_handle, "_PAUSE_S", 0.01)


async def until_ready(backend: RayBackend, ready: bool = True) -> None:
    async with asyncio.timeout(5):
        while backend.is_ready != ready:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


def chunk(token_id: int) -> TokenChunk:
    return TokenChunk(request_id="a", token_ids=[token_id])


async def test_requests_and_chunks_cross_the_wire_unchanged() -> None:
    engine = PlayedEngine()
    async with backend_over(engine) as backend:
        engine.reports.put_nowait(READY)
        await backend.start()
        assert backend.is_ready
        assert backend.capacity == 7
        for item in (chunk(5), chunk(6), None):
            engine.chunks.put_nowait(item)
        assert [one async for one in backend.generate(REQUEST)] == [chunk(5), chunk(6)]
    assert engine.requests == [REQUEST]


async def test_an_engine_that_is_lost_fails_what_is_open_and_is_used_again_when_it_is_back() -> None:
    engine, events = PlayedEngine(), []  # type: ignore[var-annotated]
    async with backend_over(engine, events) as backend:
        engine.reports.put_nowait(READY)
        await backend.start()
        engine.chunks.put_nowait(chunk(5))
        async with aclosing(backend.generate(REQUEST)) as chunks:
            assert await anext(chunks) == chunk(5)
            engine.reports.put_nowait(EngineDiedError("its node is gone"))
            with pytest.raises(EngineDiedError, match="its node is gone"):
                await anext(chunks)
        assert engine.num_answering == 0
        assert EngineRestarted(model="m", engine="native", reason="its node is gone") in events
        assert EngineState.empty("m", "native") in events
        with pytest.raises(BackendUnavailableError, match="because its node is gone"):
            await anext(backend.generate(REQUEST))
        engine.reports.put_nowait(READY)
        await until_ready(backend)


async def test_silence_is_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_handle, "_SILENCE_S", 0.05)
    engine = PlayedEngine()
    async with backend_over(engine) as backend:
        engine.reports.put_nowait(READY)
        await backend.start()
        with pytest.raises(EngineDiedError, match="reported nothing"):
            await anext(backend.generate(REQUEST))


async def test_an_engine_that_could_not_be_started_is_used_once_it_can() -> None:
    engine = PlayedEngine()
    async with backend_over(engine) as backend:
        engine.reports.put_nowait(EngineReport(is_ready=False, failure="on node b: no memory"))
        with pytest.raises(EngineStartError, match="on node b: no memory"):
            await backend.start()
        engine.reports.put_nowait(None)
        engine.reports.put_nowait(READY)
        await until_ready(backend)


async def test_a_start_does_not_wait_for_ever_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_handle, "_PATIENCE_S", 0.01)
    engine = PlayedEngine()
    async with backend_over(engine) as backend:
        await backend.start()
        with pytest.raises(BackendUnavailableError, match="no place for it yet"):
            await anext(backend.generate(REQUEST))
        engine.reports.put_nowait(READY)
        await until_ready(backend)


async def test_its_own_restarts_are_passed_on() -> None:
    engine, events = PlayedEngine(), []  # type: ignore[var-annotated]
    state = EngineState.empty("m", "native")
    async with backend_over(engine, events) as backend:
        engine.reports.put_nowait(READY)
        await backend.start()
        engine.reports.put_nowait(EngineReport(is_ready=False, state=state, restarts=["it ended"]))
        await until_ready(backend, False)
        assert events[:2] == [EngineRestarted(model="m", engine="native", reason="it ended"), state]


async def test_closing_an_answer_cancels_it() -> None:
    engine = PlayedEngine()
    async with backend_over(engine) as backend:
        engine.reports.put_nowait(READY)
        await backend.start()
        engine.chunks.put_nowait(chunk(5))
        async with aclosing(backend.generate(REQUEST)) as chunks:
            await anext(chunks)
            assert engine.num_answering == 1
            waiting = asyncio.create_task(anext(chunks))  # type: ignore[arg-type]
            await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        assert engine.num_answering == 0
        assert backend.is_ready


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"address": ""}, "address is empty"),
        ({"address": "ray://host:10001"}, "Ray Client is not used"),
        ({"num_gateways": 0}, "num_gateways is 0"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RayConfig(**values)  # type: ignore[arg-type]
