"""How long the event loop is held up."""

import asyncio
import time


async def longest_gap_share(task: "asyncio.Task[object]") -> float:
    """Of the time that a task takes, the longest during which nothing else could be done; near 1 where it holds up
    the event loop itself. Return when it is done."""
    began_s = time.monotonic()
    return await longest_gap_s(task) / (time.monotonic() - began_s)


async def longest_gap_s(task: "asyncio.Task[object]") -> float:
    """The longest time during which nothing but a task could be done. Return when it is done."""
    last_s = time.monotonic()
    longest_s = 0.0
    while not task.done():
        await asyncio.sleep(0.001)
        now_s = time.monotonic()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    return longest_s
