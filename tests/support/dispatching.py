"""Engines that misbehave, and a dispatcher over them."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.events import Event, EventBus
from localmoe.core.request import Request, TokenChunk
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.policy import Policy, RoundRobin
from localmoe.dispatch.replica import Replica


class FakeHangingBackend(ScriptedBackend):
    """Recites some tokens, then says nothing more."""

    def __init__(self, script: Sequence[int], *, after_tokens: int) -> None:
        super().__init__(script)
        self._after_tokens = after_tokens

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        count = 0
        async for chunk in super().generate(request):
            if count == self._after_tokens:
                await asyncio.Event().wait()
            count += 1
            yield chunk


@asynccontextmanager
async def dispatching(
    backends: dict[str, Any],
    *,
    policy: Policy | None = None,
    clock: Callable[[], float] = time.monotonic,
    **config: Any,
) -> AsyncIterator[tuple[Dispatcher, list[Event]]]:
    """A started dispatcher over engines by name, kinds being the names, and what it publishes."""
    events: list[Event] = []
    bus = EventBus()
    bus.subscribe(events.append)
    settings = DispatchConfig(**{"retry_backoff_s": 0.01, "breaker_open_s": 0.2, **config})
    replicas = [
        Replica(name=name, kind=name, backend=backend, config=settings, clock=clock)
        for name, backend in backends.items()
    ]
    dispatcher = Dispatcher(
        model="m", replicas=replicas, policy=policy or RoundRobin(), config=settings, bus=bus, clock=clock
    )
    await dispatcher.start()
    while dispatcher.is_starting:  # noqa: ASYNC110 - the others start in the background
        await asyncio.sleep(0.001)
    try:
        yield dispatcher, events
    finally:
        await dispatcher.stop()
