"""Our own engine: a supervised process that serves one store."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from localmoe.core.errors import BackendUnavailableError, EngineDiedError, EngineStartError, LocalMoEError
from localmoe.core.events import EngineRestarted, EngineState, EventBus
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, TokenChunk
from localmoe.engine.client import EngineClient
from localmoe.engine.config import EngineConfig

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.5
_LONGEST_BACKOFF_S = 30.0
_STABLE_S = 60.0
"""An engine that lived this long had started well: the next backoff begins small again."""


class NativeBackend:
    """Starts an engine process, answers requests through it, and replaces it when it dies.

    Args:
        model: the name it is served under.
        store_path: the weights.
        config: engine settings.
        available_memory: asked before each start for the bytes that the engine may count on.
        bus: where engine states and restarts are published.
    """

    def __init__(
        self,
        *,
        model: str,
        store_path: Path,
        config: EngineConfig,
        available_memory: Callable[[], int],
        bus: EventBus,
    ) -> None:
        self._model = model
        self._store_path = store_path
        self._config = config
        self._available_memory = available_memory
        self._bus = bus
        self._client: EngineClient | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._state = "it is starting"
        """Why there is no engine, while there is none."""

    @property
    def is_ready(self) -> bool:
        return self._client is not None and self._client.is_ready

    async def start(self) -> None:
        """Returns when the engine is ready.

        Raises:
            EngineStartError: it cannot start; nothing is left running.
        """
        try:
            await self._start_client()
        except BaseException as error:
            await self.stop()
            if isinstance(error, EngineDiedError):
                raise EngineStartError(str(error)) from error
            raise
        self._supervisor = asyncio.create_task(self._supervise())

    async def stop(self) -> None:
        """End the engine; open requests fail."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._client is not None:
            await self._client.stop()

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`."""
        async with contextlib.aclosing(self._ready_client().generate(request)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def inspect(self) -> Inspection:
        """See `core.protocols.Inspectable.inspect`."""
        return await self._ready_client().inspect()

    def _ready_client(self) -> EngineClient:
        if self._client is None or not self._client.is_ready:
            raise BackendUnavailableError(f"the engine of {self._model} is not ready: {self._state}")
        return self._client

    async def _start_client(self) -> None:
        self._client = EngineClient(
            model=self._model,
            store_path=self._store_path,
            config=self._config,
            available_memory_bytes=self._available_memory(),
            on_state=self._bus.publish,
        )
        await self._client.start()

    async def _supervise(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            assert self._client is not None
            started = time.monotonic()
            reason = await self._client.wait_for_death()
            await self._client.stop()
            logger.error("%s; starting another", reason)
            self._state = f"restarting, because {reason}"
            self._bus.publish(EngineRestarted(model=self._model, reason=reason))
            self._bus.publish(EngineState.empty(self._model))
            if time.monotonic() - started > _STABLE_S:
                backoff_s = _FIRST_BACKOFF_S
            backoff_s = await self._start_again(backoff_s)

    async def _start_again(self, backoff_s: float) -> float:
        """Try until an engine is ready; returns the next backoff."""
        while True:
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)
            try:
                await self._start_client()
                return backoff_s
            except Exception as error:
                # Whatever it was, the server goes on and tries again: the cause may pass (memory, a file put back).
                self._state = f"it did not start again: {error}"
                logger.error("the engine did not start: %s", error, exc_info=not isinstance(error, LocalMoEError))
                assert self._client is not None
                await self._client.stop()
