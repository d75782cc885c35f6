"""Models that come, go and take each other's places while requests are answered."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import (
    BackendUnavailableError,
    ConfigError,
    ConflictError,
    EngineStartError,
    InsufficientMemoryError,
    ModelNotFoundError,
)
from localmoe.core.events import EventBus
from localmoe.core.serving import ModelSpec
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.dispatcher import Dispatcher
from localmoe.dispatch.fleet import Deployment, Fleet
from localmoe.dispatch.policy import RoundRobin
from localmoe.dispatch.replica import Replica
from support.models import greedy

SCRIPTS = {"a": [1] * 8, "b": [2] * 8, "c": [3] * 8}


class FakeEngine(ScriptedBackend):
    """Takes its time, and may be told not to start."""

    broken = False
    failure: Exception = EngineStartError("damaged")
    is_stopped = False

    async def start(self) -> None:
        await asyncio.sleep(0.01)
        if self.broken:
            raise self.failure
        await super().start()

    async def stop(self) -> None:
        self.is_stopped = True
        await super().stop()


class FakeMachine:
    """Builds deployments of scripted engines, each of 4 bytes, and counts memory."""

    def __init__(self, memory_bytes: int = 100) -> None:
        self.memory_bytes = memory_bytes
        self.broken: set[str] = set()
        self.engines: list[FakeEngine] = []
        self.released: list[str] = []
        self.cannot_release = False

    async def build(self, spec: ModelSpec) -> Deployment[str]:
        if spec.model not in SCRIPTS:
            raise ModelNotFoundError(f"no {spec.model}")
        engine = FakeEngine(SCRIPTS[spec.model], delay_s=0.01)
        engine.broken = spec.model in self.broken
        self.engines.append(engine)
        config = DispatchConfig()
        replica = Replica(name="native", kind="native", backend=engine, config=config)
        dispatcher = Dispatcher(
            model=spec.served_name, replicas=[replica], policy=RoundRobin(), config=config, bus=EventBus()
        )
        self.dispatchers = {**getattr(self, "dispatchers", {}), spec.model: dispatcher}
        return Deployment(
            spec=spec,
            dispatcher=dispatcher,
            served=spec.model,
            adapters={name: f"{spec.model}+{name}" for name in spec.adapters},
            memory_bytes=4,
            mapped_bytes=0,
            release=lambda: self.release(spec.model),
        )

    def release(self, model: str) -> None:
        self.released.append(model)
        if self.cannot_release:
            raise OSError("it will not go")

    def available_bytes(self) -> int:
        return self.memory_bytes - 4 * sum(not engine.is_stopped and engine.is_ready for engine in self.engines)


@asynccontextmanager
async def serving(machine: FakeMachine, *models: str) -> AsyncIterator[Fleet[str]]:
    fleet = Fleet(machine.build, available_memory=machine.available_bytes, drain_timeout_s=5)
    await fleet.start([await machine.build(ModelSpec(model=model)) for model in models])
    try:
        yield fleet
    finally:
        await fleet.stop()


async def answer(dispatcher: Dispatcher) -> list[int]:
    async with aclosing(dispatcher.generate(greedy("r", [5], 8))) as chunks:
        return [token async for chunk in chunks for token in chunk.token_ids]


async def test_load_and_unload() -> None:
    machine = FakeMachine()
    async with serving(machine, "a") as fleet:
        await fleet.load(ModelSpec(model="b", served_model_name="second"))
        assert dict(fleet.models) == {"a": "a", "second": "b"}
        await fleet.unload("second")
        assert dict(fleet.models) == {"a": "a"}
        assert machine.engines[1].is_stopped
        assert machine.released == ["b"]
    assert machine.engines[0].is_stopped


async def test_a_model_that_goes_finishes_its_answers() -> None:
    machine = FakeMachine()
    async with serving(machine, "a") as fleet:
        running = asyncio.create_task(answer(machine.dispatchers["a"]))
        await asyncio.sleep(0.02)
        await fleet.unload("a")
        assert running.done()
        assert await running == SCRIPTS["a"]
        with pytest.raises(ModelNotFoundError, match="served models: none"):
            await fleet.unload("a")


async def test_a_switch_takes_over_when_ready_and_keeps_the_name() -> None:
    machine = FakeMachine()
    async with serving(machine, "a") as fleet:
        running = asyncio.create_task(answer(machine.dispatchers["a"]))
        await asyncio.sleep(0.02)
        await fleet.switch(None, ModelSpec(model="b"))
        assert dict(fleet.models) == {"a": "b", "b": "b"}
        assert await running == SCRIPTS["a"]
        assert machine.engines[0].is_stopped
        assert await answer(machine.dispatchers["b"]) == SCRIPTS["b"]
        await fleet.switch("a", ModelSpec(model="c"))
        assert dict(fleet.models) == {"a": "c", "b": "c", "c": "c"}
        await fleet.unload("b")
        assert dict(fleet.models) == {}


async def test_a_switch_to_a_broken_model_changes_nothing() -> None:
    machine = FakeMachine()
    machine.broken = {"b"}
    async with serving(machine, "a") as fleet:
        with pytest.raises(EngineStartError, match="damaged"):
            await fleet.switch("a", ModelSpec(model="b"))
        with pytest.raises(ModelNotFoundError):
            await fleet.switch("a", ModelSpec(model="x"))
        assert dict(fleet.models) == {"a": "a"}
        assert await answer(machine.dispatchers["a"]) == SCRIPTS["a"]
        assert machine.engines[1].is_stopped
        assert machine.released == ["b"]


async def test_without_memory_for_both_the_old_one_goes_first() -> None:
    machine = FakeMachine(memory_bytes=6)
    async with serving(machine, "a") as fleet:
        with pytest.raises(InsufficientMemoryError, match="unload another model first"):
            await fleet.load(ModelSpec(model="b"))
        running = asyncio.create_task(answer(machine.dispatchers["a"]))
        await asyncio.sleep(0.02)
        switching = asyncio.create_task(fleet.switch("a", ModelSpec(model="b")))
        await asyncio.sleep(0.02)
        with pytest.raises(BackendUnavailableError, match="it is being replaced"):
            await answer(machine.dispatchers["a"])
        await switching
        assert await running == SCRIPTS["a"]
        assert dict(fleet.models) == {"a": "b", "b": "b"}
        assert await answer(machine.dispatchers["b"]) == SCRIPTS["b"]
        assert machine.released == ["b", "a"]


async def test_a_model_that_waits_for_its_place_is_known() -> None:
    """Settings that change meanwhile are for it, too."""
    machine = FakeMachine(memory_bytes=6)
    async with serving(machine, "a") as fleet:
        running = asyncio.create_task(answer(machine.dispatchers["a"]))
        await asyncio.sleep(0.02)
        switching = asyncio.create_task(fleet.switch("a", ModelSpec(model="b")))
        await asyncio.sleep(0.02)
        assert {dispatcher.model for dispatcher in fleet.dispatchers} == {"a", "b"}
        await asyncio.gather(running, switching)
        assert [dispatcher.model for dispatcher in fleet.dispatchers] == ["b"]


async def test_a_model_that_is_going_when_the_server_ends_ends_with_it() -> None:
    machine = FakeMachine()
    async with serving(machine, "a", "b") as fleet:
        going = asyncio.create_task(fleet.unload("a"))
        await asyncio.sleep(0.02)
    assert not machine.engines[0].is_stopped
    going.cancel()
    await asyncio.gather(going, return_exceptions=True)
    assert machine.engines[0].is_stopped


async def test_a_model_that_serves_is_not_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asked for it may leave while the one before it is let go of."""
    machine = FakeMachine(memory_bytes=6)
    holds = threading.Event()
    async with serving(machine, "a") as fleet:
        monkeypatch.setattr(machine, "release", lambda model: (machine.released.append(model), holds.wait(10)))
        switching = asyncio.create_task(fleet.switch("a", ModelSpec(model="b")))
        while machine.released != ["a"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        switching.cancel()
        holds.set()
        await asyncio.gather(switching, return_exceptions=True)
        assert machine.released == ["a"]
        assert dict(fleet.models) == {"a": "b", "b": "b"}


async def test_and_comes_back_if_the_new_one_is_broken() -> None:
    machine = FakeMachine(memory_bytes=6)
    machine.broken = {"b"}
    async with serving(machine, "a") as fleet:
        with pytest.raises(EngineStartError, match="damaged"):
            await fleet.switch("a", ModelSpec(model="b"))
        assert dict(fleet.models) == {"a": "a"}
        assert await answer(machine.dispatchers["a"]) == SCRIPTS["a"]
        assert machine.released == ["a", "b"]


async def test_what_does_not_fit_even_alone_leaves_the_old_one() -> None:
    machine = FakeMachine(memory_bytes=3)
    async with serving(machine, "a") as fleet:
        with pytest.raises(InsufficientMemoryError):
            await fleet.switch("a", ModelSpec(model="b"))
        assert await answer(machine.dispatchers["a"]) == SCRIPTS["a"]


@pytest.mark.parametrize("memory_bytes", [100, 6])
async def test_what_cannot_be_let_go_of_holds_nothing_up(memory_bytes: int) -> None:
    machine = FakeMachine(memory_bytes)
    machine.cannot_release, machine.broken = True, {"c"}
    async with serving(machine, "a") as fleet:
        await fleet.switch("a", ModelSpec(model="b"))
        assert await answer(machine.dispatchers["b"]) == SCRIPTS["b"]
        with pytest.raises(EngineStartError, match="damaged"):
            await fleet.switch("b", ModelSpec(model="c"))
        assert await answer(machine.dispatchers["b"]) == SCRIPTS["b"]
        await fleet.unload("b")
    assert machine.released == (["a", "c", "b"] if memory_bytes == 100 else ["a", "b", "c", "b"])


async def test_one_change_at_a_time() -> None:
    machine = FakeMachine()
    async with serving(machine, "a") as fleet:
        loading = asyncio.create_task(fleet.load(ModelSpec(model="b")))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="are being loaded"):
            await fleet.load(ModelSpec(model="c"))
        await loading
        await fleet.load(ModelSpec(model="c"))


async def test_names_are_unique() -> None:
    machine = FakeMachine()
    async with serving(machine, "a", "b") as fleet:
        with pytest.raises(ConflictError, match="'a' is served already"):
            await fleet.load(ModelSpec(model="c", served_model_name="a"))
        with pytest.raises(ConflictError, match="'b' is served already; unload that model, switch it"):
            await fleet.switch("a", ModelSpec(model="b"))
        with pytest.raises(ConflictError, match=r"2 models are served \(a, b\)"):
            await fleet.switch(None, ModelSpec(model="c"))
    with pytest.raises(ConfigError, match="two of them are named 'a'"):
        async with serving(machine, "a", "a"):
            pass


async def test_all_names_are_unique_and_answered() -> None:
    machine = FakeMachine()
    async with serving(machine, "a") as fleet:
        await fleet.load(ModelSpec(model="b", served_model_name=("x", "y"), adapters={"x-lora": None}))
        assert dict(fleet.models) == {"a": "a", "x": "b", "y": "b", "x-lora": "b+x-lora"}
        for name in ("y", "x-lora"):
            with pytest.raises(ConflictError, match=f"'{name}' is served already"):
                await fleet.load(ModelSpec(model="c", served_model_name=("c", name)))
            with pytest.raises(ConflictError, match=f"'{name}' is served already"):
                await fleet.switch("a", ModelSpec(model="c", adapters={name: None}))
        assert "c" not in fleet.models
        await fleet.unload("y")
        assert dict(fleet.models) == {"a": "a"}
    first = await machine.build(ModelSpec(model="a", served_model_name=("p", "q")))
    second = await machine.build(ModelSpec(model="b", adapters={"q": None}))
    with pytest.raises(ConfigError, match="two of them are named 'q'"):
        await Fleet(machine.build, available_memory=lambda: 9, drain_timeout_s=5).start([first, second])


async def test_an_adapter_comes_and_goes_with_its_model() -> None:
    machine = FakeMachine()
    async with serving(machine) as fleet:
        await fleet.load(ModelSpec(model="a", served_model_name=("n", "o"), adapters={"l": None, "m": None}))
        for change in (fleet.unload("l"), fleet.switch("l", ModelSpec(model="b"))):
            with pytest.raises(ConflictError, match="'l' is an adapter of 'n', and comes and goes with it"):
                await change
        await fleet.switch("n", ModelSpec(model="b", adapters={"m": None}))
        assert dict(fleet.models) == {"b": "b", "m": "b+m", "n": "b", "o": "b"}
        await fleet.switch("o", ModelSpec(model="c"), drops=["n"])
        assert dict(fleet.models) == {"c": "c", "b": "c", "o": "c"}


async def test_names_change_and_engines_do_not_notice() -> None:
    machine = FakeMachine()
    async with serving(machine, "a", "b") as fleet:
        running = asyncio.create_task(answer(machine.dispatchers["a"]))
        await asyncio.sleep(0.02)
        renamed = ModelSpec(model="a", served_model_name=("a", "z"))
        fleet.amend("a", renamed, lambda served: served.upper())
        assert dict(fleet.models) == {"b": "b", "a": "A", "z": "A"}
        assert fleet.spec("z") == renamed
        with pytest.raises(ConflictError, match="'z' is served already"):
            fleet.amend("b", ModelSpec(model="b", served_model_name=("b", "z")), str)
        fleet.amend("z", ModelSpec(model="a"), str)
        assert dict(fleet.models) == {"b": "b", "a": "A"}
        loading = asyncio.create_task(fleet.load(ModelSpec(model="c")))
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="are being loaded"):
            fleet.amend("a", renamed, str)
        await loading
        assert await running == SCRIPTS["a"]


async def test_and_comes_back_whatever_it_was() -> None:
    machine = FakeMachine(memory_bytes=6)
    machine.broken = {"b"}
    async with serving(machine, "a") as fleet:
        switching = asyncio.create_task(fleet.switch("a", ModelSpec(model="b")))
        await asyncio.sleep(0)
        FakeEngine.failure = OSError("disk full")
        try:
            with pytest.raises(EngineStartError, match="disk full"):
                await switching
        finally:
            FakeEngine.failure = EngineStartError("damaged")
        assert await answer(machine.dispatchers["a"]) == SCRIPTS["a"]


async def test_nothing_is_changed_while_a_server_starts() -> None:
    machine = FakeMachine()
    fleet = Fleet(machine.build, available_memory=machine.available_bytes, drain_timeout_s=5)
    starting = asyncio.create_task(fleet.start([await machine.build(ModelSpec(model=name)) for name in "ab"]))
    await asyncio.sleep(0)
    with pytest.raises(ConflictError, match="are being loaded"):
        await fleet.unload("a")
    await starting
    await fleet.stop()
    assert all(engine.is_stopped for engine in machine.engines)
