"""What stands before a server's engines, wired together: the HTTP application, who is let in, what is kept, settings
that change.

Its parts are stopped in the order in which they need each other: jobs first, which put requests to the application;
what the application itself has under way; then, after the engines, what counts answers, and the database at last.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import uvicorn
from fastapi import FastAPI

from localmoe.cli.identity import Doors, asks_everybody, say_who_is_asked
from localmoe.cli.live_config import manage_config
from localmoe.cli.server_engines import ServerEngines
from localmoe.cli.state import ServerState
from localmoe.cli.terminal import say, url_of
from localmoe.config.manager import ConfigManager
from localmoe.config.settings import LoadedSettings, Settings
from localmoe.core.current import Current
from localmoe.core.serving import ModelSpec
from localmoe.gateway.app import create_app
from localmoe.gateway.context import Services
from localmoe.gateway.http_protocol import BoundedHttpProtocol

_DRAIN_S = 5
"""How long open answers may go on after a signal to stop."""


class Gateway:
    """A gateway to engines that are starting.

    Args:
        loaded: settings of the server.
        engines: of the same.
        specs_of: what settings say is to be served.
    """

    def __init__(
        self,
        loaded: LoadedSettings,
        engines: ServerEngines,
        specs_of: Callable[[Settings], Sequence[ModelSpec]],
    ) -> None:
        self._settings, self._engines = loaded.settings, engines
        self._watches = self._settings.configuration.watch and bool(loaded.files)
        self._config = Current(self._settings.gateway)
        self._manager = manage_config(
            loaded,
            fleet=engines.fleet,
            builder=engines.builder,
            specs_of=specs_of,
            gateway=self._config,
            meter=engines.meter,
            bus=engines.bus,
        )
        self._state = ServerState(self._settings.state, self._config, home=self._settings.home)
        self._doors: Doors | None = None

    async def serve(self, starting: asyncio.Task[None], listener: socket.socket) -> None:
        """Answer, from when the engines are ready, until a signal says stop.

        Args:
            starting: the engines' start.
            listener: it listens.

        Raises:
            ConfigError: nobody could show who they are.
            EngineStartError: of `starting`.
        """
        asks = await asks_everybody(self._settings, self._state.keys)
        say_who_is_asked(self._settings.host, asks=asks)
        await self._manager.keep_first("localmoe serve", "start")
        self._doors = Doors(self._settings, self._config, self._state.keys, asks=asks)
        app = self._app(self._doors)
        async with contextlib.AsyncExitStack() as closing:
            await closing.enter_async_context(app.router.lifespan_context(app))
            closing.push_async_callback(self._state.stop)
            if self._watches:
                await closing.enter_async_context(_watching(self._manager))
            url, serving = await closing.enter_async_context(_listening(app, listener))
            await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
            if not serving.done():
                await starting
                self._state.start(app)
                say(
                    f"localmoe: ready after {time.monotonic() - self._engines.began_s:.1f} s; API docs at {url}/docs"
                )
            await serving

    async def close(self) -> None:
        """Write down what has not been yet, and close the database."""
        async with contextlib.AsyncExitStack() as closing:
            closing.push_async_callback(self._state.close)
            if self._doors is not None:
                await self._doors.aclose()

    def _app(self, doors: Doors) -> FastAPI:
        engines, state = self._engines, self._state
        services = Services(
            operations=engines.fleet,
            configuration=self._manager,
            performance=engines.performance,
            memory=engines.meter,
            render_metrics=engines.metrics.render,
            responses=state.responses,
            jobs=state.jobs,
        )
        return create_app(
            engines.fleet.models, services=services, config=self._config, bus=engines.bus, guard=doors.guard
        )


@contextlib.asynccontextmanager
async def _watching(manager: ConfigManager) -> AsyncIterator[None]:
    """The settings' files are watched meanwhile."""
    watching = asyncio.create_task(manager.watch())
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would raise them again and end the process before the engine is stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _listening(app: FastAPI, listener: socket.socket) -> AsyncIterator[tuple[str, asyncio.Task[None]]]:
    """Answers meanwhile. Gives the URL, and a task that is done when a signal has said stop and all is answered."""
    config = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",  # it goes around all of this
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_DRAIN_S,
    )
    server = _Server(config)
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, server.handle_exit, name, None)
    url = url_of(*listener.getsockname()[:2])
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    say(f"localmoe: listening on {url}")
    try:
        yield url, serving
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
