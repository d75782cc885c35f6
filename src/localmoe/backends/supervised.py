"""An engine that is replaced when it dies."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import Generic, Protocol, TypeVar

from localmoe.core.errors import BackendUnavailableError, EngineDiedError, EngineStartError, LocalMoEError
from localmoe.core.events import EngineRestarted, EngineState, EventBus
from localmoe.core.protocols import Generator
from localmoe.core.request import Request, TokenChunk

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_STABLE_S = 60.0
"""An engine that lived this long had started well: the next backoff begins small again."""


class Incarnation(Generator, Protocol):
    """One life of an engine, from start to death; none has two."""

    async def start(self) -> None:
        """Return once requests are admitted. Call `stop` whatever comes of it.

        Raises:
            EngineStartError: it cannot start; trying again without a change will fail again.
            EngineDiedError: it ended before it was ready.
        """
        ...

    async def stop(self) -> None:
        """End it and free what it held; requests that are still open fail."""
        ...

    async def wait_for_death(self) -> str:
        """Returns, when it has ended, how."""
        ...


IncarnationT = TypeVar("IncarnationT", bound=Incarnation)


class SupervisedBackend(Generic[IncarnationT]):
    """Starts an engine, answers requests through it, and starts another when it dies.

    Args:
        model: the name it is served under.
        name: the engine's, for metrics and logs.
        capacity: requests that it computes at once; more would wait in it.
        context_tokens: prompt and answer together may not be longer; None: not known here.
        begin: makes the next incarnation.
        bus: where restarts are published.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str,
        capacity: int,
        context_tokens: int | None,
        begin: Callable[[], IncarnationT],
        bus: EventBus,
    ) -> None:
        self._model = model
        self._name = name
        self._begin = begin
        self._bus = bus
        self._current: IncarnationT | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._state = "it is starting"
        """Why there is no engine, while there is none."""
        self._context_tokens = context_tokens
        self.capacity = capacity

    @property
    def is_ready(self) -> bool:
        return self._current is not None and self._current.is_ready

    async def start(self) -> None:
        """See `Backend.start`. Where it fails, nothing is left running."""
        try:
            await self._start_current()
        except BaseException as error:
            await self.stop()
            if isinstance(error, EngineDiedError):
                raise EngineStartError(str(error)) from error
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """See `Backend.stop`."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._current is not None:
            await self._current.stop()
            self._bus.publish(EngineState.empty(self._model, self._name))

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`."""
        async with contextlib.aclosing(self.current().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    def refusal(self, request: Request) -> str | None:
        """See `Backend.refusal`."""
        if not request.prompt_ids:
            return "it takes token ids, and the model's tokenizer is not here"
        limit = self._context_tokens
        if limit is not None and len(request.prompt_ids) + request.sampling.max_tokens > limit:
            return f"its context is {limit} tokens, of prompt and answer together"
        return None

    def current(self) -> IncarnationT:
        """The engine that is ready now.

        Raises:
            BackendUnavailableError: there is none; the message says why.
        """
        if self._current is None or not self._current.is_ready:
            raise BackendUnavailableError(f"the engine of {self._model} is not ready: {self._state}")
        return self._current

    async def _start_current(self) -> None:
        self._current = self._begin()
        await self._current.start()
        self._state = "it has just ended"  # when it does, and before it is known why

    async def _supervise(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            assert self._current is not None
            started = time.monotonic()
            reason = await self._current.wait_for_death()
            self._state = f"restarting, because {reason}"
            await self._end(self._current)
            logger.error("%s: %s; starting another", self._name, reason)
            self._bus.publish(EngineRestarted(model=self._model, engine=self._name, reason=reason))
            self._bus.publish(EngineState.empty(self._model, self._name))
            if time.monotonic() - started > _STABLE_S:
                backoff_s = _FIRST_BACKOFF_S
            backoff_s = await self._start_again(backoff_s)

    async def _start_again(self, backoff_s: float) -> float:
        """Try until an engine is ready; returns the next backoff."""
        while True:
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            try:
                await self._start_current()
                return backoff_s
            except Exception as error:
                # Whatever it was, the server goes on and tries again: the cause may pass (memory, a file put back).
                self._state = f"it did not start again: {error}"
                foreseen = isinstance(error, LocalMoEError)
                logger.error("%s did not start: %s", self._name, error, exc_info=not foreseen)
                assert self._current is not None
                await self._end(self._current)

    async def _end(self, incarnation: IncarnationT) -> None:
        """Stop what is dead already; that it cannot be done cleanly keeps nobody from starting another."""
        try:
            await incarnation.stop()
        except Exception:
            logger.exception("%s could not be stopped cleanly", self._name)
