"""Work that ends when the client leaves.

The task that answers a request is cancelled, as `asyncio.timeout` does it. In a cancel scope it could not await any
more while it cleans up, which closing an engine's stream needs.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of `work`; None if the client left first, after `work` was cancelled and has cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    num_cancels, has_left = task.cancelling(), False

    async def watch() -> None:
        nonlocal has_left
        while (await receive())["type"] != "http.disconnect":
            pass
        has_left = True  # in one step with what follows: a cancel must not come when the work is over
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if has_left and task.cancelling() == num_cancels + 1:
            return None
        raise  # others want us to end, too
    finally:
        watching.cancel()
        if has_left:
            task.uncancel()
