"""What runs in the cluster: one Serve deployment for each engine, and one for the gateways.

Every node has the same installation and the same files under the same `LOCALMOE_HOME`; settings come from whoever
serves. This module is imported on nodes; the one that puts the application together is `ray_serving`.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.backends.ray_handle import REPORT_INTERVAL_S, EngineReport, RayBackend, ServeEngineHandle
from localmoe.catalog.catalog import Catalog
from localmoe.cli.answer_cache import make_answer_cache
from localmoe.cli.deployments import DeploymentBuilder
from localmoe.cli.engine_kinds import EngineKinds, EngineOrder, MadeEngine
from localmoe.cli.identity import Doors
from localmoe.cli.state import ServerState
from localmoe.config.settings import Settings
from localmoe.core.current import Current
from localmoe.core.errors import BackendUnavailableError, ConflictError, InvalidRequestError, LocalMoEError
from localmoe.core.events import EngineRestarted, EngineState, Event, EventBus
from localmoe.core.request import Request, TokenChunk
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.fleet import Deployment, Fleet
from localmoe.gateway.app import create_app
from localmoe.gateway.context import Services
from localmoe.hardware.memory import available_memory_bytes
from localmoe.hardware.meter import HardwareMeter
from localmoe.hardware.processors import num_processors
from localmoe.observability.metrics import Metrics
from localmoe.observability.performance import Performance
from localmoe.text.text_model import TextModel

if TYPE_CHECKING:
    from fastapi import FastAPI

    from localmoe.gateway.context import ServedModel

logger = logging.getLogger(__name__)

_ITEM_S = 0.002
"""What it costs Ray, about, to pass an item on: so many streams share the time in which an engine sends."""

IN_CLUSTER = "localmoe"
"""The Serve application's name."""


@dataclass(frozen=True, kw_only=True)
class EngineOffer:
    """One engine to be put somewhere in the cluster."""

    kind: str
    order: EngineOrder
    num_threads: int
    """That Ray reserves for it."""


class EngineDeployment:
    """One engine, which is started at once, and started again by Ray if that fails.

    Args:
        settings: of the server.
        offer: the engine.
    """

    def __init__(self, settings: Settings, offer: EngineOffer) -> None:
        self._settings = settings
        self._offer = offer
        self._bus = EventBus()
        self._bus.subscribe(self._note)
        self._watchers: list[list[str]] = []
        """For each that watches, restarts that it has not been told of."""
        self._state: EngineState | None = None
        self._made: MadeEngine | None = None
        self._failure: str | None = None
        self._num_open = 0
        """Answers under way."""
        self._starting = asyncio.get_running_loop().create_task(self._start())

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """Reports, as MessagePack: see `EngineReport`."""
        restarts: list[str] = []
        self._watchers.append(restarts)
        try:
            while True:
                report = EngineReport(
                    is_ready=self._made is not None and self._made.backend.is_ready,
                    failure=self._failure,
                    state=self._state,
                    restarts=list(restarts),
                )
                restarts.clear()
                yield msgspec.msgpack.encode(report)
                if self._starting.done():
                    await asyncio.sleep(REPORT_INTERVAL_S)
                else:
                    await asyncio.wait({self._starting}, timeout=REPORT_INTERVAL_S)
        finally:
            self._watchers.remove(restarts)

    async def generate(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Lists of `TokenChunk`s for a `Request`, all as MessagePack. Raises as `Generator.generate` does."""
        decoded = msgspec.msgpack.decode(request, type=Request)
        backend = self._ready().backend
        if refusal := backend.refusal(decoded):
            raise InvalidRequestError(f"the engine cannot give this answer: {refusal}")
        self._num_open += 1
        try:
            async with (
                aclosing(backend.generate(decoded)) as chunks,
                aclosing(_lists(chunks, lambda: self._num_open * _ITEM_S)) as lists,
            ):
                async for some in lists:
                    yield msgspec.msgpack.encode(some)
        finally:
            self._num_open -= 1

    async def inspect(self) -> bytes:
        """An `Inspection`, as MessagePack."""
        inspectable = self._ready().inspectable
        if inspectable is None:
            raise InvalidRequestError("this engine cannot be looked into")
        return msgspec.msgpack.encode(await inspectable.inspect())

    def check_health(self) -> None:
        """Called by Ray, which replaces an engine that raises."""
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def __del__(self) -> None:
        """Called, and waited for, by Ray."""
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        if self._made is not None:
            await self._made.backend.stop()

    def _ready(self) -> MadeEngine:
        if self._made is None:
            raise BackendUnavailableError(f"the engine is not ready: {self._failure or 'it is starting'}")
        return self._made

    async def _start(self) -> None:
        try:
            made = await asyncio.to_thread(self._make)
            await made.backend.start()
            self._made = made
        except Exception as error:
            # Whoever watches is told; nobody waits for this task.
            foreseen = isinstance(error, LocalMoEError)
            logger.error("%s did not start: %s", self._offer.order.name, error, exc_info=not foreseen)
            self._failure = f"on node {_node()}: {error}"

    def _make(self) -> MadeEngine:
        catalog, order = Catalog(self._settings.home), self._offer.order
        kinds = EngineKinds(
            self._settings,
            catalog,
            # Ray counts logical processors, and the nodes may differ.
            num_threads=min(self._offer.num_threads, num_processors()) * order.num_natives,
            available_memory=available_memory_bytes,
            bus=self._bus,
        )
        text = TextModel.load(catalog.path(order.source)) if catalog.has(order.source) else None
        return kinds.make(self._offer.kind, replace(order, text=text))

    def _note(self, event: Event) -> None:
        if isinstance(event, EngineState):
            self._state = event
        elif isinstance(event, EngineRestarted):
            for restarts in self._watchers:
                restarts.append(event.reason)


async def _lists(
    chunks: AsyncGenerator[TokenChunk, None], pause_s: Callable[[], float]
) -> AsyncGenerator[list[TokenChunk], None]:
    """Chunks as they come, the first and the last at once, in between those of a pause together."""
    gathered: list[TokenChunk] = []
    news = asyncio.Event()

    async def gather() -> None:
        try:
            async for chunk in chunks:
                gathered.append(chunk)
                news.set()
        finally:
            news.set()

    gathering = asyncio.create_task(gather())
    try:
        while not gathering.done() or gathered:
            await news.wait()
            news.clear()
            if gathered:
                some = gathered[:]
                gathered.clear()
                yield some
            await asyncio.wait({gathering}, timeout=pause_s())
        await gathering
    finally:
        gathering.cancel()
        await asyncio.gather(gathering, return_exceptions=True)


class RayEngineKinds(EngineKinds):
    """Finds engines in the cluster, where `EngineKinds` would make them here; servers elsewhere are reached directly.

    Args:
        handles: the engines' deployments, by the name of the model and the engine's.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        *,
        handles: Mapping[str, Mapping[str, Any]],
        bus: EventBus,
    ) -> None:
        super().__init__(
            settings, catalog, num_threads=1, available_memory=available_memory_bytes, bus=bus
        )  # for twins, which are never started
        self._handles = handles
        self._ray_bus = bus
        self.backends: list[tuple[EngineOrder, RayBackend]] = []

    def make(self, kind: str, order: EngineOrder) -> MadeEngine:
        """See `EngineKinds.make`."""
        made = super().make(kind, order)
        handle = self._handles[order.model].get(order.name)
        if handle is None:
            return made
        backend = RayBackend(
            model=order.model,
            name=order.name,
            engine=ServeEngineHandle(handle),
            twin=made.backend,
            bus=self._ray_bus,
        )
        self.backends.append((order, backend))
        return MadeEngine(
            backend=backend,
            is_elsewhere=True,
            takes_adapters=made.takes_adapters,
            inspectable=None if made.inspectable is None else backend,
        )


class FixedModels:
    """`ModelOperations` where there are none."""

    async def load(self, spec: ModelSpec) -> None:
        """Refused."""
        raise self._refusal()

    async def unload(self, name: str) -> None:
        """Refused."""
        raise self._refusal()

    async def switch(self, name: str | None, spec: ModelSpec) -> None:
        """Refused."""
        raise self._refusal()

    def _refusal(self) -> ConflictError:
        return ConflictError(
            "models cannot be changed while they are served on a Ray cluster; stop `localmoe serve --ray`, and start "
            "it with other models"
        )


class GatewayDeployment:
    """One gateway, which dispatches to all engines of the cluster.

    Args:
        settings: of the server; they say whether everybody is asked who they are.
        specs: what is served.
        handles: see `RayEngineKinds`.
    """

    def __init__(
        self, settings: Settings, specs: Sequence[ModelSpec], handles: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self._settings = settings
        gateway = Current(settings.gateway)
        self._state = ServerState(settings.state, gateway, home=settings.home)
        asks = settings.gateway.identity.mode != "open"
        self._doors = Doors(settings, gateway, self._state.keys, asks=asks)
        self._bus = EventBus()
        meter, self._cache = HardwareMeter(), make_answer_cache(settings.gateway.cache, home=settings.home)
        services = Services(
            operations=FixedModels(),
            performance=Performance(self._bus),
            memory=meter,
            render_metrics=Metrics(self._bus).render,
            responses=self._state.responses,
            jobs=self._state.jobs,
        )
        catalog = Catalog(settings.home)
        self._kinds = RayEngineKinds(settings, catalog, handles=handles, bus=self._bus)
        builder = DeploymentBuilder(
            settings, catalog, kinds=self._kinds, meter=meter, cache=self._cache, bus=self._bus
        )
        self._fleet: Fleet[ServedModel] = Fleet(
            builder.build, available_memory=available_memory_bytes, drain_timeout_s=0.0
        )
        deployments = [builder.make(spec, builder.text_of(spec)) for spec in specs]
        self._app = create_app(
            self._fleet.models, services=services, config=gateway, bus=self._bus, guard=self._doors.guard
        )
        self._app.add_middleware(_WithoutRequestId)
        self._starting = asyncio.get_running_loop().create_task(self._start(deployments))

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Called by Ray."""
        return self._app

    async def waiting(self) -> list[str]:
        """A line for each engine that is not ready; none once every model has one that is.

        Raises:
            EngineStartError: no engine of a model could be started.
        """
        self._check_started()
        if self._fleet.models and all(model.generator.is_ready for model in self._fleet.models.values()):
            return []
        return [f"{order.model}: {order.name}: {backend.problem}" for order, backend in self._kinds.backends]

    def check_health(self) -> None:
        """Called by Ray, which replaces a gateway that raises."""
        self._check_started()

    async def __del__(self) -> None:
        """Called, and waited for, by Ray."""
        self._starting.cancel()
        await asyncio.gather(self._starting, return_exceptions=True)
        await self._state.stop()
        await self._fleet.stop()
        await self._cache.stop()
        await self._doors.aclose()
        await self._state.close()

    async def _start(self, deployments: "Sequence[Deployment[ServedModel]]") -> None:
        await self._cache.start()
        await self._fleet.start(deployments)
        self._state.start(self._app)

    def _check_started(self) -> None:
        if self._starting.done():
            self._starting.result()


class _WithoutRequestId:
    """Takes `x-request-id` off answers: Serve's proxy gave us the id, its own or the client's, and adds it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)


def _node() -> str:
    from ray.util import get_node_ip_address

    address: str = get_node_ip_address()
    return address
