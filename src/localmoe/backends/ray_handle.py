"""An engine that lives in a Ray Serve deployment, wherever in the cluster Ray has put it.

Its life is Ray's business: when its node dies, Serve starts it on another one. What is here only looks on, by a
stream of reports that the engine sends about once a second for as long as it is watched. The stream waits while the
engine has no place, and breaks off, or falls silent, when it loses it; then all answers under way fail with
`EngineDiedError`, so that dispatch continues them elsewhere, and watching begins again.

Requests, chunks and reports travel as MessagePack. Ray itself pickles what surrounds them, so a cluster must let in
nobody who has not its token.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

import msgspec

from localmoe.backends.base import Backend
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    LocalMoEError,
)
from localmoe.core.events import EngineRestarted, EngineState, EventBus
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, TokenChunk

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
_SILENCE_S = 10.0
"""An engine that is watched and reports nothing for so long is lost, or cannot be reached."""
_PAUSE_S = 0.5
_PATIENCE_S = 60.0
"""How long a start waits for an engine; then it goes on without, and the engine is used once it is there."""
_INSPECT_S = 10.0


class EngineReport(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How an engine is, as it says itself."""

    is_ready: bool
    failure: str | None = None
    """Why it could not be started, if so. Ray will start it again."""
    state: EngineState | None = None
    restarts: list[str] = []
    """Why its process was replaced, once for each time since the last report."""


class EngineHandle(Protocol):
    """The methods of one engine somewhere, whose arguments and results are bytes."""

    def stream(self, method: str, *arguments: bytes) -> AsyncGenerator[bytes, None]:
        """Call a method that sends several items. Closing the generator cancels the call.

        Raises:
            EngineDiedError: the engine was there, and is no more.
            LocalMoEError: whatever the method raised, if it is of ours; EngineFaultError if not.
        """
        ...

    async def call(self, method: str) -> bytes:
        """Call a method that returns one thing. Raises as `stream` does."""
        ...


class ServeEngineHandle:
    """An `EngineHandle` over Ray Serve's own.

    Args:
        handle: of a deployment that has one replica.
    """

    def __init__(self, handle: Any) -> None:
        self._unary = handle
        self._streaming = handle.options(stream=True)

    async def stream(self, method: str, *arguments: bytes) -> AsyncGenerator[bytes, None]:
        """See `EngineHandle.stream`."""
        items = getattr(self._streaming, method).remote(*arguments)
        try:
            async for item in items:
                yield item
        except Exception as error:
            raise _translated(error) from error
        finally:
            items.cancel()

    async def call(self, method: str) -> bytes:
        """See `EngineHandle.call`."""
        try:
            answer: bytes = await getattr(self._unary, method).remote()
        except Exception as error:
            raise _translated(error) from error
        return answer


def _translated(error: Exception) -> Exception:
    """What an exception of Ray's means here."""
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    if isinstance(error, RayTaskError):  # the method's own exception, behind what Ray tells about it
        cause = error.cause
        return cause if isinstance(cause, LocalMoEError) else EngineFaultError(f"the engine failed: {cause!r}")
    if isinstance(error, RayError | RayServeException):
        return EngineDiedError(f"its place in the cluster was lost: {str(error).splitlines()[0]}")
    return error


class RayBackend:
    """A `Backend` over an engine in the cluster. To be made where an event loop runs: it is watched from then on,
    so that it is used whenever it is there, whatever became of its start.

    Args:
        model: the name it is served under.
        name: the engine's, where a model has several.
        engine: calls it.
        twin: an engine of the same settings that is never started; knows what it refuses, and how much it takes.
        bus: where the engine's states and restarts are published.
    """

    def __init__(self, *, model: str, name: str, engine: EngineHandle, twin: Backend, bus: EventBus) -> None:
        self._model = model
        self._name = name
        self._engine = engine
        self._twin = twin
        self._bus = bus
        self.capacity = twin.capacity
        self.problem: str | None = "Ray has no place for it yet"
        """Why no request would be admitted now, while none would."""
        self._failure: str | None = None
        self._heard = asyncio.Event()
        """Set once it was ready, or has failed to start."""
        self._death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Of the engine that is watched now; says how it was lost."""
        self._watching = asyncio.create_task(self._watch())

    @property
    def is_ready(self) -> bool:
        """See `Generator.is_ready`."""
        return self.problem is None

    async def start(self) -> None:
        """Wait until the engine is ready, but not for ever: others may be, and this one is used when it is there.

        Raises:
            EngineStartError: it is there, and could not be started.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE_S):
                await self._heard.wait()
        if self.problem is not None:
            if self._failure is not None:
                raise EngineStartError(self._failure)
            logger.warning("%s: %s is not ready: %s", self._model, self._name, self.problem)

    async def stop(self) -> None:
        """See `Backend.stop`. The engine itself ends with the Serve application, not with one gateway of several."""
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        self._lose("it was stopped")

    def refusal(self, request: Request) -> str | None:
        """See `Backend.refusal`."""
        return self._twin.refusal(request)

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`."""
        if self.problem is not None:
            raise BackendUnavailableError(f"the engine {self._name} of {self._model} is not ready: {self.problem}")
        death = self._death
        items = self._engine.stream("generate", msgspec.msgpack.encode(request))
        async with aclosing(items):
            while (item := await _unless(death, _next(items))) is not None:
                for chunk in msgspec.msgpack.decode(item, type=list[TokenChunk]):
                    yield chunk

    async def inspect(self) -> Inspection:
        """See `core.protocols.Inspectable.inspect`."""
        if self.problem is not None:
            raise BackendUnavailableError(f"the engine {self._name} of {self._model} is not ready: {self.problem}")
        try:
            async with asyncio.timeout(_INSPECT_S):
                return msgspec.msgpack.decode(await self._engine.call("inspect"), type=Inspection)
        except TimeoutError:
            raise BackendUnavailableError(f"the engine {self._name} of {self._model} did not answer") from None

    async def _watch(self) -> None:
        while True:
            try:
                reason = await self._follow()
            except Exception as error:
                # Whatever it was, it is watched again: the engine may come back.
                if not isinstance(error, LocalMoEError):
                    logger.exception("watching %s failed", self._name)
                reason = str(error)
            self._lose(reason)
            await asyncio.sleep(_PAUSE_S)

    async def _follow(self) -> str:
        """Take one engine's reports as they come; returns how they ended."""
        limit_s: float | None = None  # until it has a place, there is nobody to report
        async with aclosing(self._engine.stream("watch")) as reports:
            while True:
                try:
                    async with asyncio.timeout(limit_s):
                        item = await _next(reports)
                except TimeoutError:
                    return f"it has reported nothing for {_SILENCE_S:g} s"
                if item is None:
                    return "it was ended"
                limit_s = _SILENCE_S
                self._take(msgspec.msgpack.decode(item, type=EngineReport))

    def _take(self, report: EngineReport) -> None:
        for reason in report.restarts:
            self._bus.publish(EngineRestarted(model=self._model, engine=self._name, reason=reason))
        if report.state is not None:
            self._bus.publish(report.state)
        self._failure = report.failure
        if report.is_ready:
            self.problem = None
        else:
            self.problem = report.failure or "it is starting"
        if report.is_ready or report.failure is not None:
            self._heard.set()

    def _lose(self, reason: str) -> None:
        if self.problem is None:
            logger.error("%s: %s: %s; waiting for Ray to start another", self._model, self._name, reason)
            self._bus.publish(EngineRestarted(model=self._model, engine=self._name, reason=reason))
            self._bus.publish(EngineState.empty(self._model, self._name))
        if self._failure is None:
            self.problem = f"Ray has no place for it now, because {reason}"
        self._death.set_result(reason)
        self._death = asyncio.get_running_loop().create_future()


async def _next(items: AsyncGenerator[bytes, None]) -> bytes | None:
    """None at the end."""
    return await anext(items, None)


async def _unless(death: asyncio.Future[str], work: Coroutine[Any, Any, bytes | None]) -> bytes | None:
    """The result of work, unless a death comes first.

    Raises:
        EngineDiedError: it did.
    """
    task = asyncio.create_task(work)
    either: set[asyncio.Future[Any]] = {task, death}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise EngineDiedError(death.result())
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
