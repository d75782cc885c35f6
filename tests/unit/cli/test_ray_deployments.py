"""How an engine in a cluster bundles what it sends."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from localmoe.cli.ray_deployments import _lists
from localmoe.core.errors import EngineDiedError
from localmoe.core.request import TokenChunk


def chunk(token_id: int) -> TokenChunk:
    return TokenChunk(request_id="a", token_ids=[token_id])


async def chunks(num: int, error: Exception | None = None) -> AsyncGenerator[TokenChunk, None]:
    for token_id in range(num):
        yield chunk(token_id)
        await asyncio.sleep(0)
    if error is not None:
        raise error


async def test_what_comes_within_a_pause_goes_together_but_the_first_and_the_end_at_once() -> None:
    async with asyncio.timeout(5):
        lists = [some async for some in _lists(chunks(10), lambda: 60.0)]
    assert [one for some in lists for one in some] == [chunk(token_id) for token_id in range(10)]
    assert lists[0] == [chunk(0)]
    assert len(lists) == 2


async def test_a_failure_comes_after_what_came_before_it() -> None:
    seen: list[TokenChunk] = []

    async def read() -> None:
        async for some in _lists(chunks(3, EngineDiedError("gone")), lambda: 0.001):
            seen.extend(some)

    with pytest.raises(EngineDiedError, match="gone"):
        await read()
    assert seen == [chunk(0), chunk(1), chunk(2)]


async def test_an_end_without_chunks_is_an_end() -> None:
    assert [some async for some in _lists(chunks(0), lambda: 60.0)] == []
