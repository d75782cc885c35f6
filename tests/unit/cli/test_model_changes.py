"""From one configuration's models to another's: what differs is changed, and if that fails, changed back."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.cli.model_changes import ModelChanges, complete
from localmoe.config.settings import Settings
from localmoe.core.errors import (
    ConfigError,
    ConflictError,
    EngineStartError,
    InsufficientMemoryError,
    ModelNotFoundError,
)
from localmoe.core.events import EventBus
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.fleet import Deployment, Fleet
from localmoe.dispatch.policy import RoundRobin
from localmoe.dispatch.replica import Replica
from localmoe.engine.config import EngineConfig
from localmoe.gateway.context import ServedModel


@dataclass
class FakeFleet:
    """Knows which models there are, and fails where it is told to."""

    specs: dict[str, ModelSpec]
    done: list[str] = field(default_factory=list)
    failures: dict[str, BaseException] = field(default_factory=dict)
    capacity: int = 100

    @property
    def models(self) -> dict[str, ServedModel]:
        return {
            name: ServedModel(
                id=name,
                created=0,
                text=None,
                context_tokens=1,
                generator=ScriptedBackend([1]),
                fallbacks=spec.fallbacks,
            )
            for name, spec in self.specs.items()
        }

    def spec(self, name: str) -> ModelSpec:
        return self.specs[name]

    async def load(self, spec: ModelSpec) -> None:
        if spec.served_name in self.specs:
            raise ConflictError("served already")
        self._note("load", spec.served_name)
        if len(self.specs) >= self.capacity:
            raise InsufficientMemoryError("no room")
        self.specs[spec.served_name] = spec

    async def unload(self, name: str) -> None:
        if name not in self.specs:
            raise ModelNotFoundError(name)
        self._note("unload", name)
        del self.specs[name]

    async def switch(self, name: str | None, spec: ModelSpec, *, drops: Collection[str] = ()) -> None:
        assert name is not None
        self._note("switch", name)
        self.specs[name] = spec

    def amend(self, name: str, spec: ModelSpec, change: Callable[[ServedModel], ServedModel]) -> None:
        self._note("amend", name)
        assert change(self.models[name]).fallbacks == spec.fallbacks
        self.specs[name] = spec

    def _note(self, what: str, name: str) -> None:
        self.done.append(f"{what} {name}")
        if failure := self.failures.pop(f"{what} {name}", None):
            raise failure


class FakeBuilder:
    def __init__(self) -> None:
        self.settings: Settings | None = None

    def use(self, settings: Settings) -> None:
        self.settings = settings


def settings_of(*models: ModelSpec, **fields: Any) -> Settings:
    return Settings(models=models, **fields)


async def change(fleet: FakeFleet, before: Settings, after: Settings) -> FakeBuilder:
    builder = FakeBuilder()
    changes = ModelChanges(fleet, builder, lambda settings: settings.models)  # type: ignore[arg-type]
    try:
        await changes(before, after)
    finally:
        fleet.settings = builder.settings  # type: ignore[attr-defined]
    return builder


def started(settings: Settings) -> FakeFleet:
    return FakeFleet({spec.served_name: complete(settings, spec) for spec in settings.models})


A, B, C = (ModelSpec(model=name) for name in "abc")


async def test_only_what_differs_is_touched() -> None:
    before, after = settings_of(A, B), settings_of(A, replace(B, weights="mxfp4"), C)  # type: ignore[arg-type]
    fleet = started(before)
    await change(fleet, before, after)
    assert fleet.done == ["switch b", "load c"]
    fleet.done.clear()
    await change(fleet, after, settings_of(A))
    assert fleet.done == ["unload b", "unload c"]


async def test_a_block_concerns_models_with_such_engines() -> None:
    vllm = ModelSpec(model="v", engines=(EngineSpec(engine="vllm"),))
    own = ModelSpec(model="own", engines=(EngineSpec(settings={"max_num_seqs": 9}),))
    before = settings_of(A, vllm, own)
    fleet = started(before)
    await change(fleet, before, settings_of(A, vllm, own, engine=EngineConfig(max_num_seqs=7)))
    assert fleet.done == ["switch a"]
    assert fleet.specs["a"].engines[0].settings["max_num_seqs"] == 7
    assert fleet.specs["own"].engines[0].settings["max_num_seqs"] == 9


async def test_a_server_is_not_left_without_models() -> None:
    """At start the demo model would be served, which is not to be made in the middle of a request."""
    before = settings_of(A, B)
    fleet = started(before)
    demo = (ModelSpec(model="demo"),)
    changes = ModelChanges(fleet, FakeBuilder(), lambda settings: settings.models or demo)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leave at least one"):
        await changes(before, settings_of())
    assert fleet.done == []


async def test_fallbacks_take_no_engine_down() -> None:
    before, after = settings_of(A, B), settings_of(replace(A, fallbacks=("b",)), B)
    fleet = started(before)
    await change(fleet, before, after)
    assert fleet.done == ["amend a"]
    assert fleet.models["a"].fallbacks == ("b",)


async def test_if_one_fails_all_are_as_they_were() -> None:
    before = settings_of(A, B)
    after = settings_of(replace(A, weights="int8"), replace(B, fallbacks=("a",)), C)  # type: ignore[arg-type]
    fleet = started(before)
    specs = dict(fleet.specs)
    fleet.failures["load c"] = EngineStartError("damaged")
    with pytest.raises(EngineStartError):
        await change(fleet, before, after)
    assert fleet.done == ["switch a", "amend b", "load c", "amend b", "switch a"]
    assert fleet.specs == specs
    assert fleet.settings is before  # type: ignore[attr-defined]


async def test_a_server_that_ends_in_the_middle_starts_nothing() -> None:
    before = settings_of(A, B, C)
    fleet = started(before)
    fleet.failures["unload c"] = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await change(fleet, before, settings_of(A))
    assert fleet.done == ["unload b", "unload c"]


async def test_what_leaves_makes_room_and_comes_back() -> None:
    before, after = settings_of(A, B), settings_of(A, C)
    fleet = started(before)
    fleet.capacity = 2
    await change(fleet, before, after)
    assert fleet.done == ["load c", "unload b", "load c"]
    fleet = started(before)
    fleet.capacity = 2
    with pytest.raises(InsufficientMemoryError):
        await change(fleet, before, settings_of(A, C, ModelSpec(model="d")))
    assert sorted(fleet.specs) == ["a", "b"]


async def test_what_an_operator_has_done_meanwhile_is_no_obstacle() -> None:
    before = settings_of(A, B)
    fleet = started(before)
    await fleet.unload("b")
    await fleet.load(C)
    fleet.done.clear()
    await change(fleet, before, settings_of(A, replace(C, weights="int8")))  # type: ignore[arg-type]
    assert fleet.done == ["switch c"]
    await change(fleet, settings_of(A, C), settings_of(A, C, replace(B, weights="int8")))  # type: ignore[arg-type]
    assert fleet.done == ["switch c", "load b"]


def test_a_complete_model_depends_on_nothing_else() -> None:
    settings = settings_of(A, engine=EngineConfig(max_num_seqs=7))
    once = complete(settings, A)
    assert complete(Settings(), once) == once
    remote = ModelSpec(model="r", engines=(EngineSpec(engine="remote", settings={"url": "http://a/v1"}),))
    assert complete(settings, remote).engines[0].settings["model"] == "r"


class Machine:
    """Builds deployments whose engines do nothing, and remembers which."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.broken: set[str] = set()

    def use(self, settings: Settings) -> None:
        """What is built is the same by any settings."""

    async def build(self, spec: ModelSpec) -> Deployment[ServedModel]:
        self.built.append(spec.model)
        if spec.model in self.broken:
            raise EngineStartError("damaged")
        config = DispatchConfig()
        replica = Replica(name="a", kind="native", backend=ScriptedBackend([1]), config=config)
        dispatcher = Dispatcher(
            model=spec.served_name, replicas=[replica], policy=RoundRobin(), config=config, bus=EventBus()
        )
        served = ServedModel(
            id=spec.served_name, created=0, text=None, context_tokens=1, generator=dispatcher, parent=spec.model
        )
        return Deployment(spec=spec, dispatcher=dispatcher, served=served, memory_bytes=1, mapped_bytes=0)


@asynccontextmanager
async def named(
    machine: Machine, settings: Settings
) -> AsyncIterator[tuple[Fleet[ServedModel], Callable[[Settings, Settings], Any]]]:
    """A real fleet, and what changes it."""
    fleet: Fleet[ServedModel] = Fleet(machine.build, available_memory=lambda: 100, drain_timeout_s=0.0)
    await fleet.start([await machine.build(complete(settings, spec)) for spec in settings.models])
    machine.built.clear()
    try:
        yield fleet, ModelChanges(fleet, machine, lambda settings: settings.models)  # type: ignore[arg-type]
    finally:
        await fleet.stop()


def holders(fleet: Fleet[ServedModel]) -> dict[str, tuple[str, str | None]]:
    """By name: the name that answers show, and the model."""
    return {name: (served.id, served.parent) for name, served in sorted(fleet.models.items())}


def under(model: str, *names: str, **fields: Any) -> ModelSpec:
    return ModelSpec(model=model, served_model_name=names, **fields)


async def test_names_come_go_and_move_without_an_engine() -> None:
    machine = Machine()
    first = settings_of(under("m", "a", "x"), under("n", "b", "y"))
    async with named(machine, first) as (fleet, changes):
        second = settings_of(under("m", "a", "y"), under("n", "b", "z"))
        await changes(first, second)
        assert holders(fleet) == {"a": ("a", "m"), "b": ("b", "n"), "y": ("a", "m"), "z": ("b", "n")}
        await changes(second, first)
        assert holders(fleet) == {"a": ("a", "m"), "b": ("b", "n"), "x": ("a", "m"), "y": ("b", "n")}
    assert machine.built == []


async def test_a_new_first_name_is_a_switch_that_keeps_the_others_served() -> None:
    machine = Machine()
    first = settings_of(under("m", "a", "x"))
    async with named(machine, first) as (fleet, changes):
        await changes(first, settings_of(under("m", "x", "a")))
        assert holders(fleet) == {"a": ("x", "m"), "x": ("x", "m")}
        await changes(settings_of(under("m", "x", "a")), settings_of(under("n", "a")))
        assert holders(fleet) == {"a": ("a", "n")}
    assert machine.built == ["m", "n"]


async def test_names_are_as_they_were_if_a_change_fails() -> None:
    machine = Machine()
    first = settings_of(under("m", "a", "x"), under("n", "b", "y"))
    async with named(machine, first) as (fleet, changes):
        before = holders(fleet)
        machine.broken = {"broken"}
        changed = (under("m", "c", "x"), under("n", "b", "a", weights="int8"), under("broken", "d"))
        with pytest.raises(EngineStartError):
            await changes(first, settings_of(*changed))
        assert holders(fleet) == before


async def test_what_is_missing_is_said_before_anything_changes(tmp_path: Path) -> None:
    machine = Machine()
    first = settings_of(under("m", "a"))
    async with named(machine, first) as (fleet, changes):
        missing = str(tmp_path / "none.jinja")
        with pytest.raises(ConfigError, match=r"none\.jinja.* is no file"):
            await changes(first, settings_of(under("n", "a"), under("m", "b", chat_template=missing)))
        assert holders(fleet) == {"a": ("a", "m")}
    assert machine.built == []
