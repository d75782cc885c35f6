"""Clients that leave at every moment."""

import asyncio
from typing import Any

import pytest

from localmoe.gateway.answering.disconnect import run_until_disconnect

GONE = {"type": "http.disconnect"}


class FakeConnection:
    """Of a client that leaves when told to."""

    def __init__(self) -> None:
        self.message: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def receive(self) -> dict[str, Any]:
        return await self.message


def num_cancels() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_the_result_is_that_of_the_work() -> None:
    async def work() -> str:
        await asyncio.sleep(0)
        return "done"

    assert await run_until_disconnect(FakeConnection().receive, work()) == "done"


@pytest.mark.parametrize("turns", range(4))
async def test_a_client_that_leaves_as_the_work_ends_cancels_nothing_later(turns: int) -> None:
    connection, result = FakeConnection(), asyncio.get_running_loop().create_future()

    async def work() -> Any:
        return await result

    async def end_both() -> None:
        for _ in range(3):
            await asyncio.sleep(0)
        connection.message.set_result(GONE)
        for _ in range(turns):
            await asyncio.sleep(0)
        if not result.done():
            result.set_result("done")

    ending = asyncio.create_task(end_both())
    assert await run_until_disconnect(connection.receive, work()) in ("done", None)
    for _ in range(5):
        await asyncio.sleep(0)
    await ending
    assert num_cancels() == 0


async def test_work_that_swallows_its_cancellation_gives_its_result() -> None:
    connection = FakeConnection()

    async def work() -> str:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            return "all the same"
        return ""

    asyncio.get_running_loop().call_soon(connection.message.set_result, GONE)
    assert await run_until_disconnect(connection.receive, work()) == "all the same"
    assert num_cancels() == 0


async def test_who_is_cancelled_by_others_too_is_cancelled() -> None:
    connection, cleaned = FakeConnection(), asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(10)
        finally:
            cleaned.set()

    task = asyncio.create_task(run_until_disconnect(connection.receive, work()))
    await asyncio.sleep(0)
    connection.message.set_result(GONE)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned.is_set()


async def test_in_a_task_that_was_cancelled_before_a_client_may_leave() -> None:
    connection = FakeConnection()

    async def leave_late() -> None:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            connection.message.set_result(GONE)
            assert await run_until_disconnect(connection.receive, asyncio.sleep(10)) is None
            raise

    task = asyncio.create_task(leave_late())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
