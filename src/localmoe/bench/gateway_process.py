"""Gateways to measure, as processes: put together as `localmoe serve` does, with other things behind them."""

import socket
import time
from pathlib import Path

import uvicorn
import uvloop

from localmoe.backends.base import Backend
from localmoe.backends.remote import RemoteBackend
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.scripted import ScriptedBackend
from localmoe.bench.scripted_server import MODEL
from localmoe.core.current import Current
from localmoe.core.errors import ConflictError
from localmoe.core.events import EventBus
from localmoe.core.request import Request
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.policy import FirstToComplete
from localmoe.dispatch.replica import Replica
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.context import ServedModel, Services
from localmoe.gateway.http_protocol import BoundedHttpProtocol
from localmoe.gateway.identity.open import OpenToOwnPages
from localmoe.gateway.middleware.stack import Guard
from localmoe.gateway.responses.store import MemoryResponseStore
from localmoe.hardware.meter import HardwareMeter
from localmoe.observability.metrics import Metrics
from localmoe.observability.performance import Performance
from localmoe.text.text_model import TextModel

CAPACITY = 4096
"""Streams that the backend takes at once."""
_BACKLOG = 2048
_MEASURED = "the gateway is being measured"


class _NoOperations:
    """Nothing is loaded or unloaded while it is measured."""

    async def load(self, spec: ModelSpec) -> None:
        raise ConflictError(_MEASURED)

    async def unload(self, name: str) -> None:
        raise ConflictError(_MEASURED)

    async def switch(self, name: str | None, spec: ModelSpec) -> None:
        raise ConflictError(_MEASURED)


def serve_remote(listener: socket.socket, url: str) -> None:
    """Pass on what a server streams as text, until killed."""
    backend = RemoteBackend(config=RemoteConfig(url=url, model=MODEL, capacity=CAPACITY))
    uvloop.run(_serve(listener, backend, None))


def serve_scripted(listener: socket.socket, model: Path) -> None:
    """Stream token ids of the model's vocabulary from this process, as fast as it can, until killed."""
    text = TextModel.load(model)

    def script(request: Request) -> list[int]:
        # Whole words of ASCII mostly, as in an answer; the first ids are special tokens and single bytes.
        return [300 + index % (text.vocab_size - 300) for index in range(request.sampling.max_tokens)]

    uvloop.run(_serve(listener, ScriptedBackend(script, capacity=CAPACITY), text))


async def _serve(listener: socket.socket, backend: Backend, text: TextModel | None) -> None:
    bus, config = EventBus(), DispatchConfig()
    dispatcher = Dispatcher(
        model=MODEL,
        replicas=[Replica(name="scripted", kind="scripted", backend=backend, config=config)],
        policy=FirstToComplete(),
        config=config,
        bus=bus,
    )
    await dispatcher.start()
    served = ServedModel(id=MODEL, created=int(time.time()), text=text, context_tokens=None, generator=dispatcher)
    services = Services(
        operations=_NoOperations(),
        performance=Performance(bus),
        memory=HardwareMeter(),
        render_metrics=Metrics(bus).render,
        responses=MemoryResponseStore(),
    )
    guard = Guard(identity=OpenToOwnPages(hosts=(), origins=()))
    app = create_app({MODEL: served}, services=services, config=Current(GatewayConfig()), bus=bus, guard=guard)
    settings = uvicorn.Config(
        app,
        http=BoundedHttpProtocol,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        backlog=_BACKLOG,
    )
    await uvicorn.Server(settings).serve(sockets=[listener])
