"""Engines that hang, fail, crawl and talk nonsense, as the clients of a server with them see it."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiohttp import web

from localmoe.backends.base import Backend
from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.backends.vllm import ServedModel, VllmBackend
from localmoe.backends.vllm_config import VllmConfig
from localmoe.core.errors import EngineDiedError, EngineFaultError
from localmoe.core.events import BreakerChanged, EngineAnswered, Event, EventBus
from localmoe.core.request import Request, TokenChunk
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.policy import FirstToComplete, Policy, RoundRobin
from localmoe.text.grammar_source import written
from localmoe.text.text_model import TextModel
from support.dispatching import FakeHangingBackend, dispatching
from support.fake_vllm import Answer, fake_vllm, piece, refuses, says
from support.tiny_text import encode, gateway_app, served_model

TEXT = "the quick brown fox jumps over the lazy dog."
SHORT_S = 0.4
"""A deadline that no misbehaving engine holds."""
LATE_S = 2.0
"""That a busy machine may add."""
STALL_S = 0.2
NUM_BEGUN = 3
"""Tokens that come before an answer goes wrong, where it does so in the middle."""


class ShiftedClock:
    """Goes as the clock does, and jumps when told to."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


def fails(error: type[Exception], after_tokens: int) -> Callable[[list[int]], Backend]:
    def make(ids: list[int]) -> Backend:
        return ScriptedBackend(ids, failure=ScriptedFailure(error=error("a bad day"), after_tokens=after_tokens))

    return make


def hangs(after_tokens: int) -> Callable[[list[int]], Backend]:
    return lambda ids: FakeHangingBackend(ids, after_tokens=after_tokens)


class FakeTurningBackend(ScriptedBackend):
    """Works until it is told to misbehave."""

    def __init__(self, ids: list[int], worse: Backend) -> None:
        super().__init__(ids)
        self._worse = worse
        self.has_turned = False

    async def start(self) -> None:
        await super().start()
        await self._worse.start()

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        chunks = self._worse.generate(request) if self.has_turned else super().generate(request)
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk


SCRIPTED: dict[str, Callable[[list[int]], Backend]] = {
    "hangs at first": hangs(0),
    "hangs later": hangs(NUM_BEGUN),
    "faults at first": fails(EngineFaultError, 0),
    "faults later": fails(EngineFaultError, NUM_BEGUN),
    "crashes at first": fails(KeyError, 0),
    "crashes later": fails(ZeroDivisionError, NUM_BEGUN),
    "dies at first": fails(EngineDiedError, 0),
    "dies later": fails(EngineDiedError, NUM_BEGUN),
    "crawls": lambda ids: ScriptedBackend(ids, delay_s=0.15),
}


async def html(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    return web.Response(text="<html>data: {}</html>", content_type="text/html")


async def silence(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


def garbage(ids: list[int]) -> dict[str, Answer]:
    """What a server that claims to be vLLM may send."""
    begin = [piece([token_id]) for token_id in ids[:NUM_BEGUN]]
    return {
        "no JSON": says("{not json"),
        "no JSON later": says(*begin, "{not json"),
        "JSON of something else": says('["an answer"]'),
        "ids outside the vocabulary": says(*begin, piece([1 << 30])),
        "negative ids": says(piece([-1])),
        "text in place of ids": says(piece(None)),
        "a stream that breaks": says(*begin, then_drop=True),
        "no finish reason": says(*begin),
        "no end at all": says(*begin, done=False),
        "two finish reasons": says(*begin, piece([ids[3]], "stop"), piece([ids[4]], "stop")),
        "a finish reason of its own": says(*begin, piece([ids[3]], "bored")),
        "more than was asked for": says(*begin, piece([ids[3]] * 1000, "length")),
        "an error in the stream": says(*begin, {"error": {"message": "CUDA error", "code": 500}}),
        "another content type": html,
        "status 500": refuses(500, {"error": {"message": "CUDA error"}}),
        "status 418": refuses(418, "no JSON object"),
        "silence": silence,
    }


def answers_with(how: str, ids: list[int]) -> Answer:
    """Garbage that begins as the answer goes on."""

    async def answer(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        prompt = body["prompt"]
        num_known = max(count for count in range(len(ids)) if prompt[len(prompt) - count :] == ids[:count])
        return await garbage(ids[num_known:])[how](request, body)

    return answer


GARBAGE = list(garbage([0] * 5))
CRAWLS = "crawls"


@dataclass
class Served:
    """A server of one model."""

    client: httpx2.AsyncClient
    events: list[Event]

    async def ask(self, timeout_s: float, *, stream: bool) -> tuple[httpx2.Response, float]:
        """The whole answer, and the seconds that it took."""
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 100, "temperature": 0, "stream": stream}
        headers = {"x-localmoe-timeout-s": str(timeout_s)}
        began_s = time.monotonic()
        response = await self.client.post("/v1/completions", json=body, headers=headers, timeout=30)
        return response, time.monotonic() - began_s

    def count(self, engine: str) -> int:
        """Answers that it was asked for."""
        return sum(isinstance(event, EngineAnswered) and event.engine == engine for event in self.events)

    @property
    def opened(self) -> list[str]:
        """Engines whose breakers opened."""
        return [event.engine for event in self.events if isinstance(event, BreakerChanged) and event.is_open]


@asynccontextmanager
async def serving(
    text_model: TextModel,
    how: str,
    *,
    beside: bool,
    clock: Callable[[], float] = time.monotonic,
    **config: Any,
) -> AsyncIterator[Served]:
    """An engine named `bad` that misbehaves so, and beside it perhaps one named `good`."""
    ids = encode(text_model, TEXT)
    async with AsyncExitStack() as stack:
        if how in SCRIPTED:
            backends = {"bad": SCRIPTED[how](ids)}
        else:
            fake = await stack.enter_async_context(fake_vllm())
            fake.max_context_tokens = 1024
            backends = {"bad": vllm_on(fake.url, text_model)}
        if beside:
            backends["good"] = ScriptedBackend(ids)
        settings = {"stall_timeout_s": STALL_S, "breaker_failures": 3, "breaker_open_s": 100.0, **config}
        dispatcher, events = await stack.enter_async_context(dispatching(backends, clock=clock, **settings))
        if how not in SCRIPTED:
            fake.answer = answers_with(how, ids)  # only now: it passed what is checked at the start
        yield await stack.enter_async_context(serving_over(text_model, dispatcher, events))


@asynccontextmanager
async def serving_over(
    text_model: TextModel, dispatcher: Dispatcher, events: list[Event]
) -> AsyncIterator[Served]:
    transport = httpx2.ASGITransport(app=gateway_app(served_model(text_model, dispatcher)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Served(client, events)


def vllm_on(url: str, text_model: TextModel) -> VllmBackend:
    return VllmBackend(
        model=ServedModel(name="m", vocab_size=text_model.vocab_size),
        name="bad",
        model_path=Path("checkpoint"),
        config=VllmConfig(url=url),
        python=None,
        on_gpu=False,
        write_grammar=written,
        bus=EventBus(),
    )


def read(response: httpx2.Response) -> tuple[str, dict[str, Any] | None, bool]:
    """(text, error, whether it is complete) of an answer, streamed or not."""
    if response.headers["content-type"].startswith("application/json"):
        body = response.json()
        if "error" in body:
            return "", body["error"], False
        return body["choices"][0]["text"], None, body["choices"][0]["finish_reason"] is not None
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    complete = blocks[-1] == "data: [DONE]"
    chunks = [json.loads(block.removeprefix("data: ")) for block in blocks[: -1 if complete else None]]
    error = chunks.pop()["error"] if "error" in chunks[-1] else None
    return "".join(chunk["choices"][0]["text"] for chunk in chunks), error, complete


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", [*SCRIPTED, *GARBAGE])
async def test_alone_it_costs_its_clients_an_error_that_says_so_in_time(
    text_model: TextModel, how: str, stream: bool
) -> None:
    async with serving(text_model, how, beside=False) as served:
        response, took_s = await served.ask(SHORT_S, stream=stream)
    text, error, complete = read(response)
    assert took_s < SHORT_S + LATE_S
    assert not complete
    assert error is not None
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"
    is_late = how in (CRAWLS, "hangs at first", "hangs later", "silence")
    without = "engine_unavailable" if how == "status 418" else "engine_died"
    assert error["code"] in (["deadline_exceeded"] if is_late else ["engine_fault", without])
    assert error["message"]
    assert "a bad day" not in error["message"] or not how.startswith("crashes")
    assert TEXT.startswith(text)
    assert response.status_code == (200 if text else 500 if error["code"] == "engine_fault" else 503)


@pytest.mark.parametrize("how", [how for how in (*SCRIPTED, *GARBAGE) if how != CRAWLS])
async def test_beside_a_good_one_nobody_notices_and_it_is_left_alone_soon(text_model: TextModel, how: str) -> None:
    clock = ShiftedClock()
    timeout_s = 10.0
    async with serving(text_model, how, beside=True, clock=clock) as served:

        async def ask_some(count: int) -> None:
            for index in range(count):
                response, took_s = await served.ask(timeout_s, stream=index % 2 == 0)
                assert (response.status_code, *read(response)) == (200, TEXT, None, True)
                assert took_s < timeout_s

        await ask_some(6)  # in turns, so three go to each
        assert served.opened == ["bad"]
        assert served.count("bad") == 3
        await ask_some(6)
        assert served.count("bad") == 3
        clock.ahead_s += 101.0
        await ask_some(6)
        assert served.count("bad") == 4  # one has tried


async def test_many_at_once_beside_a_good_one(text_model: TextModel) -> None:
    for how in ("hangs at first", "dies later", "no JSON later"):
        async with serving(text_model, how, beside=True) as served:
            answers = await asyncio.gather(*(served.ask(10.0, stream=index % 2 == 0) for index in range(20)))
            for response, took_s in answers:
                assert (response.status_code, *read(response)) == (200, TEXT, None, True)
                assert took_s < 10.0
            assert 0 < served.count("bad") <= 20  # nobody asks it twice


@pytest.mark.parametrize(
    ("how", "policy"),
    [("hangs at first", RoundRobin), ("hangs later", RoundRobin), (CRAWLS, RoundRobin), (CRAWLS, FirstToComplete)],
)
async def test_clients_in_a_hurry_get_their_answers_beside_one_that_was_good(
    text_model: TextModel, how: str, policy: Callable[[], Policy]
) -> None:
    """Though it has longer for an answer than they have, and does nothing wrong yet."""
    ids, timeout_s = encode(text_model, TEXT), 1.2
    bad = FakeTurningBackend(ids, SCRIPTED[how](ids))
    backends = {"bad": bad, "good": ScriptedBackend(ids)}
    async with (
        dispatching(backends, policy=policy(), stall_timeout_s=30.0) as (dispatcher, events),
        serving_over(text_model, dispatcher, events) as served,
    ):
        for index in range(6):
            bad.has_turned = index >= 2
            response, took_s = await served.ask(timeout_s, stream=index % 2 == 0)
            assert (response.status_code, *read(response)) == (200, TEXT, None, True)
            assert took_s < timeout_s
