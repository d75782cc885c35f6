"""Embeddings from several engines: who gets them, what a failure costs, and what is not learned from them."""

from contextlib import aclosing

import msgspec
import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import EngineDiedError, InvalidRequestError
from localmoe.core.request import Request, TokenChunk
from localmoe.dispatch.dispatcher import Dispatcher
from support.dispatching import dispatching
from support.models import greedy, to_embed

PROMPT = list(range(200))
"""Of more than a block of those that are remembered."""


class FakeGenerator(ScriptedBackend):
    """Gives no embeddings."""

    def refusal(self, request: Request) -> str | None:
        return "it gives no embeddings; others do" if request.embed else None


async def chunks_of(dispatcher: Dispatcher, asked: Request) -> list[TokenChunk]:
    async with aclosing(dispatcher.generate(asked)) as chunks:
        return [chunk async for chunk in chunks]


async def test_engines_that_give_none_are_not_asked() -> None:
    engines = {"a": FakeGenerator([7]), "b": ScriptedBackend([7]), "c": FakeGenerator([7])}
    async with dispatching(engines) as (dispatcher, _):
        for _ in range(4):
            [chunk] = await chunks_of(dispatcher, to_embed("e", PROMPT))
            assert chunk.embedding is not None


async def test_where_all_give_none_the_client_is_told_who_would() -> None:
    async with dispatching({"a": FakeGenerator([7])}) as (dispatcher, _):
        with pytest.raises(InvalidRequestError, match="it gives no embeddings; others do"):
            await chunks_of(dispatcher, to_embed("e", PROMPT))


async def test_one_that_dies_is_replaced_by_another() -> None:
    dies = ScriptedBackend([7], failure=ScriptedFailure(error=EngineDiedError("killed")))
    async with dispatching({"a": dies, "b": ScriptedBackend([7])}) as (dispatcher, _):
        [chunk] = await chunks_of(dispatcher, to_embed("e", PROMPT))
    assert chunk.embedding is not None


async def test_they_say_nothing_of_answers_lengths_and_leave_no_prefixes() -> None:
    async with dispatching({"a": ScriptedBackend([7] * 40)}) as (dispatcher, _):
        answer = greedy("g", PROMPT, 100)
        await chunks_of(dispatcher, answer)
        before = dispatcher._load(answer)
        for _ in range(50):
            await chunks_of(dispatcher, to_embed("e", [1000 + token for token in PROMPT]))
        assert dispatcher._load(answer) == before
        assert before.known_tokens == {"a": 192}
        other = msgspec.structs.replace(answer, prompt_ids=[1000 + token for token in PROMPT])
        assert dispatcher._load(other).known_tokens == {}
        assert dispatcher._load(to_embed("e", PROMPT)).known_tokens == {}
