"""Brings the models that are served from one configuration to another, while they serve."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace

from localmoe.cli.deployments import DeploymentBuilder
from localmoe.cli.spec_checks import check_specs
from localmoe.config.settings import Settings, engine_settings
from localmoe.core.errors import ConfigError, InsufficientMemoryError, LocalMoEError, ModelNotFoundError
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.dispatch.fleet import Fleet
from localmoe.gateway.context import ServedModel

logger = logging.getLogger(__name__)

Undo = Callable[[], Awaitable[None]]


class ModelChanges:
    """Loads, replaces and unloads what differs, and nothing else.

    Args:
        fleet: the models.
        builder: makes those that are new.
        specs_of: what settings say is to be served.
    """

    def __init__(
        self,
        fleet: Fleet[ServedModel],
        builder: DeploymentBuilder,
        specs_of: Callable[[Settings], Sequence[ModelSpec]],
    ) -> None:
        self._fleet = fleet
        self._builder = builder
        self._specs_of = specs_of

    async def __call__(self, before: Settings, after: Settings) -> None:
        """See `config.manager.ChangeModels`."""
        old, new = await asyncio.to_thread(lambda: (self._complete(before), self._complete(after)))
        if before.models and not after.models and new.keys() - old.keys():
            # At start that means the demo model, which may have to be fetched and made.
            raise ConfigError("models is empty; leave at least one model to be served")
        undone: list[Undo] = []
        self._builder.use(after)
        try:
            await self._change(old, new, undone)
        except asyncio.CancelledError:  # the server ends
            self._builder.use(before)
            raise
        except Exception:
            self._builder.use(before)
            for undo in reversed(undone):
                try:
                    await undo()
                except Exception as error:  # the others are still to be undone, and the first failure is told
                    logger.error(
                        "models are not as they were before the change that failed: %s",
                        error,
                        exc_info=not isinstance(error, LocalMoEError),
                    )
            raise

    async def _change(
        self, old: Mapping[str, ModelSpec], new: Mapping[str, ModelSpec], undone: list[Undo]
    ) -> None:
        leaving = {name: spec for name, spec in old.items() if name not in new}
        self._give_up_moved(old, new, undone)
        for name, spec in new.items():
            before = old.get(name)
            if before == spec:
                continue
            if before is None:
                # One that goes hands its names over to the one that has them next, so that they are always served.
                before = next(
                    (one for one in leaving.values() if {*one.served_names} & {*spec.served_names}), None
                )
                if before is not None:
                    del leaving[before.served_name]
            try:
                await self._bring(before, spec, undone)
            except InsufficientMemoryError:
                if not leaving:
                    raise
                await self._unload(leaving, undone)
                leaving = {}
                await self._bring(before, spec, undone)
        await self._unload(leaving, undone)

    def _give_up_moved(
        self, old: Mapping[str, ModelSpec], new: Mapping[str, ModelSpec], undone: list[Undo]
    ) -> None:
        """Take names from models that stay, where others are to have them."""
        for name in old.keys() & new.keys():
            others = {one for spec in new.values() if spec is not new[name] for one in spec.names}
            kept = tuple(one for one in old[name].served_names if one not in others)
            if kept != old[name].served_names and name in self._fleet.models:
                self._amend(name, replace(self._fleet.spec(name), served_model_name=kept), undone)

    def _amend(self, name: str, spec: ModelSpec, undone: list[Undo]) -> None:
        fleet, before = self._fleet, self._fleet.spec(name)

        async def undo() -> None:
            fleet.amend(name, before, _told(before))

        fleet.amend(name, spec, _told(spec))
        undone.append(undo)

    async def _bring(self, old: ModelSpec | None, spec: ModelSpec, undone: list[Undo]) -> None:
        """Serve a model that is new, or other than it was."""
        fleet, name = self._fleet, (old or spec).served_name
        if name not in fleet.models:
            await fleet.load(spec)
            undone.append(lambda: fleet.unload(spec.served_name))
        elif old is not None and name == spec.served_name and _with_names_of(old, spec) == spec:
            self._amend(name, spec, undone)
        else:
            before = fleet.spec(name)
            await fleet.switch(name, spec, drops=_names_less(old, spec))
            undone.append(lambda: fleet.switch(spec.served_name, before, drops=_names_less(spec, before)))

    async def _unload(self, leaving: Mapping[str, ModelSpec], undone: list[Undo]) -> None:
        for name, spec in leaving.items():
            try:
                await self._fleet.unload(name)
            except ModelNotFoundError:
                continue  # somebody has unloaded it already
            undone.append(lambda spec=spec: self._fleet.load(spec))  # type: ignore[misc]

    def _complete(self, settings: Settings) -> dict[str, ModelSpec]:
        """By name, what is to be served, each engine with all its settings: what a model is built of then depends on
        nothing else, and equal ones are the same."""
        specs = self._specs_of(settings)
        check_specs(specs)
        return {spec.served_name: complete(settings, spec) for spec in specs}


def complete(settings: Settings, spec: ModelSpec) -> ModelSpec:
    """A model with all settings of its engines in it, those of their kinds' blocks included.

    Raises:
        ConfigError: an engine cannot have its settings.
    """
    engines = []
    for engine in spec.engines:
        values = engine_settings(settings, spec, engine)
        engines.append(
            EngineSpec(engine=engine.engine, settings=asdict(values) if is_dataclass(values) else values)
        )
    return replace(spec, engines=tuple(engines))


def _with_names_of(old: ModelSpec, spec: ModelSpec) -> ModelSpec:
    """The old one with what its engines do not notice as in the other."""
    return replace(old, fallbacks=spec.fallbacks, served_model_name=spec.served_model_name)


def _names_less(old: ModelSpec | None, spec: ModelSpec) -> set[str]:
    return set() if old is None else {*old.names} - {*spec.names}


def _told(spec: ModelSpec) -> Callable[[ServedModel], ServedModel]:
    return lambda served: replace(served, fallbacks=spec.fallbacks)
