"""A real HTTP server over an app, for clients that must be able to leave in the middle of a stream."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI


class LiveServer:
    """uvicorn in a thread on a free port of the loopback. `with LiveServer(app, backend.start) as url:`

    Args:
        before: awaited on the server's own event loop, before it serves.
    """

    def __init__(self, app: FastAPI, before: Callable[[], Awaitable[None]]) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
        self._before = before
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        await self._before()
        await self._server.serve()

    def __enter__(self) -> str:
        self._thread.start()
        deadline_s = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        return f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
