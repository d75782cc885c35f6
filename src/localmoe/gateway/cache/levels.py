"""Levels as one cache: the fastest that has an entry gives it, and those before it keep it from then on."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from localmoe.gateway.cache.memory import MemoryLevel

logger = logging.getLogger(__name__)

_MAX_PENDING_BYTES = 16 * 2**20
"""Of entries on their way to slower levels; further ones are not kept there."""


class SlowLevel(Protocol):
    """A level outside this process's memory. Nothing it does raises, and reading takes a moment at most."""

    name: str

    async def start(self) -> None:
        """Begin to use it."""
        ...

    async def stop(self) -> None:
        """Let go of it."""
        ...

    async def get(self, key: bytes) -> bytes | None:
        """What is kept under the key, if it can be had."""
        ...

    async def put(self, key: bytes, data: bytes) -> None:
        """Keep it, if it can be."""
        ...


@dataclass(frozen=True)
class Found:
    """An entry."""

    data: bytes
    level: str
    """Where it was."""


class Cache:
    """Keeps data under keys of 32 bytes.

    Args:
        slow_levels: the fastest first.
        max_entry_bytes: larger ones are not kept.
    """

    def __init__(self, memory: MemoryLevel, slow_levels: Sequence[SlowLevel], *, max_entry_bytes: int) -> None:
        self._memory = memory
        self._slow_levels = slow_levels
        self.max_entry_bytes = max_entry_bytes
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending_bytes = 0

    async def start(self) -> None:
        """Begin to use the slow levels, each when it is ready."""
        for level in self._slow_levels:
            self._in_background(level.start, 0)

    async def stop(self) -> None:
        """Give up what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for level in self._slow_levels:
            await level.stop()

    async def get(self, key: bytes) -> Found | None:
        """What is kept under the key."""
        if (data := self._memory.get(key)) is not None:
            return Found(data, self._memory.name)
        for place, level in enumerate(self._slow_levels):
            if (data := await level.get(key)) is not None:
                self._memory.put(key, data)
                self._put_slow(key, data, self._slow_levels[:place])
                return Found(data, level.name)
        return None

    def put(self, key: bytes, data: bytes) -> None:
        """Keep it; in memory at once, elsewhere soon."""
        if len(data) > self.max_entry_bytes:
            return
        self._memory.put(key, data)
        self._put_slow(key, data, self._slow_levels)

    def _put_slow(self, key: bytes, data: bytes, levels: Sequence[SlowLevel]) -> None:
        for level in levels:
            if self._pending_bytes + len(data) <= _MAX_PENDING_BYTES:
                self._in_background(partial(level.put, key, data), len(data))

    def _in_background(self, work: Callable[[], Awaitable[None]], num_bytes: int) -> None:
        async def run() -> None:
            try:
                await work()
            except Exception:  # a cache is never in the way
                logger.exception("a level of the cache failed")

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._pending_bytes -= num_bytes

        self._pending_bytes += num_bytes
        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(ended)
