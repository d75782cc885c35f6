"""The models that are served, and changes to them while they are.

One change at a time. A model that is loaded gets its name when it is ready; one that is to go loses its name first,
then has its answers finished, then is stopped. A switch does the first for the new model and then the second for the
old one, so that requests always find one of them. If memory does not hold both, the old one goes first, and comes
back if the new one cannot be started.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Generic, TypeVar

from localmoe.core.errors import (
    ConfigError,
    ConflictError,
    InsufficientMemoryError,
    ModelNotFoundError,
)
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

_QUIET_S = 1.0
"""A model that has lost its name has no requests any more when it had none for so long: some were being tokenized."""
_LOOK_S = 0.05

ServedT = TypeVar("ServedT")


@dataclass(frozen=True, kw_only=True)
class Deployment(Generic[ServedT]):
    """One model with its engines."""

    spec: ModelSpec
    dispatcher: Dispatcher
    served: ServedT
    """What the gateway needs to know of it."""
    adapters: Mapping[str, ServedT] = field(default_factory=dict)
    """The same of its adapters, by their names."""
    memory_bytes: int
    """RAM that its engines on this machine need."""
    mapped_bytes: int
    """Of it, what the system counts as available all the same, because it is a file's."""
    release: Callable[[], None] | None = None
    """Lets go of what it has beside its engines. May wait."""


class Fleet(Generic[ServedT]):
    """All deployments of one server.

    Args:
        build: makes a deployment that is not started yet, and whatever it needs on disk.
        available_memory: RAM that could be taken now, in bytes.
        drain_timeout_s: how long the answers of a model that goes may take to finish.
    """

    def __init__(
        self,
        build: Callable[[ModelSpec], Awaitable[Deployment[ServedT]]],
        *,
        available_memory: Callable[[], int],
        drain_timeout_s: float,
    ) -> None:
        self._build = build
        self._available_memory = available_memory
        self._drain_timeout_s = drain_timeout_s
        self._deployments: dict[str, Deployment[ServedT]] = {}
        """By name, those of adapters included; one that was switched to has the names of its predecessors, too."""
        self._served: dict[str, ServedT] = {}
        self._starting: list[Deployment[ServedT]] = []
        """That have no name yet."""
        self._changing = asyncio.Lock()

    @property
    def models(self) -> Mapping[str, ServedT]:
        """What is served, by name; a view that changes."""
        return MappingProxyType(self._served)

    @property
    def dispatchers(self) -> Sequence[Dispatcher]:
        """Of all models, those included that are being started."""
        deployments = (*self._deployments.values(), *self._starting)
        return list({id(one): one.dispatcher for one in deployments}.values())

    def spec(self, name: str) -> ModelSpec:
        """What is served under a name. Raises ModelNotFoundError."""
        return self._find(name).spec

    def amend(self, name: str, spec: ModelSpec, change: Callable[[ServedT], ServedT]) -> None:
        """Serve a model by a specification that differs in what its engines do not notice.

        Args:
            spec: whose names it gets in place of those of the specification before it.
            change: what the gateway is to know of it, from what it knows.

        Raises:
            ModelNotFoundError: it is not served.
            ConflictError: another change is under way, or another model has one of the names.
        """
        self._check_idle()
        old = self._find(name)
        self._check_names(spec, beside=old)
        adapters = {adapter: change(served) for adapter, served in old.adapters.items()}
        new = replace(old, spec=spec, served=change(old.served), adapters=adapters)
        inherited = [name for name in self._names(old) if name not in old.spec.names]
        self._hand_over(old, new, [*spec.names, *inherited])

    async def start(self, deployments: Sequence[Deployment[ServedT]]) -> None:
        """Serve these, which is what a server begins with: named at once, since nobody has a better one.

        Raises:
            ConfigError: two have one name.
            EngineStartError: a model has no engine that can start.
        """
        for deployment in deployments:
            for name in deployment.spec.names:
                if name in self._deployments:
                    raise ConfigError(f"models: two of them are named {name!r}; give one of them another name")
            self._name(deployment, deployment.spec.names)
        async with self._change():
            for deployment in deployments:
                await deployment.dispatcher.start()

    async def stop(self) -> None:
        """End all engines."""
        deployments = {id(deployment): deployment for deployment in self._deployments.values()}
        self._forget(list(self._deployments))
        await asyncio.gather(*(deployment.dispatcher.stop() for deployment in deployments.values()))

    async def load(self, spec: ModelSpec) -> None:
        """Serve one model more. See `core.protocols.ModelOperations`."""
        async with self._change():
            self._check_names(spec)
            async with self._built(spec) as deployment:
                self._check_memory(deployment)
                await deployment.dispatcher.start()
            self._name(deployment, spec.names)

    async def unload(self, name: str) -> None:
        """Serve a model no more. See `core.protocols.ModelOperations`."""
        async with self._change():
            deployment = self._find(name)
            self._forget(self._names(deployment))
            await self._retire(deployment)

    async def switch(self, name: str | None, spec: ModelSpec, *, drops: Collection[str] = ()) -> None:
        """Serve one model in another's place. See `core.protocols.ModelOperations`.

        Args:
            drops: names of the old one that nobody is to have.
        """
        async with self._change():
            old = self._find(self._only_name() if name is None else name)
            self._check_names(spec, beside=old)
            # Who asks for an adapter must not be answered without it.
            inherited = [name for name in self._names(old) if name not in old.adapters and name not in drops]
            names = list(dict.fromkeys([*spec.names, *inherited]))
            async with self._built(spec) as new:
                try:
                    self._check_memory(new)
                    go_away = self._retire
                except InsufficientMemoryError:
                    self._check_memory(new, without=old)
                    await self._replace(old, new)
                    go_away = _release
                else:
                    await new.dispatcher.start()
                self._hand_over(old, new, names)
            await go_away(old)

    async def _replace(self, old: Deployment[ServedT], new: Deployment[ServedT]) -> None:
        """Stop the one, then start the other. Until it is ready, requests are told to come again."""
        logger.warning("memory does not hold %s beside %s, which is stopped first", new.spec.model, old.spec.model)
        before = self._names(old)
        old.dispatcher.refuse_new("it is being replaced")
        await self._finish(old)
        try:
            await new.dispatcher.start()
        except Exception:
            logger.error("%s could not be started; starting %s again", new.spec.model, old.spec.model)
            async with self._built(old.spec) as again:
                await again.dispatcher.start()
            self._hand_over(old, again, before)
            await _release(old)
            raise

    @contextlib.asynccontextmanager
    async def _built(self, spec: ModelSpec) -> AsyncIterator[Deployment[ServedT]]:
        """A deployment to be started meanwhile, which is let go of again if it cannot be."""
        deployment = await self._build(spec)
        self._starting.append(deployment)
        try:
            yield deployment
        except BaseException:
            await _release(deployment)
            raise
        finally:
            self._starting.remove(deployment)

    async def _retire(self, deployment: Deployment[ServedT]) -> None:
        """Let a model without a name finish; nothing is left of it."""
        await self._finish(deployment)
        await _release(deployment)

    async def _finish(self, deployment: Deployment[ServedT]) -> None:
        """Let a model finish that nobody asks any more, and stop it."""
        loop = asyncio.get_running_loop()
        dispatcher, quiet_since_s, end_s = deployment.dispatcher, loop.time(), loop.time() + self._drain_timeout_s
        try:
            while loop.time() < min(quiet_since_s + _QUIET_S, end_s):
                await asyncio.sleep(_LOOK_S)
                if dispatcher.num_open:
                    quiet_since_s = loop.time()
        finally:  # where the server ends meanwhile, nobody else knows of it
            await dispatcher.stop()

    def _check_memory(self, new: Deployment[ServedT], *, without: Deployment[ServedT] | None = None) -> None:
        """Raises InsufficientMemoryError where the machine cannot hold one model more, once another is gone."""
        live = {id(deployment): deployment for deployment in self._deployments.values()}
        free_bytes = self._available_memory() - sum(deployment.mapped_bytes for deployment in live.values())
        if without is not None:
            free_bytes += without.memory_bytes
        if new.memory_bytes > free_bytes:
            raise InsufficientMemoryError(
                f"{new.spec.model} needs {new.memory_bytes / 1e9:.1f} GB of RAM, of which "
                f"{max(0, free_bytes) / 1e9:.1f} GB are free; unload another model first, or give it less with "
                "engine.tiers.ram_bytes"
            )

    def _find(self, name: str) -> Deployment[ServedT]:
        if name not in self._deployments:
            names = ", ".join(self._deployments) or "none"
            raise ModelNotFoundError(f"model {name[:200]!r} is not served here; served models: {names}")
        deployment = self._deployments[name]
        if name in deployment.adapters:
            served_name = deployment.spec.served_name
            raise ConflictError(
                f"{name!r} is an adapter of {served_name!r}, and comes and goes with it; name that"
            )
        return deployment

    def _check_names(self, spec: ModelSpec, *, beside: Deployment[ServedT] | None = None) -> None:
        """Raises ConflictError where a model other than this one has a name of the specification's."""
        for name in spec.names:
            if self._deployments.get(name, beside) is not beside:
                raise ConflictError(
                    f"{name!r} is served already; unload that model, switch it, or give one of them another name"
                )

    def _only_name(self) -> str:
        live = {id(deployment) for deployment in self._deployments.values()}
        if len(live) != 1:
            raise ConflictError(
                f"{len(live)} models are served ({', '.join(self._deployments)}); say which one is to be replaced"
            )
        return next(iter(self._deployments))

    def _names(self, deployment: Deployment[ServedT]) -> list[str]:
        return [name for name, other in self._deployments.items() if other is deployment]

    def _name(self, deployment: Deployment[ServedT], names: Sequence[str]) -> None:
        for name in names:
            self._deployments[name] = deployment
            self._served[name] = deployment.adapters.get(name, deployment.served)

    def _hand_over(self, old: Deployment[ServedT], new: Deployment[ServedT], names: Sequence[str]) -> None:
        self._forget([name for name in self._names(old) if name not in names])
        self._name(new, names)

    def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            del self._deployments[name]
            del self._served[name]

    @contextlib.asynccontextmanager
    async def _change(self) -> AsyncIterator[None]:
        self._check_idle()
        async with self._changing:
            yield

    def _check_idle(self) -> None:
        if self._changing.locked():
            raise ConflictError("models are being loaded, unloaded or switched; wait until that is done")


async def _release(deployment: Deployment[ServedT]) -> None:
    if deployment.release is None:
        return
    try:
        await asyncio.to_thread(deployment.release)
    except Exception:
        # It is as good as gone; what comes after it must not wait for somebody to look into this.
        logger.exception("something of %s may be left", deployment.spec.model)
