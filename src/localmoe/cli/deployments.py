"""Puts a served model together: its engines, what dispatches to them, and what the gateway knows of it."""

import asyncio
import logging
from collections import Counter
from dataclasses import replace

from localmoe.catalog.catalog import Catalog
from localmoe.cli.answer_cache import AnswerCache, model_version, scope_of
from localmoe.cli.engine_kinds import EngineKinds, EngineOrder, MadeEngine
from localmoe.cli.machine import find_findings
from localmoe.cli.providing import provide_while_serving
from localmoe.cli.spec_checks import check_specs, lora_modules, template_path
from localmoe.config.settings import Settings
from localmoe.core.errors import ConfigError
from localmoe.core.events import EventBus
from localmoe.core.protocols import ResourceMeter
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.fleet import Deployment
from localmoe.dispatch.policy import make_policy
from localmoe.dispatch.replica import Replica
from localmoe.dispatch.speed import Processor
from localmoe.gateway.cache.scoped import ScopedGenerator
from localmoe.gateway.context import ServedModel
from localmoe.text.text_model import TextModel

logger = logging.getLogger(__name__)


class DeploymentBuilder:
    """Makes deployments.

    Args:
        settings: of the server.
        catalog: where models are.
        kinds: makes engines.
        meter: for the policy that looks at resources.
        cache: of answers.
        bus: for what happens.
    """

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        *,
        kinds: EngineKinds,
        meter: ResourceMeter,
        cache: AnswerCache,
        bus: EventBus,
    ) -> None:
        self._settings = settings
        self._catalog = catalog
        self._kinds = kinds
        self._meter = meter
        self._cache = cache
        self._bus = bus
        self._processors: dict[tuple[int, ...], Processor] = {}
        """By their GPUs; none for the machine's own."""

    def use(self, settings: Settings) -> None:
        """Make what comes from now on of other settings."""
        self._settings = settings
        self._kinds.use(settings)

    async def build(self, spec: ModelSpec) -> Deployment[ServedModel]:
        """A deployment that is not started, with all that it needs on disk.

        Raises:
            ModelNotFoundError, ModelBuildError, ModelFileError: what is to be on disk is not, and cannot be made.
            ConfigError: an engine cannot be set up so.
            EngineStartError: an engine is not installed.
        """
        alone = self._settings.model_copy(update={"models": (spec,)})
        for finding in await asyncio.to_thread(find_findings, alone):
            if finding.model is not None:
                logger.warning("%s", finding)
        await asyncio.to_thread(check_specs, [spec])
        await provide_while_serving(self._catalog, spec)
        text = await asyncio.to_thread(self.text_of, spec)  # a large tokenizer takes a second to read
        return self.make(spec, text)

    def text_of(self, spec: ModelSpec) -> TextModel | None:
        """Tokenizer and template of a model; None where only engines elsewhere have them. Raises as `build`."""
        template = template_path(spec)
        others = any(engine.engine not in ("native", "vllm", "deepspeed") for engine in spec.engines)
        if others and not self._catalog.has(spec.model):
            if template is not None:
                raise ConfigError(
                    f"chat_template is {str(template)!r}, but {spec.model} is not on this machine: the server that "
                    "has it makes prompts of chats by a template of its own; take the model in, or leave it out"
                )
            return None
        return TextModel.load(
            self._catalog.path(spec.model), format_name=spec.answer_format, template_path=template
        )

    def make(self, spec: ModelSpec, text: TextModel | None) -> Deployment[ServedModel]:
        """As `build`, where all is on disk and read."""
        made = self._engines(spec, text)
        dispatch = self._settings.dispatch
        replicas = [
            Replica(
                name=name,
                kind=kind,
                backend=one.backend,
                config=dispatch,
                devices=one.devices,
                takes_adapters=one.takes_adapters,
                processor=None if one.is_elsewhere else self._processors.setdefault(one.devices, Processor()),
            )
            for name, kind, one in made
        ]
        dispatcher = Dispatcher(
            model=spec.served_name,
            replicas=replicas,
            policy=make_policy(dispatch, self._meter),
            config=dispatch,
            bus=self._bus,
        )
        mapped_bytes = max(one.mapped_bytes for _, _, one in made)
        served = self._served(spec, text, dispatcher, made)
        return Deployment(
            spec=spec,
            dispatcher=dispatcher,
            served=served,
            adapters={
                # Its engines are looked into under the model's own name.
                name: replace(served, id=name, adapter=name, parent=served.id, inspectables=())
                for name in spec.adapters
            },
            # Native engines of a model map one file.
            memory_bytes=sum(one.memory_bytes - one.mapped_bytes for _, _, one in made) + mapped_bytes,
            mapped_bytes=mapped_bytes,
            release=None if text is None else text.close,
        )

    def _engines(self, spec: ModelSpec, text: TextModel | None) -> list[tuple[str, str, MadeEngine]]:
        """(name, kind, engine); names are kinds, numbered where there are several of one."""
        totals, counts = Counter(engine.engine for engine in spec.engines), Counter[str]()
        made, adapters = [], lora_modules(spec)
        for engine in spec.engines:
            counts[engine.engine] += 1
            number = f"-{counts[engine.engine]}" if totals[engine.engine] > 1 else ""
            order = EngineOrder(
                model=spec.served_name,
                name=engine.engine + number,
                source=spec.model,
                weights=spec.weights,
                settings=engine.settings,
                num_natives=totals["native"],
                text=text,
                adapters=adapters,
            )
            made.append((order.name, engine.engine, self._kinds.make(engine.engine, order)))
        return made

    def _served(
        self,
        spec: ModelSpec,
        text: TextModel | None,
        dispatcher: Dispatcher,
        made: list[tuple[str, str, MadeEngine]],
    ) -> ServedModel:
        context_tokens, created = None, 0
        if text is not None:
            own_tokens = self._catalog.context_tokens(spec.model)
            # Engines refuse what only others can take.
            context_tokens = min(own_tokens, max(one.context_tokens or own_tokens for _, _, one in made))
            created = int(self._catalog.path(spec.model).stat().st_mtime)
        return ServedModel(
            id=spec.served_name,
            created=created,
            text=text,
            context_tokens=context_tokens,
            generator=self._cache.over(
                ScopedGenerator(dispatcher, scope=scope_of(self._settings.gateway.cache)),
                text,
                version=model_version(spec, self._settings, self._catalog),
            ),
            inspectables=[one.inspectable for _, _, one in made if one.inspectable is not None],
            fallbacks=spec.fallbacks,
        )
