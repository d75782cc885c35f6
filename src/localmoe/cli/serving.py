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
from localmoe.core.imports import lasting_imports
from localmoe.core.serving import ModelSpec

if TYPE_CHECKING:
    from localmoe.cli.gateway import Gateway


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
        listener: bound; it listens once we can answer.

    Raises:
        ConfigError: the address cannot be listened on, or nobody could show who they are.
        EngineStartError: no engine of a model could be started.
        CancelledError: a signal said stop before there was a gateway.
    """
    _stop_when_told()
    engines = ServerEngines(loaded.settings, catalog, specs_of, threads)
    say(f"localmoe: loading {engines.described}")
    # What is open when engines end is ended by that, and may still be written down: the gateway is closed last.
    async with AsyncExitStack() as outliving, AsyncExitStack() as closing:
        closing.push_async_callback(engines.stop)
        starting = asyncio.create_task(engines.start())
        closing.push_async_callback(_cancel, starting)
        gateway = (await asyncio.to_thread(_gateway_class))(loaded, engines)
        outliving.push_async_callback(gateway.close)
        await gateway.serve(starting, listener)


def _stop_when_told() -> None:
    """By signals, until the gateway takes them."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def _gateway_class() -> "type[Gateway]":
    with lasting_imports():
        from localmoe.cli.gateway import Gateway
    return Gateway


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
