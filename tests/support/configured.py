"""A gateway over scripted engines whose configuration is a file, as `localmoe serve` puts them together."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
from fastapi import FastAPI

from localmoe.backends.scripted import ScriptedBackend
from localmoe.cli.live_config import manage_config
from localmoe.cli.model_changes import complete
from localmoe.config.manager import ConfigManager
from localmoe.config.settings import ConfigSource, Settings, read_settings
from localmoe.core.current import Current
from localmoe.core.errors import EngineStartError
from localmoe.core.events import EventBus
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.fleet import Deployment, Fleet
from localmoe.dispatch.policy import make_policy
from localmoe.dispatch.replica import Replica
from localmoe.gateway.app import create_app
from localmoe.gateway.context import ServedModel
from localmoe.hardware.meter import HardwareMeter
from localmoe.text.text_model import TextModel
from support.tiny_text import encode, make_services, served_model


class BrokenBackend(ScriptedBackend):
    """Cannot be started."""

    async def start(self) -> None:
        raise EngineStartError("it is damaged")


class ScriptedBuilder:
    """Makes deployments of one scripted engine each, which recites `text`; that of `broken` does not start."""

    def __init__(
        self, text_model: TextModel, text: str, settings: Settings, bus: EventBus, *, delay_s: float
    ) -> None:
        self._text_model = text_model
        self._script = encode(text_model, text)
        self._bus = bus
        self._delay_s = delay_s
        self.settings = settings
        self.backends: list[ScriptedBackend] = []

    def use(self, settings: Settings) -> None:
        self.settings = settings

    async def build(self, spec: ModelSpec) -> Deployment[ServedModel]:
        kind = BrokenBackend if spec.model == "broken" else ScriptedBackend
        backend = kind(self._script, delay_s=self._delay_s)
        self.backends.append(backend)
        config = self.settings.dispatch
        dispatcher = Dispatcher(
            model=spec.served_name,
            replicas=[Replica(name="native", kind="native", backend=backend, config=config)],
            policy=make_policy(config, HardwareMeter()),
            config=config,
            bus=self._bus,
        )
        served = replace(
            served_model(self._text_model, dispatcher, model_id=spec.served_name), fallbacks=spec.fallbacks
        )
        return Deployment(spec=spec, dispatcher=dispatcher, served=served, memory_bytes=0, mapped_bytes=0)


@dataclass(frozen=True, kw_only=True)
class ConfiguredServer:
    """What a test may look at."""

    file: Path
    app: FastAPI
    client: httpx2.AsyncClient
    manager: ConfigManager
    fleet: Fleet[ServedModel]
    builder: ScriptedBuilder


@asynccontextmanager
async def configured_server(
    file: Path, text_model: TextModel, *, text: str = "hello world", delay_s: float = 0.0
) -> AsyncIterator[ConfiguredServer]:
    """A server that was started with this file, whose `home` is beside it; it is not watched."""
    bus = EventBus()
    loaded = read_settings(ConfigSource(config=file, flags={("home",): str(file.parent / "home")}))
    settings = loaded.settings
    builder = ScriptedBuilder(text_model, text, settings, bus, delay_s=delay_s)
    fleet: Fleet[ServedModel] = Fleet(builder.build, available_memory=lambda: 1, drain_timeout_s=5)
    gateway = Current(settings.gateway)
    manager = manage_config(
        loaded,
        fleet=fleet,
        builder=builder,  # type: ignore[arg-type]  # as much of one as is used
        specs_of=lambda settings: settings.models,
        gateway=gateway,
        meter=HardwareMeter(),
        bus=bus,
    )
    services = replace(make_services(bus, operations=fleet), configuration=manager)
    app = create_app(fleet.models, services=services, config=gateway, bus=bus)
    await fleet.start([await builder.build(complete(settings, spec)) for spec in settings.models])
    await manager.keep_first("test", "start")
    try:
        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(app=app), base_url="http://test", timeout=60
        ) as client:
            yield ConfiguredServer(
                file=file, app=app, client=client, manager=manager, fleet=fleet, builder=builder
            )
    finally:
        await fleet.stop()
