"""A server, from its engines' start to its end.

Engines take seconds to start, each in a process of its own, and the gateway's libraries take one to import: so the
engines are told to start first, and the gateway is imported meanwhile.
"""

import asyncio
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from localmoe.catalog.catalog import Catalog
from localmoe.cli.server_engines import ServerEngines
from localmoe.cli.terminal import say
from localmoe.config.settings import LoadedSettings, Settings
from localmoe.core.errors import ConfigError
from localmoe.core.imports import lasting_imports
from localmoe.core.serving import ModelSpec

if TYPE_CHECKING:
    from localmoe.cli.gateway import Gateway

_BACKLOG = 2048
"""Clients that may wait until we can answer."""


async def serve_here(
    loaded: LoadedSettings,
    catalog: Catalog,
    specs_of: Callable[[Settings], Sequence[ModelSpec]],
    threads: int | None,
    listener: socket.socket,
) -> None:
    """Serve until a signal says stop. The first one lets open answers finish, the second does not wait.

    Args:
        specs_of: what settings say is to be served.
        threads: compute threads; None: as the settings say.
        listener: bound.

    Raises:
        ConfigError: the address cannot be listened on, or nobody could show who they are.
        EngineStartError: no engine of a model could be started.
    """
    try:
        listener.listen(_BACKLOG)  # who comes before there is a gateway waits for the second that it takes
    except OSError as error:
        raise ConfigError(f"cannot listen: {error.strerror}; another server was faster") from error
    signals = _Signals()
    signals.take()
    try:
        await _serve(loaded, catalog, specs_of, threads, listener, signals)
    except asyncio.CancelledError:
        if not signals.have_said_stop:
            raise


async def _serve(
    loaded: LoadedSettings,
    catalog: Catalog,
    specs_of: Callable[[Settings], Sequence[ModelSpec]],
    threads: int | None,
    listener: socket.socket,
    signals: "_Signals",
) -> None:
    engines = ServerEngines(loaded.settings, catalog, specs_of(loaded.settings), threads)
    say(f"localmoe: loading {engines.described}")
    # What is open when engines end is ended by that, and may still be written down: the gateway is closed last.
    async with AsyncExitStack() as outliving, AsyncExitStack() as closing:
        closing.push_async_callback(engines.stop)
        await engines.read_models()
        starting = asyncio.create_task(engines.start())
        closing.push_async_callback(_cancel, starting)
        gateway_class = await asyncio.to_thread(_gateway_class)
        if starting.done():
            await starting  # nobody need come if it has failed
        gateway = gateway_class(loaded, engines, specs_of)
        outliving.push_async_callback(gateway.close)
        closing.callback(signals.take)  # the gateway has them meanwhile
        await gateway.serve(starting, listener)


class _Signals:
    """Those that say stop: they cancel the task that serves."""

    def __init__(self) -> None:
        self.have_said_stop = False
        task = asyncio.current_task()
        assert task is not None
        self._task = task

    def take(self) -> None:
        """From whoever has them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    def _stop(self) -> None:
        self.have_said_stop = True
        self._task.cancel()


def _gateway_class() -> "type[Gateway]":
    with lasting_imports():
        from localmoe.cli.gateway import Gateway
    return Gateway


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
