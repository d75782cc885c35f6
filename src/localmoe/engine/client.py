"""The client's side of an engine process: one incarnation, from spawn to death.

All of it runs on one asyncio loop. A receiver task hands each output to the queue of its request; a watcher task
waits for the process to end and then fails every request that is still open; a third kills an engine that has
requests but reports no step for too long, so that nobody waits for ever. A generator that is closed early tells the
engine, which frees what the request held.
"""

import asyncio
import contextlib
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.events import EngineState
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, RequestFailed, TokenChunk
from localmoe.engine.config import EngineConfig
from localmoe.engine.messages import (
    Cancel,
    FromEngine,
    Inspect,
    Inspected,
    Launch,
    Outputs,
    Ready,
    Submit,
    ToEngine,
)

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0


class EngineClient:
    """One engine process.

    Args:
        model: the name it is served under.
        store_path: the weights.
        config: engine settings.
        available_memory_bytes: what the engine may count on.
        on_state: called after every step of the engine; must be quick.
    """

    def __init__(
        self,
        *,
        model: str,
        store_path: Path,
        config: EngineConfig,
        available_memory_bytes: int,
        on_state: Callable[[EngineState], None],
    ) -> None:
        self._model = model
        self._store_path = store_path
        self._config = config
        self._available_memory_bytes = available_memory_bytes
        self._on_state = on_state
        self._streams: dict[str, asyncio.Queue[TokenChunk | LocalMoEError]] = {}
        self._inspection: asyncio.Future[Inspection] | None = None
        """What the engine was asked for and has not told yet."""
        self._wire_ids = itertools.count()
        self._last_heard_s = 0.0
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._died: asyncio.Future[str] = loop.create_future()
        self._cleanup = AsyncExitStack()

    @property
    def is_ready(self) -> bool:
        """Whether the model is loaded and the process, as far as we know, alive."""
        return self._ready.done() and self._ready.exception() is None and not self._died.done()

    async def start(self) -> None:
        """Spawn the process and wait until the model is loaded. Call `stop` whatever comes of it.

        Raises:
            EngineStartError: it cannot start as configured; the message says why.
            EngineDiedError: it ended before it was ready.
        """
        # Mode 0700: nobody else can reach the socket. The name is needed until the engine has connected.
        with tempfile.TemporaryDirectory(prefix="localmoe-", ignore_cleanup_errors=True) as folder:
            try:
                await self._spawn(f"ipc://{folder}/engine")
            except (OSError, zmq.ZMQError) as error:
                raise EngineStartError(f"the engine's process could not be started: {error}") from error
            # Shielded: a caller that gives up must not cancel what `is_ready` looks at.
            await asyncio.shield(self._ready)

    async def stop(self) -> None:
        """End the process and release everything; requests still open fail."""
        self._end("the engine was stopped")
        await self._cleanup.aclose()

    async def wait_for_death(self) -> str:
        """Returns, when the process has ended, how."""
        return await asyncio.shield(self._died)

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`."""
        if not self.is_ready:
            raise EngineDiedError("the engine is not running")
        # Clients may repeat a request id; on the wire it must name one request only.
        wire_id = str(next(self._wire_ids))
        stream: asyncio.Queue[TokenChunk | LocalMoEError] = asyncio.Queue()
        if not self._streams:
            self._last_heard_s = time.monotonic()  # nothing was expected before
        self._streams[wire_id] = stream
        try:
            await self._send(Submit(msgspec.structs.replace(request, id=wire_id)))
            while True:
                item = await stream.get()
                if isinstance(item, LocalMoEError):
                    raise item
                if item.finish_reason is not None:
                    self._streams.pop(wire_id)
                yield msgspec.structs.replace(item, request_id=request.id)
                if item.finish_reason is not None:
                    return
        finally:
            if self._streams.pop(wire_id, None) is not None and self.is_ready:
                with contextlib.suppress(EngineDiedError):
                    await self._send(Cancel(wire_id))

    async def inspect(self) -> Inspection:
        """See `core.protocols.Inspectable.inspect`. Those who ask at the same time share one answer."""
        if not self.is_ready:
            raise EngineDiedError("the engine is not running")
        if self._inspection is None:
            self._inspection = asyncio.get_running_loop().create_future()
            try:
                await self._send(Inspect())
            except BaseException:
                self._end_inspection("the engine was not asked")
                raise
        try:
            async with asyncio.timeout(self._config.hang_timeout_s):
                return await asyncio.shield(self._inspection)
        except TimeoutError as error:
            raise BackendUnavailableError(
                "the engine does not answer, as in a long step; try again later"
            ) from error

    async def _spawn(self, address: str) -> None:
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._cleanup.callback(self._socket.close, linger=0)
        self._socket.set_hwm(0)
        self._socket.bind(address)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "localmoe.engine.process", stdin=asyncio.subprocess.PIPE
        )
        self._cleanup.push_async_callback(_end_process, process)
        launch = Launch(
            address=address,
            model=self._model,
            store_path=str(self._store_path),
            config=self._config,
            available_memory_bytes=self._available_memory_bytes,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(launch) + b"\n")
        for work in (self._receive(process), self._watch(process), self._kill_when_hung(process)):
            self._cleanup.push_async_callback(_end_task, asyncio.create_task(work))

    async def _send(self, message: ToEngine) -> None:
        try:
            # Without a peer a waiting send would never end; with one, the queue has no bound.
            await self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDiedError(f"the engine cannot be reached: {error}") from error

    async def _receive(self, process: asyncio.subprocess.Process) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            while True:
                message = decoder.decode(await self._socket.recv())
                self._last_heard_s = time.monotonic()
                if isinstance(message, Outputs):
                    for item in message.items:
                        self._deliver(item)
                    self._on_state(message.state)
                elif isinstance(message, Inspected):
                    if self._inspection is not None:
                        self._inspection.set_result(message.inspection)
                        self._inspection = None
                elif isinstance(message, Ready):
                    self._ready.set_result(None)
                elif not self._ready.done():
                    self._ready.set_exception(EngineStartError(message.message))
        except Exception:
            # Unheard, its requests would wait for ever; its death is something that everybody handles.
            logger.exception("cannot go on listening to the engine; killing it")
            _kill(process)

    def _deliver(self, item: TokenChunk | RequestFailed) -> None:
        stream = self._streams.get(item.request_id)
        if stream is None:
            return  # cancelled while this was on its way
        if isinstance(item, TokenChunk):
            stream.put_nowait(item)
        else:
            del self._streams[item.request_id]
            error = OverloadedError if item.overloaded else EngineFaultError
            stream.put_nowait(error(item.message))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        self._end(f"the engine's process {process.pid} ended with {how}")

    async def _kill_when_hung(self, process: asyncio.subprocess.Process) -> None:
        limit_s = self._config.hang_timeout_s
        while True:
            await asyncio.sleep(limit_s / 10)
            silent_s = time.monotonic() - self._last_heard_s
            if self.is_ready and self._streams and silent_s > limit_s:
                reason = f"the engine finished no step for {silent_s:.0f} s"
                logger.error("%s; killing it", reason)
                self._end(f"{reason} and was killed")
                _kill(process)

    def _end(self, reason: str) -> None:
        if not self._died.done():
            self._died.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(EngineDiedError(f"{reason} before it was ready"))
        self._ready.exception()  # seen; nobody may be waiting any more
        self._end_inspection(reason)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put_nowait(EngineDiedError(reason))

    def _end_inspection(self, reason: str) -> None:
        inspection, self._inspection = self._inspection, None
        if inspection is not None:
            inspection.set_exception(EngineDiedError(reason))
            inspection.exception()  # seen; nobody may be waiting any more


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()


async def _end_process(process: asyncio.subprocess.Process) -> None:
    """Close the lifeline; an engine that does not follow is killed."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), _STOP_GRACE_S)
    except TimeoutError:
        _kill(process)
        await process.wait()


async def _end_task(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
