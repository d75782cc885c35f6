"""One timer for all the waits of an answer."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress

import pytest

from localmoe.dispatch.silence import SilenceTimer


class TooSilentError(Exception):
    pass


async def numbers(*delays_s: float) -> AsyncGenerator[int, None]:
    for number, delay_s in enumerate(delays_s):
        await asyncio.sleep(delay_s)
        yield number


async def read(silence: SilenceTimer, chunks: AsyncGenerator[int, None]) -> int | None:
    silence.begin()
    try:
        chunk = await anext(chunks, None)
    except asyncio.CancelledError:
        limit_s = silence.exceeded()
        if limit_s is None:
            raise
        raise TooSilentError(limit_s) from None
    silence.end()
    return chunk


def timer(limit_s: Callable[[float], float]) -> SilenceTimer:
    return SilenceTimer(limit_s, clock=asyncio.get_running_loop().time)


async def test_each_wait_has_the_whole_time() -> None:
    silence = timer(lambda since_s: 0.2)
    chunks = numbers(0.12, 0.12, 0.12)
    assert [await read(silence, chunks) for _ in range(4)] == [0, 1, 2, None]
    silence.close()


async def test_what_does_not_come_is_given_up_and_nothing_else_is_cancelled() -> None:
    silence = timer(lambda since_s: 0.1)
    chunks = numbers(0.0, 60.0)
    assert await read(silence, chunks) == 0
    began_s = asyncio.get_running_loop().time()
    with pytest.raises(TooSilentError, match=r"0\.1"):
        await read(silence, chunks)
    assert 0.09 < asyncio.get_running_loop().time() - began_s < 5
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.sleep(0)


async def test_where_an_engine_makes_an_error_of_it_the_task_is_not_left_cancelled() -> None:
    silence = timer(lambda since_s: 0.01)
    silence.begin()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(60)
    silence.close()
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_the_time_between_waits_does_not_count() -> None:
    silence = timer(lambda since_s: 0.1)
    chunks = numbers(0.0, 0.05)
    assert await read(silence, chunks) == 0
    await asyncio.sleep(0.15)  # the timer fires while nobody waits
    assert await read(silence, chunks) == 1
    silence.close()


async def test_a_limit_that_shrinks_to_nothing() -> None:
    """As a deadline does, however fast chunks come."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + 0.1
    silence = timer(lambda since_s: deadline_s - since_s)
    async with aclosing(numbers(*([0.001] * 100_000))) as chunks:

        async def read_all() -> None:
            while await read(silence, chunks) is not None:
                pass

        with pytest.raises(TooSilentError):
            await read_all()
    assert 0.0 <= loop.time() - deadline_s < 5


async def test_who_cancels_the_task_is_obeyed() -> None:
    silence = timer(lambda since_s: 60.0)
    task = asyncio.create_task(read(silence, numbers(60.0)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    silence.close()
