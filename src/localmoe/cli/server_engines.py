"""A server's models with their engines, and what meters them, wired together."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack

from localmoe.catalog.catalog import Catalog
from localmoe.cli.answer_cache import make_answer_cache
from localmoe.cli.deployments import DeploymentBuilder
from localmoe.cli.engine_kinds import EngineKinds
from localmoe.cli.model_changes import complete
from localmoe.config.settings import Settings
from localmoe.core.events import EventBus
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.fleet import Deployment, Fleet
from localmoe.gateway.context import ServedModel
from localmoe.hardware.memory import available_memory_bytes
from localmoe.hardware.meter import HardwareMeter
from localmoe.hardware.processors import num_processors
from localmoe.observability.metrics import Metrics
from localmoe.observability.performance import Performance

_SWITCH_DRAIN_S = 600.0
"""How long answers of a model that is unloaded or replaced may go on."""


class ServerEngines:
    """What answers, without the gateway before it.

    `fleet` has the models, and `builder` makes more of them. What they tell on the `bus` is counted in `metrics` and
    `performance`; what they take, `meter` knows.

    Args:
        settings: of the server.
        catalog: where models are.
        specs: what is to be served.
        threads: compute threads; None: as the settings say.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        specs: Sequence[ModelSpec],
        threads: int | None,
    ) -> None:
        self.began_s = time.monotonic()
        """When loading began."""
        self.bus, self.meter = EventBus(), HardwareMeter()
        self.metrics, self.performance = Metrics(self.bus), Performance(self.bus)
        self._cache = make_answer_cache(settings.gateway.cache, home=settings.home)
        self._meters_always = settings.dispatch.policy == "resource_aware"
        kinds = EngineKinds(
            settings,
            catalog,
            num_threads=threads or settings.engine.num_threads or num_processors(),
            available_memory=available_memory_bytes,
            bus=self.bus,
        )
        self.builder = DeploymentBuilder(
            settings, catalog, kinds=kinds, meter=self.meter, cache=self._cache, bus=self.bus
        )
        self.fleet: Fleet[ServedModel] = Fleet(
            self.builder.build, available_memory=available_memory_bytes, drain_timeout_s=_SWITCH_DRAIN_S
        )
        self._specs = [complete(settings, spec) for spec in specs]
        self._deployments: list[Deployment[ServedModel]] = []

    @property
    def described(self) -> str:
        """What they begin with, for people."""
        return ", ".join(_described(spec) for spec in self._specs)

    async def read_models(self) -> None:
        """Read what is needed to start their engines.

        Raises:
            ModelFileError: a model's tokenizer or template cannot be read.
            ConfigError, EngineStartError: see `DeploymentBuilder.build`.
        """
        for spec in self._specs:
            text = await asyncio.to_thread(self.builder.text_of, spec)
            self._deployments.append(self.builder.make(spec, text))

    async def start(self) -> None:
        """Name the models, and return when every one can answer.

        Raises:
            ConfigError: two models have one name.
            EngineStartError: a model has no engine that can start.
        """
        await self._cache.start()
        if self._meters_always:
            self.meter.start()
        await self.fleet.start(self._deployments)

    async def stop(self) -> None:
        """End them all, and let go of what they answered."""
        async with AsyncExitStack() as closing:
            closing.push_async_callback(self._cache.stop)
            closing.callback(self.meter.stop)
            await self.fleet.stop()


def _described(spec: ModelSpec) -> str:
    kinds = "+".join(engine.engine for engine in spec.engines)
    return f"{spec.model} ({spec.weights})" if kinds == "native" else f"{spec.model} ({spec.weights}; {kinds})"
