"""A server, from its engines' start to its end.

Engines take seconds to start, each in a process of its own, and the gateway's libraries take one to import: so the
engines are told to start first, and the gateway is imported meanwhile.
"""

import asyncio
import gc
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from localmoe.catalog.catalog import Catalog
from localmoe.cli.server_engines import ServerEngines
from localmoe.cli.terminal import say
from localmoe.config.settings import LoadedSettings, Settings
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
    """
    gc.disable()  # what is imported stays, and looking at it takes a tenth of the start
    engines, gateway = ServerEngines(loaded.settings, catalog, specs_of, threads), None
    say(f"localmoe: loading {engines.described}")
    starting = asyncio.create_task(engines.start())
    try:
        gateway = (await asyncio.to_thread(_gateway_class))(loaded, engines)
        gc.freeze()
        gc.enable()
        await gateway.serve(starting, listener)
    finally:
        # What is open by now is ended by its engine's end, and may still be written down.
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await engines.stop()
        if gateway is not None:
            await gateway.close()


def _gateway_class() -> "type[Gateway]":
    from localmoe.cli.gateway import Gateway

    return Gateway
