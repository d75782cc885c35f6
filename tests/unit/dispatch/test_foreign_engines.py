"""Engines of other packages, which may raise anything."""

import msgspec
import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import BackendUnavailableError, EngineStartError
from support.dispatching import dispatching
from support.models import greedy

SCRIPT = [100, 101, 102]


class FakeUnforeseenBackend(ScriptedBackend):
    async def start(self) -> None:
        raise KeyError("a typing error")


async def test_one_that_fails_to_start_in_a_way_of_its_own_is_done_without() -> None:
    async with dispatching({"a": FakeUnforeseenBackend([]), "b": ScriptedBackend(SCRIPT)}) as (dispatcher, _):
        chunks = [chunk async for chunk in dispatcher.generate(greedy("a", [5]))]
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == SCRIPT
        with pytest.raises(BackendUnavailableError, match="a could not be started: 'a typing error'"):
            await anext(dispatcher.generate(msgspec.structs.replace(greedy("a", [5]), engine="a")))


async def test_alone_it_stops_the_start() -> None:
    with pytest.raises(EngineStartError, match="a typing error"):
        async with dispatching({"a": FakeUnforeseenBackend([])}):
            pass
