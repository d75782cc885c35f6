"""The client's side of an engine process: one incarnation, from spawn to death.

All of it runs on one asyncio loop. A receiver task hands each output to the queue of its request; a watcher task
waits for the process to end and then fails every request that is still open. A generator that is closed early
tells the engine, which frees what the request held.
"""

import asyncio
import itertools
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from localmoe.core.errors import (
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.events import EngineState
from localmoe.core.request import Request, RequestFailed, TokenChunk
from localmoe.engine.config import EngineConfig
from localmoe.engine.messages import Cancel, FromEngine, Launch, Outputs, Ready, Submit, ToEngine

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
        self._wire_ids = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._folder: str | None = None
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_ready(self) -> bool:
        return self._ready.done() and self._ready.exception() is None and not self._died.done()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Spawn the process and wait until the model is loaded.

        Raises:
            EngineStartError: it cannot start as configured; the message says why.
            EngineDiedError: it ended before it was ready.
        """
        self._folder = tempfile.mkdtemp(prefix="localmoe-")  # mode 0700: nobody else can reach the socket
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.set_hwm(0)
        address = f"ipc://{self._folder}/engine"
        self._socket.bind(address)
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "localmoe.engine.process", stdin=asyncio.subprocess.PIPE
        )
        launch = Launch(
            address=address,
            model=self._model,
            store_path=str(self._store_path),
            config=self._config,
            available_memory_bytes=self._available_memory_bytes,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch(self._process))]
        await self._ready

    async def stop(self) -> None:
        """End the process and release everything; requests still open fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._process is not None:
            if self._process.returncode is None:
                assert self._process.stdin is not None
                self._process.stdin.close()
                try:
                    await asyncio.wait_for(self._process.wait(), _STOP_GRACE_S)
                except TimeoutError:
                    self._process.kill()
                    await self._process.wait()
            self._socket.close(linger=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._end("the engine was stopped")

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
                await self._send(Cancel(wire_id))

    async def _send(self, message: ToEngine) -> None:
        await self._socket.send(msgspec.msgpack.encode(message))

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        while True:
            message = decoder.decode(await self._socket.recv())
            if isinstance(message, Outputs):
                for item in message.items:
                    self._deliver(item)
                self._on_state(message.state)
            elif isinstance(message, Ready):
                self._ready.set_result(None)
            elif not self._ready.done():
                self._ready.set_exception(EngineStartError(message.message))

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
        await asyncio.sleep(0.05)  # let the receiver take what the engine said last
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        self._end(f"the engine's process {process.pid} ended with {how}")

    def _end(self, reason: str) -> None:
        if not self._died.done():
            self._died.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(EngineDiedError(f"{reason} before it was ready"))
        self._ready.exception()  # seen; nobody may be waiting any more
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.put_nowait(EngineDiedError(reason))
