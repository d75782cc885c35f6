"""Answers on the wire: JSON in one piece, or server-sent events as OpenAI's clients read them.

The stream is our own small response rather than sse-starlette's: the status line waits for the first event, so
that an engine that is overloaded or down is a plain 503 that clients retry; keep-alives come on silence only; and
a client that leaves cancels the work as `disconnect` says.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from localmoe.gateway.chat_schema import ChatCompletion, ChatCompletionChunk
from localmoe.gateway.completions_schema import Completion
from localmoe.gateway.disconnect import run_until_disconnect
from localmoe.gateway.errors import to_api_error
from localmoe.gateway.fields import SamplingFields
from localmoe.gateway.generation import ChoiceDelta, UsageCounter

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
CLIENT_LEFT = 499
"""nginx's status for it; seen in logs only."""


PieceT = TypeVar("PieceT")


class Answer(Protocol[PieceT]):
    """One request's answer in an API's own shape, in the making."""

    usage: UsageCounter

    def pieces(self, delta: ChoiceDelta) -> Sequence[PieceT]:
        """What a stream sends for this delta, in order."""
        ...

    def chunk(self, pieces: Sequence[PieceT]) -> Completion | ChatCompletionChunk:
        """A stream's envelope."""
        ...

    async def collect(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> Completion | ChatCompletion:
        """The answer in one piece."""
        ...


async def respond(
    answer: Answer[PieceT],
    deltas: AsyncGenerator[ChoiceDelta, None],
    *,
    body: SamplingFields,
    request: Request,
    keepalive_s: float,
) -> Response:
    """The answer as the client asked for it: in one piece or as a stream.

    Args:
        deltas: what the answer is made of; closed when the client leaves.
        keepalive_s: see `EventStreamResponse`.
    """
    headers = body.ignored_headers()
    if body.stream:
        events = _events(answer, deltas, include_usage=body.include_usage)
        return EventStreamResponse(events, keepalive_s=keepalive_s, headers=headers)
    whole = await run_until_disconnect(request.receive, answer.collect(deltas))
    if whole is None:  # nobody reads it
        return Response(status_code=CLIENT_LEFT)
    return Response(whole.model_dump_json(exclude_unset=True), headers=headers, media_type="application/json")


async def _events(
    answer: Answer[PieceT], deltas: AsyncGenerator[ChoiceDelta, None], *, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    async with aclosing(deltas):
        async for delta in deltas:
            answer.usage.count(delta)
            for piece in answer.pieces(delta):
                chunk = answer.chunk([piece])
                if include_usage:
                    chunk.usage = None  # set, so that it is sent as null
                yield _encode_event(chunk)
    if include_usage:
        chunk = answer.chunk([])
        chunk.usage = answer.usage.usage()
        yield _encode_event(chunk)


def _encode_event(model: BaseModel) -> bytes:
    """Fields that were not set are left out."""
    return b"data: " + model.model_dump_json(exclude_unset=True).encode() + b"\n\n"


class EventStreamResponse(StreamingResponse):
    """Sends `events`, then `[DONE]`; an error in between is the last event.

    Args:
        events: encoded. An exception before the first one is raised to the caller as before any other answer.
        keepalive_s: a comment is sent, and the answer begun if it has not, after this long without an event.
        headers: besides the usual ones of a stream.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, keepalive_s: float, headers: Mapping[str, str]
    ) -> None:
        stream_headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        super().__init__(events, headers=stream_headers, media_type="text/event-stream")
        self._events = events
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_until_disconnect(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        writer = _Writer(start, send)
        keepalive = asyncio.create_task(writer.keep_alive(self._keepalive_s))
        last = DONE
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await writer.write(event)
        except Exception as error:
            if not writer.started:
                raise
            last = b"data: " + to_api_error(error).body() + b"\n\n"
        finally:
            async with writer.lock:  # never in the middle of a comment
                keepalive.cancel()
            await asyncio.gather(keepalive, return_exceptions=True)
        await writer.write(last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Writer:
    """Sends whole events, one at a time; the first one begins the answer."""

    def __init__(self, start: Message, send: Send) -> None:
        self._start = start
        self._send = send
        self._last_s = asyncio.get_running_loop().time()
        self.lock = asyncio.Lock()
        self.started = False

    async def write(self, data: bytes) -> None:
        async with self.lock:
            if not self.started:
                self.started = True
                await self._send(self._start)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._last_s = asyncio.get_running_loop().time()

    async def keep_alive(self, interval_s: float) -> None:
        while True:
            silent_s = asyncio.get_running_loop().time() - self._last_s
            if silent_s >= interval_s:
                await self.write(KEEPALIVE)
            else:
                await asyncio.sleep(interval_s - silent_s)
