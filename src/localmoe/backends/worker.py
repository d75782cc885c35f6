"""The client's side of a worker process: one incarnation, from spawn to death.

All of it runs on one asyncio loop. A receiver task hands each output to the queue of its request; a watcher task
waits for the process to end and then fails every request that is still open; a third kills a worker that has
requests but reports no step for too long, so that nobody waits for ever. A generator that is closed early tells the
worker, which frees what the request held.
"""

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from localmoe.backends.hang_clock import HangClock
from localmoe.backends.process import BELOW_US, OutputTail, how_it_ended
from localmoe.backends.supervised import SupervisedBackend
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InvalidRequestError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.events import EngineState, EventBus
from localmoe.core.inspection import Inspection
from localmoe.core.messages import (
    Cancel,
    FromWorker,
    Inspect,
    Inspected,
    Outputs,
    Ready,
    Submit,
    ToWorker,
)
from localmoe.core.request import Request, RequestFailed, TokenChunk

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 5.0


class WorkerClient:
    """One worker process.

    Args:
        name: of the engine, for metrics and logs.
        command: what runs the worker.
        launch: what the worker is told first, given the ZeroMQ endpoint that it is to connect to.
        start_timeout_s: a worker that is not ready by then has failed to start.
        hang_timeout_s: a worker that has requests but finishes no step for this long is killed.
        on_state: called after every step of the worker, with its name in the state; must be quick.
    """

    def __init__(
        self,
        *,
        name: str,
        command: Sequence[str],
        launch: Callable[[str], msgspec.Struct],
        start_timeout_s: float,
        hang_timeout_s: float,
        on_state: Callable[[EngineState], None],
    ) -> None:
        self._name = name
        self._command = command
        self._launch = launch
        self._start_timeout_s = start_timeout_s
        self._hang_timeout_s = hang_timeout_s
        self._on_state = on_state
        self._streams: dict[str, asyncio.Queue[TokenChunk | LocalMoEError]] = {}
        """Of requests that the engine has not finished."""
        self._hang_clock = HangClock()
        self._inspection: asyncio.Future[Inspection] | None = None
        """What the engine was asked for and has not told yet."""
        self._wire_ids = itertools.count()
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
            EngineStartError: it cannot start as configured, or took too long; the message says why.
            EngineDiedError: it ended before it was ready.
        """
        # Mode 0700: nobody else can reach the socket. The name is needed until the engine has connected.
        with tempfile.TemporaryDirectory(prefix="localmoe-", ignore_cleanup_errors=True) as folder:
            try:
                await self._spawn(f"ipc://{folder}/engine")
            except (OSError, zmq.ZMQError) as error:
                raise EngineStartError(f"the engine's process could not be started: {error}") from error
            try:
                async with asyncio.timeout(self._start_timeout_s):
                    # Shielded: a caller that gives up must not cancel what `is_ready` looks at.
                    await asyncio.shield(self._ready)
            except TimeoutError as error:
                raise EngineStartError(
                    f"the engine was not ready within {self._start_timeout_s:g} s{await self._last_lines()}"
                ) from error

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
            raise BackendUnavailableError("the engine is not running")
        # Clients may repeat a request id; on the wire it must name one request only.
        wire_id = str(next(self._wire_ids))
        stream: asyncio.Queue[TokenChunk | LocalMoEError] = asyncio.Queue()
        self._streams[wire_id] = stream
        self._hang_clock.begin()
        try:
            await self._send(Submit(msgspec.structs.replace(request, id=wire_id, source=None)))
            while True:
                item = await stream.get()
                if isinstance(item, LocalMoEError):
                    raise item
                yield msgspec.structs.replace(item, request_id=request.id)
                if item.finish_reason is not None:
                    return
        finally:
            if self._close(wire_id) and self.is_ready:
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
            async with asyncio.timeout(self._hang_timeout_s):
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
            *BELOW_US, *self._command, stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        self._cleanup.push_async_callback(_end_process, process)
        assert process.stdin is not None
        assert process.stderr is not None
        self._output = OutputTail(process.stderr, self._name)
        process.stdin.write(msgspec.json.encode(self._launch(address)) + b"\n")
        for work in (self._receive(process), self._watch(process), self._kill_when_hung(process)):
            self._cleanup.push_async_callback(_end_task, asyncio.create_task(work))

    async def _send(self, message: ToWorker) -> None:
        try:
            # Without a peer a waiting send would never end; with one, the queue has no bound.
            await self._socket.send(msgspec.msgpack.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise EngineDiedError(f"the engine cannot be reached: {error}") from error

    async def _receive(self, process: asyncio.subprocess.Process) -> None:
        decoder = msgspec.msgpack.Decoder(FromWorker)
        try:
            while True:
                message = decoder.decode(await self._socket.recv())
                self._hang_clock.heard()
                if isinstance(message, Outputs):
                    for item in message.items:
                        self._deliver(item)
                    self._on_state(msgspec.structs.replace(message.state, engine=self._name))
                elif isinstance(message, Inspected):
                    if self._inspection is not None:
                        self._inspection.set_result(msgspec.structs.replace(message.inspection, engine=self._name))
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
            if item.finish_reason is not None:
                self._close(item.request_id)  # now: who reads slowly waits for the engine no more
        else:
            self._close(item.request_id)
            kind = (
                InvalidRequestError if item.invalid else OverloadedError if item.overloaded else EngineFaultError
            )
            stream.put_nowait(kind(item.message))

    def _close(self, wire_id: str) -> bool:
        """Expect no more of a request; False if that is so already."""
        if self._streams.pop(wire_id, None) is None:
            return False
        self._hang_clock.end()
        return True

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        how = how_it_ended(await process.wait())
        # What it printed is of use where it never became ready; later it is in the log, far above.
        lines = "" if self._ready.done() else await self._last_lines()
        self._end(f"the engine's process {process.pid} ended with {how}", lines)

    async def _kill_when_hung(self, process: asyncio.subprocess.Process) -> None:
        limit_s = self._hang_timeout_s
        while True:
            await asyncio.sleep(limit_s / 10)
            silent_s = self._hang_clock.silent_s
            if self.is_ready and silent_s > limit_s:
                reason = f"the engine finished no step for {silent_s:.0f} s"
                logger.error("%s; killing it", reason)
                self._end(f"{reason} and was killed")
                _kill(process)

    async def _last_lines(self) -> str:
        lines = await self._output.last_lines()
        return f"; its last lines were:\n{lines}" if lines else ""

    def _end(self, reason: str, last_lines: str = "") -> None:
        if not self._died.done():
            self._died.set_result(reason)
        if not self._ready.done():
            self._ready.set_exception(EngineDiedError(f"{reason} before it was ready{last_lines}"))
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


class WorkerConfig(Protocol):
    """What the settings of every engine with a worker say."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_context_tokens(self) -> int | None: ...
    @property
    def start_timeout_s(self) -> float: ...
    @property
    def hang_timeout_s(self) -> float: ...


class WorkerBackend(SupervisedBackend[WorkerClient]):
    """An engine that is a worker process, replaced when it dies.

    Args:
        model: the name it is served under.
        name: the engine's, for metrics and logs.
        config: the engine's settings.
        command: what runs the worker.
        launch: what it is told first, given the ZeroMQ endpoint that it is to connect to.
        bus: where engine states and restarts are published.
    """

    def __init__(
        self,
        *,
        model: str,
        name: str,
        config: WorkerConfig,
        command: Sequence[str],
        launch: Callable[[str], msgspec.Struct],
        bus: EventBus,
    ) -> None:
        def begin() -> WorkerClient:
            return WorkerClient(
                name=name,
                command=command,
                launch=launch,
                start_timeout_s=config.start_timeout_s,
                hang_timeout_s=config.hang_timeout_s,
                on_state=bus.publish,
            )

        super().__init__(
            model=model,
            name=name,
            capacity=config.max_num_seqs,
            context_tokens=config.max_context_tokens,
            begin=begin,
            bus=bus,
        )
