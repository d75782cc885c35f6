"""Answers on the wire: JSON in one piece, or server-sent events.

The stream is our own small response rather than sse-starlette's: the status line waits for the first event, so
that an engine that is overloaded or down is a plain 503 that clients retry; keep-alives come on silence only; and
a client that leaves cancels the work as `disconnect` says. Events that follow each other within milliseconds go out
together: to send costs several times what it takes to make an event.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from localmoe.core.errors import (
    BackendUnavailableError,
    DeadlineExceededError,
    EngineFaultError,
    GatewayOverloadedError,
    LocalMoEError,
)
from localmoe.gateway.answering.disconnect import run_until_disconnect
from localmoe.gateway.answering.generation import ChoiceDelta
from localmoe.gateway.context import ServedModel
from localmoe.gateway.errors import ApiError, to_api_error
from localmoe.gateway.exchange import CLIENT_LEFT

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
_COALESCE_S = 0.008
"""Events of a stream go out at most so often, which is as often as a screen shows something new."""
_MAX_PENDING_BYTES = 1 << 16


class Answer(Protocol):
    """One request's answer in an API's own shape, in the making."""

    def events(self, delta: ChoiceDelta) -> bytes:
        """What a stream sends for this delta: no event, one or several."""
        ...

    def end(self) -> bytes:
        """What a stream ends with after the last delta."""
        ...

    def add(self, delta: ChoiceDelta) -> None:
        """Take in a delta of an answer that is sent in one piece."""
        ...

    def whole(self) -> bytes:
        """That piece, as JSON, after the last delta."""
        ...


@dataclass(frozen=True)
class Begun:
    """One model's answer to a request, and what it will be made of."""

    answer: Answer
    deltas: AsyncGenerator[ChoiceDelta, None]


Begin = Callable[[ServedModel], Awaitable[Begun]]


def _fields(model: Any) -> dict[str, Any]:
    if not isinstance(model, BaseModel):
        raise TypeError(f"{type(model).__name__} is no JSON")
    return model.model_dump(exclude_unset=True)


_encoder = msgspec.json.Encoder(enc_hook=_fields)


def encode(data: Mapping[str, Any]) -> bytes:
    """JSON. Fields of pydantic models in it that were not set are left out."""
    return _encoder.encode(data)


def encode_event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event of it; see `encode`."""
    return b"data: " + encode(data) + b"\n\n"


def encode_tagged(event: msgspec.Struct) -> bytes:
    """A server-sent event whose name is the struct's tag."""
    name = event.__struct_config__.tag
    assert isinstance(name, str)
    return b"event: " + name.encode() + b"\ndata: " + _encoder.encode(event) + b"\n\n"


def failure_event(error: ApiError) -> bytes:
    """The last event of a stream that breaks off, in OpenAI's shape."""
    return b"data: " + error.body() + b"\n\n"


async def respond(
    begin: Begin,
    models: Iterator[ServedModel],
    *,
    stream: bool,
    headers: Mapping[str, str],
    request: Request,
    keepalive_s: float,
    keepalive: bytes = KEEPALIVE,
    failure: Callable[[ApiError], bytes] = failure_event,
) -> Response:
    """The answer as the client asked for it: in one piece or as a stream.

    Args:
        begin: asks a model for the answer.
        models: to be asked one after the other until one begins to answer; has at least one.
        headers: of the answer, beside the usual ones.
        request: its body cannot be read any more.
        keepalive_s: see `EventStreamResponse`, as for what follows.
    """
    if stream:
        _forget_body(request)
        return EventStreamResponse(
            begin, models, keepalive_s=keepalive_s, keepalive=keepalive, failure=failure, headers=headers
        )
    whole = await run_until_disconnect(request.receive, collect(begin, models))
    if whole is None:  # nobody reads it
        return Response(status_code=CLIENT_LEFT)
    return Response(whole, headers=dict(headers), media_type="application/json")


def _forget_body(request: Request) -> None:
    """Starlette keeps what it has read for as long as the request lasts, and a stream may last for long."""
    for name in ("_body", "_json"):
        vars(request).pop(name, None)


async def _first_to_begin(begin: Begin, models: Iterator[ServedModel]) -> tuple[Begun, ChoiceDelta]:
    """The answer of the first model that sends something of one, and what it sent."""

    async def attempt(model: ServedModel) -> tuple[Begun, ChoiceDelta]:
        begun = await begin(model)
        async with AsyncExitStack() as stack:
            deltas = await stack.enter_async_context(aclosing(begun.deltas))
            delta = await anext(deltas)
            stack.pop_all()
        return begun, delta

    return await first_able(attempt, models)


async def first_able(attempt: Callable[[ServedModel], Awaitable[T]], models: Iterator[ServedModel]) -> T:
    """What the first model gives that is able to.

    Raises:
        LocalMoEError: of the first model; what the others say is of no use to somebody who asked for that.
    """
    first: LocalMoEError | None = None
    for model in models:
        try:
            return await attempt(model)
        except (DeadlineExceededError, GatewayOverloadedError) as error:
            raise first or error from None  # for others it is no different
        except (BackendUnavailableError, EngineFaultError) as error:
            first = first or error
        except LocalMoEError:
            if first is None:
                raise
    assert first is not None
    raise first


async def collect(begin: Begin, models: Iterator[ServedModel]) -> bytes:
    """The answer in one piece, of the first model that begins to answer."""
    begun, first = await _first_to_begin(begin, models)
    answer = begun.answer
    async with aclosing(begun.deltas) as deltas:
        answer.add(first)
        async for delta in deltas:
            answer.add(delta)
    return answer.whole()


class EventStreamResponse(Response):
    """Sends the events of the first model that begins to answer. An exception before there is one is raised to the
    caller, as before any other answer.

    Args:
        begin, models: see `respond`.
        keepalive_s: `keepalive` is sent, and the answer begun if it has not, after this long without an event.
        failure: makes the last event of a stream that breaks off.
        headers: besides the usual ones of a stream.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        begin: Begin,
        models: Iterator[ServedModel],
        *,
        keepalive_s: float,
        keepalive: bytes,
        failure: Callable[[ApiError], bytes],
        headers: Mapping[str, str],
    ) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self._begin = begin
        self._models = models
        self._keepalive_s = keepalive_s
        self._keepalive = keepalive
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_until_disconnect(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        writer = _Writer(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers},
            send,
            keepalive_s=self._keepalive_s,
            keepalive=self._keepalive,
        )
        try:
            begun, first = await _first_to_begin(self._begin, self._models)
            # And with them the request's body. What lasts for long should be small.
            del self._begin, self._models, self.raw_headers
            answer = begun.answer
            async with aclosing(begun.deltas) as deltas:
                await writer.write(answer.events(first))
                async for delta in deltas:
                    await writer.write(answer.events(delta))
            await writer.write(answer.end())
        except Exception as error:
            await writer.rest()  # a keep-alive that is on its way begins the answer
            if not writer.has_begun:
                raise
            await writer.write(self._failure(to_api_error(error)))
        finally:
            await writer.rest()
        await writer.end()


class _Writer:
    """Sends whole events; the first one begins the answer, and those that come close together wait for each other.

    Whoever holds the lock sends. Events that come meanwhile are taken along by the next who has it; when there are
    many, whoever brings them waits, so that a slow client slows its engine down instead of filling our memory. What
    waits for its time is timers, not a task: a silent stream should cost little.
    """

    # There is one for each stream, and most of them are silent.
    __slots__ = (
        "_events_timer",
        "_keepalive",
        "_keepalive_s",
        "_last_s",
        "_lock",
        "_loop",
        "_pending",
        "_send",
        "_sending",
        "_silence_timer",
        "_start",
    )

    def __init__(self, start: Message, send: Send, *, keepalive_s: float, keepalive: bytes) -> None:
        self._start: Message | None = start
        """Until it has been sent."""
        self._send = send
        self._keepalive_s = keepalive_s
        self._keepalive = keepalive
        self._pending = bytearray()
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._lock = asyncio.Lock()
        self._sending: asyncio.Task[None] | None = None
        """What a timer has begun."""
        self._events_timer: asyncio.TimerHandle | None = None
        """Runs while events wait."""
        self._silence_timer = self._loop.call_later(keepalive_s, self._break_silence)

    @property
    def has_begun(self) -> bool:
        return self._start is None

    async def write(self, events: bytes) -> None:
        if not events:
            return
        self._pending += events
        since_s = self._loop.time() - self._last_s
        if since_s >= _COALESCE_S or not self.has_begun or len(self._pending) >= _MAX_PENDING_BYTES:
            await self._flush()
        elif self._events_timer is None:
            self._events_timer = self._loop.call_later(_COALESCE_S - since_s, self._send_events)

    async def rest(self) -> None:
        """Send nothing more unasked; what is being sent is sent."""
        self._silence_timer.cancel()
        if self._events_timer is not None:
            self._events_timer.cancel()
        if self._sending is not None:
            await asyncio.gather(self._sending, return_exceptions=True)

    async def end(self) -> None:
        await self._flush(more=False)

    def _send_events(self) -> None:
        self._events_timer = None
        if self._sending is None or self._sending.done():
            self._sending = self._loop.create_task(self._flush())
        else:
            self._events_timer = self._loop.call_later(_COALESCE_S, self._send_events)

    def _break_silence(self) -> None:
        left_s = self._last_s + self._keepalive_s - self._loop.time()
        if left_s <= 0.0 and not self._pending and not self._lock.locked():
            self._pending += self._keepalive
            self._send_events()
        self._silence_timer = self._loop.call_later(
            left_s if left_s > 0.0 else self._keepalive_s, self._break_silence
        )

    async def _flush(self, *, more: bool = True) -> None:
        async with self._lock:
            start, self._start = self._start, None
            if start is not None:
                await self._send(start)
            data, self._pending = bytes(self._pending), bytearray()
            if data or not more:
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
            self._last_s = self._loop.time()
