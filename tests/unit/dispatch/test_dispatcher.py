"""One answer from several engines: choice, retry, continuation, deadlines."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import (
    BackendUnavailableError,
    DeadlineExceededError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InvalidRequestError,
    OverloadedError,
)
from localmoe.core.events import BreakerChanged, EngineAnswered, Event, RequestRefused, StreamResumed
from localmoe.core.request import FinishReason, Request, TokenChunk
from localmoe.dispatch.dispatcher import Dispatcher
from support.dispatching import FakeHangingBackend, dispatching
from support.models import greedy

SCRIPT = list(range(100, 110))


def request(max_tokens: int = 10, **fields: Any) -> Request:
    return msgspec.structs.replace(greedy("a", [5, 6, 7], max_tokens), **fields)


def dies(after_tokens: int, **options: Any) -> ScriptedBackend:
    failure = ScriptedFailure(error=EngineDiedError("killed"), after_tokens=after_tokens)
    return ScriptedBackend(SCRIPT, failure=failure, **options)


def faults(after_tokens: int) -> ScriptedBackend:
    return ScriptedBackend(
        SCRIPT, failure=ScriptedFailure(error=EngineFaultError("not a number"), after_tokens=after_tokens)
    )


class FakeMortal(ScriptedBackend):
    """Dies of its next request when it is told to, and is there again."""

    is_dying = False

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        if self.is_dying:
            raise EngineDiedError("killed")
        async with aclosing(super().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk


async def chunks_of(dispatcher: Dispatcher, asked: Request) -> list[TokenChunk]:
    async with aclosing(dispatcher.generate(asked)) as chunks:
        return [chunk async for chunk in chunks]


async def tokens_of(dispatcher: Dispatcher, asked: Request) -> list[int]:
    return [token for chunk in await chunks_of(dispatcher, asked) for token in chunk.token_ids]


def of(events: list[Event], kind: type) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


async def test_an_answer_goes_on_where_it_broke_off() -> None:
    async with dispatching({"a": dies(4), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, events):
        chunks = await chunks_of(dispatcher, request())
    assert [token for chunk in chunks for token in chunk.token_ids] == SCRIPT
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [FinishReason.STOP]
    (resumed,) = of(events, StreamResumed)
    assert (resumed.failed_engine, resumed.engine, resumed.num_tokens) == ("a", "b", 4)
    assert resumed.gap_s >= 0
    assert [(event.engine, event.outcome) for event in of(events, EngineAnswered)] == [
        ("a", "failed"),
        ("b", "complete"),
    ]


async def test_usage_is_of_the_whole_answer() -> None:
    async with dispatching({"a": dies(4), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        chunks = await chunks_of(dispatcher, request())
    last = chunks[-1].usage
    assert last is not None
    assert (last.prompt_tokens, last.completion_tokens) == (3, 10)


async def test_log_probabilities_of_the_prompt_come_once() -> None:
    asked = request()
    sampling = msgspec.structs.replace(asked.sampling, prompt_logprobs=1, logprobs=1)
    async with dispatching({"a": dies(4), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        chunks = await chunks_of(dispatcher, msgspec.structs.replace(asked, sampling=sampling))
    assert [chunk.prompt_logprobs is not None for chunk in chunks] == [True] + [False] * 9
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)


async def test_an_answer_as_text_is_not_continued() -> None:
    class FakeTextBackend(ScriptedBackend):
        async def generate(self, request: Request):
            yield TokenChunk(request_id=request.id, text="hel")
            raise EngineDiedError("gone")

    async with dispatching({"a": FakeTextBackend([]), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        with pytest.raises(EngineDiedError, match="gone"):
            await chunks_of(dispatcher, request())


async def test_a_single_engine_that_comes_back_goes_on() -> None:
    class FakePhoenix(ScriptedBackend):
        died = False

        async def generate(self, request: Request):
            count = 0
            async with aclosing(super().generate(request)) as chunks:
                async for chunk in chunks:
                    if count == 3 and not self.died:
                        self.died, self._started = True, False
                        asyncio.get_running_loop().call_later(0.1, self._restart)
                        raise EngineDiedError("killed")
                    count += 1
                    yield chunk

        def _restart(self) -> None:
            self._started = True

    async with dispatching({"a": FakePhoenix(SCRIPT)}) as (dispatcher, events):
        assert await tokens_of(dispatcher, request()) == SCRIPT
    assert len(of(events, StreamResumed)) == 1


async def test_a_request_is_open_while_its_engine_is_waited_for() -> None:
    """Or a model that is unloaded would be stopped meanwhile."""
    engine = FakeMortal(SCRIPT)
    engine.is_dying = True
    async with dispatching({"a": engine}, retry_backoff_s=0.2) as (dispatcher, _):
        answering = asyncio.create_task(tokens_of(dispatcher, request()))
        await asyncio.sleep(0.05)
        engine.is_dying = False
        assert dispatcher.num_open == 1
        assert await answering == SCRIPT
        assert dispatcher.num_open == 0


async def test_so_many_engines_are_tried_and_no_more() -> None:
    engines = {name: dies(0) for name in "abcd"}
    async with dispatching(engines, max_attempts=3) as (dispatcher, events):
        with pytest.raises(EngineDiedError):
            await chunks_of(dispatcher, request())
    assert len(of(events, EngineAnswered)) == 3


@pytest.mark.parametrize("then", [BackendUnavailableError("away"), OverloadedError("full")])
async def test_a_death_is_told_though_the_other_engine_was_only_not_to_be_had(
    then: BackendUnavailableError,
) -> None:
    engines = {"a": dies(0), "b": ScriptedBackend(SCRIPT, failure=ScriptedFailure(error=then))}
    async with dispatching(engines, max_attempts=2) as (dispatcher, _):
        with pytest.raises(EngineDiedError, match=str(then)):
            await chunks_of(dispatcher, request())


async def test_a_death_is_told_though_its_model_is_then_stopped() -> None:
    class FakeLast(FakeMortal):
        async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
            self._started = False
            raise EngineDiedError("killed")
            yield

    async with dispatching({"a": FakeLast(SCRIPT)}) as (dispatcher, _):
        answering = asyncio.create_task(chunks_of(dispatcher, request()))
        await asyncio.sleep(0.1)
        await dispatcher.stop()
        with pytest.raises(EngineDiedError, match="takes no requests now"):
            await answering


async def test_a_bad_request_is_tried_once() -> None:
    bad = ScriptedBackend(SCRIPT, failure=ScriptedFailure(error=InvalidRequestError("no such token")))
    async with dispatching({"a": bad, "b": ScriptedBackend(SCRIPT)}) as (dispatcher, events):
        with pytest.raises(InvalidRequestError):
            await chunks_of(dispatcher, request())
    assert len(of(events, EngineAnswered)) == 1


async def test_an_engine_that_is_full_costs_nothing() -> None:
    full = ScriptedBackend(SCRIPT, failure=ScriptedFailure(error=OverloadedError("full")))
    async with dispatching({"a": full, "b": ScriptedBackend(SCRIPT)}, breaker_failures=1) as (dispatcher, events):
        assert await tokens_of(dispatcher, request()) == SCRIPT
    assert of(events, BreakerChanged) == []


async def test_an_engine_that_faults_where_others_answer_is_closed() -> None:
    async with dispatching({"a": faults(2), "b": ScriptedBackend(SCRIPT)}, breaker_failures=2) as (
        dispatcher,
        events,
    ):
        for _ in range(6):
            assert await tokens_of(dispatcher, request()) == SCRIPT
        assert [(event.engine, event.is_open) for event in of(events, BreakerChanged)] == [("a", True)]
        assert len([event for event in of(events, EngineAnswered) if event.engine == "a"]) == 2
        await asyncio.sleep(0.25)  # half open: one request tries, and is answered by the other engine
        for _ in range(3):
            assert await tokens_of(dispatcher, request()) == SCRIPT
        assert len([event for event in of(events, EngineAnswered) if event.engine == "a"]) == 3


async def test_a_request_that_fails_everywhere_closes_nothing() -> None:
    async with dispatching({"a": faults(2), "b": faults(2)}, breaker_failures=1) as (dispatcher, events):
        for _ in range(3):
            with pytest.raises(EngineFaultError):
                await chunks_of(dispatcher, request())
        assert dispatcher.is_ready
    assert of(events, BreakerChanged) == []


async def test_a_death_with_many_requests_is_one_failure() -> None:
    engines = {"a": dies(4, delay_s=0.01), "b": ScriptedBackend(SCRIPT)}
    async with dispatching(engines, breaker_failures=2) as (dispatcher, events):
        answers = await asyncio.gather(*(tokens_of(dispatcher, request()) for _ in range(8)))
        assert answers == [SCRIPT] * 8
    assert of(events, BreakerChanged) == []


async def test_silence_is_a_failure_where_another_can_go_on() -> None:
    engines = {"a": FakeHangingBackend(SCRIPT, after_tokens=3), "b": ScriptedBackend(SCRIPT)}
    async with dispatching(engines, stall_timeout_s=0.1, breaker_failures=1) as (dispatcher, events):
        assert await tokens_of(dispatcher, request()) == SCRIPT
    assert [(event.engine, event.is_open) for event in of(events, BreakerChanged)] == [("a", True)]


async def test_nobody_waits_past_the_deadline() -> None:
    for engine in (FakeHangingBackend(SCRIPT, after_tokens=3), ScriptedBackend(SCRIPT, delay_s=0.05)):
        async with dispatching({"a": engine}) as (dispatcher, events):
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                await chunks_of(dispatcher, request(timeout_s=0.2))
            assert time.monotonic() - started < 1
            assert [event.outcome for event in of(events, EngineAnswered)] == ["deadline"]
            assert dispatcher.num_open == 0


async def test_an_engine_whose_answers_are_ended_early_is_as_good_as_others() -> None:
    """As behind stop sequences: whoever reads has enough."""

    async def read_some(dispatcher: Dispatcher) -> None:
        async with aclosing(dispatcher.generate(request())) as chunks:
            await anext(chunks)

    engine = FakeMortal(SCRIPT)
    async with dispatching({"a": engine}, breaker_failures=2, max_attempts=1) as (dispatcher, _):
        for _ in range(4):
            engine.is_dying = True
            with pytest.raises(EngineDiedError):
                await chunks_of(dispatcher, request())
            engine.is_dying = False
            await read_some(dispatcher)
        assert dispatcher.is_ready


async def test_an_engine_that_is_tried_again_is_open_to_all_once_it_answers() -> None:
    engine = FakeMortal(SCRIPT)
    async with dispatching({"a": engine}, breaker_failures=1, max_attempts=1) as (dispatcher, events):
        engine.is_dying = True
        with pytest.raises(EngineDiedError):
            await chunks_of(dispatcher, request())
        assert not dispatcher.is_ready
        engine.is_dying = False
        await asyncio.sleep(0.25)
        async with aclosing(dispatcher.generate(request())) as chunks:
            await anext(chunks)
            answers = await asyncio.gather(*(tokens_of(dispatcher, request()) for _ in range(2)))
        assert answers == [SCRIPT, SCRIPT]
    assert [event.is_open for event in of(events, BreakerChanged)] == [True, False]


async def test_who_reads_slowly_is_not_answered_past_the_deadline() -> None:
    """Though no chunk has to be waited for."""
    async with dispatching({"a": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        num_read = 0

        async def read_slowly() -> None:
            nonlocal num_read
            async with aclosing(dispatcher.generate(request(timeout_s=0.3))) as chunks:
                async for _ in chunks:
                    num_read += 1
                    await asyncio.sleep(0.1)

        with pytest.raises(DeadlineExceededError):
            await read_slowly()
        assert 2 <= num_read <= 4
        assert dispatcher.num_open == 0


async def test_who_would_be_in_time_in_an_engine_that_is_full_waits_for_it() -> None:
    """Though a slow one has a place."""
    fast, slow = (
        ScriptedBackend(SCRIPT, delay_s=0.01, capacity=1),
        ScriptedBackend(SCRIPT, delay_s=0.1, capacity=2),
    )
    async with dispatching({"fast": fast, "slow": slow}) as (dispatcher, events):
        while any(not one.speed.is_known or one.num_running for one in dispatcher.replicas):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # they are measured in the background
        busy = [asyncio.create_task(tokens_of(dispatcher, request(engine=name))) for name in ("fast", "slow")]
        await asyncio.sleep(0.02)
        assert await tokens_of(dispatcher, request(timeout_s=0.9)) == SCRIPT
        await asyncio.gather(*busy)
    assert [event.engine for event in of(events, EngineAnswered)] == ["fast", "fast", "slow"]


async def test_clients_in_a_hurry_close_nothing() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.05)
    async with dispatching({"a": engine}, breaker_failures=1) as (dispatcher, _):
        with pytest.raises(DeadlineExceededError):
            await chunks_of(dispatcher, request(timeout_s=0.02))
        assert dispatcher.is_ready


async def test_a_place_is_waited_for_in_turn() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.005, capacity=1)
    async with dispatching({"a": engine}) as (dispatcher, _):
        order: list[int] = []

        async def ask(index: int) -> None:
            assert await tokens_of(dispatcher, request()) == SCRIPT
            order.append(index)

        async with asyncio.TaskGroup() as group:
            for index in range(5):
                group.create_task(ask(index))
        assert order == [0, 1, 2, 3, 4]
        assert engine.num_running == 0


async def test_a_full_queue_refuses_at_once() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.02, capacity=1)
    async with dispatching({"a": engine}, max_queued=2) as (dispatcher, events):
        tasks = [asyncio.create_task(tokens_of(dispatcher, request())) for _ in range(3)]
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match=r"queue is full \(2") as caught:
            await chunks_of(dispatcher, request())
        assert caught.value.retry_after_s >= 1
        assert await asyncio.gather(*tasks) == [SCRIPT] * 3
    assert [event.reason for event in of(events, RequestRefused)] == ["overloaded"]


async def test_what_would_be_late_is_refused_at_once() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.02, capacity=1)
    async with dispatching({"a": engine}) as (dispatcher, _):
        await chunks_of(dispatcher, request())  # takes 0.2 s
        tasks = [asyncio.create_task(tokens_of(dispatcher, request(timeout_s=10))) for _ in range(4)]
        await asyncio.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(OverloadedError, match="its time is over in"):
            await chunks_of(dispatcher, request(timeout_s=0.6))
        assert time.monotonic() - started < 0.1
        assert await asyncio.gather(*tasks) == [SCRIPT] * 4


async def test_who_names_no_time_is_not_refused_for_what_is_only_feared() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.02, capacity=1)
    async with dispatching({"a": engine}, request_timeout_s=0.7) as (dispatcher, _):
        await chunks_of(dispatcher, request())  # takes 0.2 s
        first = asyncio.create_task(tokens_of(dispatcher, request()))
        await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="its time is over in"):
            await chunks_of(dispatcher, request(timeout_s=0.7))
        assert await tokens_of(dispatcher, request()) == SCRIPT
        assert await first == SCRIPT


async def test_who_leaves_the_queue_leaves_no_place_taken() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.01, capacity=1)
    async with dispatching({"a": engine}) as (dispatcher, _):
        first = asyncio.create_task(tokens_of(dispatcher, request()))
        others = [asyncio.create_task(tokens_of(dispatcher, request())) for _ in range(5)]
        await asyncio.sleep(0.03)
        for other in others[:4]:
            other.cancel()
        assert await first == SCRIPT
        assert await others[4] == SCRIPT
        assert dispatcher.num_open == 0


async def test_a_client_that_leaves_frees_its_place() -> None:
    engine = ScriptedBackend(SCRIPT, capacity=1)
    async with dispatching({"a": engine}) as (dispatcher, events):
        async with aclosing(dispatcher.generate(request())) as chunks:
            await anext(chunks)
        assert dispatcher.num_open == 0
        assert engine.num_cancelled == 1
        assert [event.outcome for event in of(events, EngineAnswered)] == ["abort"]
        assert await tokens_of(dispatcher, request()) == SCRIPT


async def test_a_request_may_name_its_engine() -> None:
    async with dispatching({"a": ScriptedBackend([1]), "b": ScriptedBackend([2])}) as (dispatcher, _):
        for _ in range(3):
            assert await tokens_of(dispatcher, request(engine="b")) == [2]
        with pytest.raises(InvalidRequestError, match="no engine of this model is called 'c'; its engines: a, b"):
            await chunks_of(dispatcher, request(engine="c"))


async def test_what_no_engine_can_do_is_refused_with_the_reason() -> None:
    class FakePickyBackend(ScriptedBackend):
        def refusal(self, request: Request) -> str | None:
            return "it cannot count"

    async with dispatching({"a": FakePickyBackend(SCRIPT)}) as (dispatcher, _):
        with pytest.raises(InvalidRequestError, match="it cannot count"):
            await chunks_of(dispatcher, request())


async def test_without_any_engine_there_is_nothing_to_wait_for() -> None:
    engine = ScriptedBackend(SCRIPT)
    async with dispatching({"a": engine}) as (dispatcher, events):
        await engine.stop()
        with pytest.raises(BackendUnavailableError, match="a is starting"):
            await chunks_of(dispatcher, request())
        assert [event.reason for event in of(events, RequestRefused)] == ["unavailable"]


class FakeBrokenBackend(ScriptedBackend):
    async def start(self) -> None:
        raise EngineStartError("no memory")


async def test_one_engine_that_does_not_start_is_done_without() -> None:
    async with dispatching({"a": FakeBrokenBackend([]), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        assert await tokens_of(dispatcher, request()) == SCRIPT
        with pytest.raises(BackendUnavailableError, match="a could not be started: no memory"):
            await chunks_of(dispatcher, request(engine="a"))


async def test_no_engine_at_all_is_an_error() -> None:
    with pytest.raises(EngineStartError, match="no memory"):
        async with dispatching({"a": FakeBrokenBackend([]), "b": FakeBrokenBackend([])}):
            pass


class FakeForgetfulBackend(ScriptedBackend):
    """Cannot go on with what another has begun."""

    def refusal(self, request: Request) -> str | None:
        return "it cannot go on" if request.resumed_ids else None


async def test_an_engine_that_cannot_go_on_is_not_asked_to() -> None:
    engines = {"a": dies(4), "b": FakeForgetfulBackend(SCRIPT), "c": ScriptedBackend(SCRIPT)}
    async with dispatching(engines) as (dispatcher, events):
        assert await tokens_of(dispatcher, request()) == SCRIPT
    assert [event.engine for event in of(events, StreamResumed)] == ["c"]


async def test_where_no_other_engine_can_go_on_the_failure_is_told_at_once() -> None:
    class FakeUnableBackend(FakeForgetfulBackend):
        async def generate(self, request: Request):
            async with aclosing(super().generate(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
                    raise EngineDiedError("killed")

    async with dispatching({"a": FakeUnableBackend(SCRIPT), "b": FakeForgetfulBackend(SCRIPT)}) as (dispatcher, _):
        started = time.monotonic()
        with pytest.raises(EngineDiedError, match="killed"):
            await chunks_of(dispatcher, request())
        assert time.monotonic() - started < 1


async def test_who_waits_when_it_is_stopped_is_told() -> None:
    engine = ScriptedBackend(SCRIPT, delay_s=0.05, capacity=1)
    async with dispatching({"a": engine}) as (dispatcher, _):
        tasks = [asyncio.create_task(tokens_of(dispatcher, request())) for _ in range(3)]
        await asyncio.sleep(0.02)
        await dispatcher.stop()
        for task in tasks[1:]:
            with pytest.raises(BackendUnavailableError, match="it was stopped"):
                await task
        tasks[0].cancel()


async def test_clients_in_a_hurry_close_nothing_beside_another_engine_either() -> None:
    engines = {"a": FakeHangingBackend(SCRIPT, after_tokens=3), "b": ScriptedBackend(SCRIPT)}
    async with dispatching(engines, breaker_failures=1, stall_timeout_s=1.0) as (dispatcher, events):
        for _ in range(4):
            assert await tokens_of(dispatcher, request(timeout_s=0.6)) == SCRIPT
    assert of(events, BreakerChanged) == []
