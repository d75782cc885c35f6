"""A server of OpenAI's API that says what a test tells it to."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Respond = Callable[[web.Request], Awaitable[web.StreamResponse]]


def chunk(text: str | None = None, finish: str | None = None, **fields: Any) -> bytes:
    """One chunk of a chat's stream."""
    delta = {} if text is None else {"content": text}
    body = {"id": "c", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def counts(prompt: int, completion: int, **details: Any) -> bytes:
    """The chunk that has the token counts."""
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, **details}
    return b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


class FakeOpenAI:
    """One server, with a model called `there`.

    Args:
        pieces: of its answers' streams; None: the connection breaks here; an event: it is waited for.
        respond: answers in place of that.
    """

    def __init__(self, pieces: list[bytes | asyncio.Event | None] | None = None, respond: Respond | None = None):
        self.pieces = pieces or []
        self.respond = respond
        self.models: Respond | None = None
        """Answers the question which models there are."""
        self.url = ""
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        """(path, body) of what it was asked."""
        self.headers: list[dict[str, str]] = []
        self.peers: set[Any] = set()
        """Of its requests."""
        self.gone = asyncio.Event()
        """A client left before its answer's end."""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append((request.path, await request.json()))
        self.headers.append(dict(request.headers))
        assert request.transport is not None
        self.peers.add(request.transport.get_extra_info("peername"))
        if self.respond is not None:
            return await self.respond(request)
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            for piece in self.pieces:
                if piece is None:
                    request.transport.abort()
                    break
                if isinstance(piece, asyncio.Event):
                    await piece.wait()
                else:
                    await response.write(piece)
        except (asyncio.CancelledError, ConnectionError):
            self.gone.set()
            raise
        return response

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self.models is not None:
            return await self.models(request)
        return web.json_response({"object": "list", "data": [{"id": "there"}]})

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeOpenAI"]:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{route:.*}", self._answer)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}/v1"
        try:
            yield self
        finally:
            await runner.cleanup()
