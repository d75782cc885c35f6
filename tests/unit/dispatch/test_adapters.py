"""A request for an adapter goes only to engines that have the model's adapters."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import BackendUnavailableError, EngineDiedError, InvalidRequestError
from localmoe.core.events import EventBus
from localmoe.core.request import Request
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.policy import RoundRobin
from localmoe.dispatch.replica import Replica
from support.models import greedy

PLAIN, ADAPTED = [1, 1, 1], [2, 2, 2]


def script(request: Request) -> list[int]:
    return ADAPTED if request.adapter else PLAIN


@asynccontextmanager
async def dispatching(*replicas: Replica) -> AsyncIterator[Dispatcher]:
    dispatcher = Dispatcher(
        model="m",
        replicas=replicas,
        policy=RoundRobin(),
        config=DispatchConfig(retry_backoff_s=0.01),
        bus=EventBus(),
    )
    await dispatcher.start()
    while dispatcher.is_starting:  # noqa: ASYNC110 - the others start in the background
        await asyncio.sleep(0.001)
    try:
        yield dispatcher
    finally:
        await dispatcher.stop()


def replica(name: str, *, takes_adapters: bool, failure: ScriptedFailure | None = None) -> Replica:
    # One that has no adapters does not know of them, and would answer all the same.
    backend = ScriptedBackend(script if takes_adapters else PLAIN, failure=failure)
    return Replica(name=name, kind=name, backend=backend, config=DispatchConfig(), takes_adapters=takes_adapters)


async def answer(dispatcher: Dispatcher, adapter: str | None, engine: str | None = None) -> Sequence[int]:
    asked = msgspec.structs.replace(greedy("r", [5], 3), adapter=adapter, engine=engine)
    return [token async for chunk in dispatcher.generate(asked) for token in chunk.token_ids]


async def test_it_goes_to_those_that_have_them() -> None:
    async with dispatching(replica("a", takes_adapters=False), replica("b", takes_adapters=True)) as dispatcher:
        assert [await answer(dispatcher, "l") for _ in range(4)] == [ADAPTED] * 4
        assert [await answer(dispatcher, None) for _ in range(4)] == [PLAIN] * 4
        with pytest.raises(InvalidRequestError, match="a adds no adapters to the model"):
            await answer(dispatcher, "l", engine="a")


async def test_an_answer_that_breaks_off_never_goes_on_without_it() -> None:
    broken = ScriptedFailure(error=EngineDiedError("gone"), after_tokens=1)
    replicas = replica("a", takes_adapters=False), replica("b", takes_adapters=True, failure=broken)
    async with dispatching(*replicas) as dispatcher:
        with pytest.raises(BackendUnavailableError):
            await answer(dispatcher, "l")


async def test_and_goes_on_with_it_elsewhere() -> None:
    broken = ScriptedFailure(error=EngineDiedError("gone"), after_tokens=1)
    replicas = replica("a", takes_adapters=True, failure=broken), replica("b", takes_adapters=True)
    async with dispatching(*replicas) as dispatcher:
        assert await answer(dispatcher, "l") == ADAPTED
