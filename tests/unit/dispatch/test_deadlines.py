"""Answers that are in danger of being late, and readers that leave with the last chunk."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import EngineFaultError
from localmoe.core.events import BreakerChanged, EngineAnswered, StreamResumed
from localmoe.core.request import Request, TokenChunk
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.pace import Pace
from support.dispatching import FakeHangingBackend, dispatching
from support.models import greedy
from support.replicas import FakeClock, make_replica

SCRIPT = list(range(100, 120))


def request(timeout_s: float) -> Request:
    return msgspec.structs.replace(greedy("a", [5, 6, 7], len(SCRIPT)), timeout_s=timeout_s)


async def tokens_of(dispatcher: Dispatcher, asked: Request) -> list[int]:
    """Read as the gateway does: who has the finish reason asks for no more."""
    tokens: list[int] = []
    async with aclosing(dispatcher.generate(asked)) as chunks:
        async for chunk in chunks:
            tokens += chunk.token_ids
            if chunk.finish_reason is not None:
                break
    return tokens


async def test_an_answer_is_complete_with_its_last_chunk() -> None:
    failing = ScriptedBackend(SCRIPT, failure=ScriptedFailure(error=EngineFaultError("a bug"), after_tokens=2))
    backends = {"a": failing, "b": ScriptedBackend(SCRIPT)}
    async with dispatching(backends, breaker_failures=1) as (dispatcher, events):
        assert await tokens_of(dispatcher, request(10.0)) == SCRIPT
    outcomes = [(event.engine, event.outcome) for event in events if isinstance(event, EngineAnswered)]
    assert outcomes == [("a", "failed"), ("b", "complete")]
    assert [event.engine for event in events if isinstance(event, BreakerChanged)] == ["a"]


async def test_a_silent_engine_is_left_while_another_can_be_in_time() -> None:
    backends = {"a": FakeHangingBackend(SCRIPT, after_tokens=3), "b": ScriptedBackend(SCRIPT)}
    async with dispatching(backends, stall_timeout_s=2.0) as (dispatcher, events):
        began_s = time.monotonic()
        assert await tokens_of(dispatcher, request(0.9)) == SCRIPT
        assert time.monotonic() - began_s < 0.9
        (resumed,) = [event for event in events if isinstance(event, StreamResumed)]
        assert resumed.num_tokens == 3


def test_an_engine_that_keeps_somebody_waiting_is_known_to_be_slow() -> None:
    clock = FakeClock()
    replica = make_replica("a", token_s=lambda running: 0.01, first_s=lambda tokens, running: 0.1, clock=clock)
    before_s = replica.speed.token_s(0, 0)
    for _ in range(30):
        replica.num_running = 1
        pace = Pace(replica, greedy("a", [5] * 10), known_tokens=0, num_beside=lambda: 0, clock=clock)
        clock.now_s += 0.1
        pace.take(TokenChunk(request_id="a", token_ids=[1]))
        clock.now_s += 0.1
        pace.take(TokenChunk(request_id="a", token_ids=[1]))
        clock.now_s += 0.4
        pace.give_up()
    assert replica.speed.token_s(0, 0) > 5 * before_s


class FakeWarmingBackend(ScriptedBackend):
    """Takes long for its first answer, as one does that compiles."""

    is_warm = False

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        if not self.is_warm:
            self.is_warm = True
            await asyncio.sleep(0.5)
        async for chunk in super().generate(request):
            yield chunk


async def test_how_long_an_engine_takes_to_warm_up_is_not_taken_for_its_speed() -> None:
    async with dispatching({"a": FakeWarmingBackend(SCRIPT), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        (warmed, _) = dispatcher.replicas
        while not warmed.speed.is_known:  # noqa: ASYNC110 - it is measured in the background
            await asyncio.sleep(0.01)
        assert warmed.speed.first_s(16, 0, 0) < 0.1
