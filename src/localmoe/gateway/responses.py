"""Answers on the wire: JSON in one piece, or server-sent events as OpenAI's clients read them.

The stream is our own small response rather than sse-starlette's: the status line waits for the first event, so
that an engine that is overloaded or down is a plain 503 that clients retry; keep-alives come on silence only; and
a client that leaves cancels the work as `disconnect` says.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from localmoe.gateway.disconnect import run_until_disconnect
from localmoe.gateway.errors import to_api_error

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keep-alive\n\n"
CLIENT_LEFT = 499
"""nginx's status for it; seen in logs only."""


def encode_event(model: BaseModel) -> bytes:
    """One event; fields that were not set are left out."""
    return b"data: " + model.model_dump_json(exclude_unset=True).encode() + b"\n\n"


def json_response(model: BaseModel | None, *, headers: Mapping[str, str]) -> Response:
    """An answer in one piece; None is for a client that has left and will not read it."""
    if model is None:
        return Response(status_code=CLIENT_LEFT)
    return Response(
        model.model_dump_json(exclude_unset=True), headers=dict(headers), media_type="application/json"
    )


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
