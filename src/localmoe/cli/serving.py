"""A server's parts, wired together and run until a signal says stop.

They are stopped in the order in which they need each other: jobs first, which put requests to the application; what
the application itself has under way; engines; what keeps answers and counts them; the database at last.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack

import uvicorn
from fastapi import FastAPI

from localmoe.catalog.catalog import Catalog
from localmoe.cli.answer_cache import make_answer_cache
from localmoe.cli.deployments import DeploymentBuilder
from localmoe.cli.engine_kinds import EngineKinds
from localmoe.cli.identity import Doors
from localmoe.cli.live_config import manage_config
from localmoe.cli.model_changes import complete
from localmoe.cli.state import ServerState
from localmoe.cli.terminal import say, url_of
from localmoe.config.manager import ConfigManager
from localmoe.config.settings import LoadedSettings, Settings
from localmoe.core.current import Current
from localmoe.core.errors import ConfigError
from localmoe.core.events import EventBus
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.fleet import Deployment, Fleet
from localmoe.gateway.app import create_app
from localmoe.gateway.context import ServedModel, Services
from localmoe.gateway.http_protocol import BoundedHttpProtocol
from localmoe.hardware.memory import available_memory_bytes
from localmoe.hardware.meter import HardwareMeter
from localmoe.hardware.processors import num_processors
from localmoe.observability.metrics import Metrics
from localmoe.observability.performance import Performance

_DRAIN_S = 5
"""How long open answers may go on after a signal to stop."""
_SWITCH_DRAIN_S = 600.0
"""How long answers of a model that is unloaded or replaced may go on."""


async def serve_here(
    loaded: LoadedSettings,
    catalog: Catalog,
    specs_of: Callable[[Settings], Sequence[ModelSpec]],
    threads: int | None,
    listener: socket.socket,
    *,
    asks: bool,
) -> None:
    """Serve until a signal says stop. The first one lets open answers finish, the second does not wait.

    Args:
        specs_of: what settings say is to be served.
        threads: compute threads; None: as the settings say.
        listener: bound; it listens once we can answer.
        asks: whether everybody is asked who they are.

    Raises:
        ConfigError: the address cannot be listened on.
        EngineStartError: no engine of a model could be started.
    """
    bus, settings = EventBus(), loaded.settings
    num_threads = threads or settings.engine.num_threads or num_processors()
    kinds = EngineKinds(
        settings, catalog, num_threads=num_threads, available_memory=available_memory_bytes, bus=bus
    )
    meter, cache = HardwareMeter(), make_answer_cache(settings.gateway.cache, home=settings.home)
    builder = DeploymentBuilder(settings, catalog, kinds=kinds, meter=meter, cache=cache, bus=bus)
    fleet = Fleet(builder.build, available_memory=available_memory_bytes, drain_timeout_s=_SWITCH_DRAIN_S)
    gateway = Current(settings.gateway)
    manager = manage_config(
        loaded, fleet=fleet, builder=builder, specs_of=specs_of, gateway=gateway, meter=meter, bus=bus
    )
    state = ServerState(settings.state, settings.gateway, home=settings.home)
    doors = Doors(settings, gateway, state.keys, asks=asks)
    services = Services(
        operations=fleet,
        configuration=manager,
        performance=Performance(bus),
        memory=meter,
        render_metrics=Metrics(bus).render,
        responses=state.responses,
        jobs=state.jobs,
    )
    app = create_app(fleet.models, services=services, config=gateway, bus=bus, guard=doors.guard)
    specs = [complete(settings, spec) for spec in specs_of(settings)]
    deployments = [builder.make(spec, builder.text_of(spec)) for spec in specs]
    async with AsyncExitStack() as closing:
        closing.push_async_callback(state.close)
        closing.push_async_callback(doors.aclose)
        closing.push_async_callback(cache.stop)
        await cache.start()
        await manager.keep_first("localmoe serve", "start")
        if settings.dispatch.policy == "resource_aware":
            meter.start()
        closing.callback(meter.stop)
        closing.push_async_callback(fleet.stop)
        await closing.enter_async_context(app.router.lifespan_context(app))
        closing.push_async_callback(state.stop)
        if settings.configuration.watch and loaded.files:
            await closing.enter_async_context(_watching(manager))
        await _run(fleet, deployments, app, listener, on_ready=lambda: state.start(app))


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


async def _run(
    fleet: Fleet[ServedModel],
    deployments: Sequence[Deployment[ServedModel]],
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None],
) -> None:
    """Listen, start the models, and answer until a signal says stop."""
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
    try:
        listener.listen(config.backlog)
    except OSError as error:
        raise ConfigError(f"cannot listen: {error.strerror}; another server was faster") from error
    host, port = listener.getsockname()[:2]
    url = url_of(host, port)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(fleet.start(deployments))
    try:
        say(f"localmoe: listening on {url}")
        say(f"localmoe: loading {', '.join(_described(deployment.spec) for deployment in deployments)}")
        started = time.monotonic()
        await asyncio.wait({serving, starting}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            await starting
            on_ready()
            say(f"localmoe: ready after {time.monotonic() - started:.1f} s; API docs at {url}/docs")
        await serving
    finally:
        server.should_exit = True
        starting.cancel()
        await asyncio.gather(serving, starting, return_exceptions=True)


def _described(spec: ModelSpec) -> str:
    kinds = "+".join(engine.engine for engine in spec.engines)
    return f"{spec.model} ({spec.weights})" if kinds == "native" else f"{spec.model} ({spec.weights}; {kinds})"
