"""The level on disk: a file for each entry.

What is not there, is damaged or cannot be read in a moment is not in the cache, and what cannot be written is not
kept: nothing that happens to the disk is any request's business. Entries are not made to outlive a loss of power
one by one, since their checksums tell.
"""

import asyncio
import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from localmoe.gateway.cache.sealed import SEAL_BYTES, seal, unseal

logger = logging.getLogger(__name__)

_NUM_THREADS = 2
_READ_TIMEOUT_S = 0.25
_PAUSE_S = 60.0
"""After a failure to write, nothing is written for so long."""
_BLOCK_BYTES = 4096
"""Files take whole blocks."""
_ENTRY, _UNFINISHED = ".entry", ".part"

T = TypeVar("T")


class DiskLevel:
    """Keeps entries in a directory.

    Args:
        max_bytes: of all entries together; those used least lately go first.
        max_entry_bytes: larger ones are not read.
    """

    name = "disk"

    def __init__(self, directory: Path, *, max_bytes: int, ttl_s: float, max_entry_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._max_file_bytes = max_entry_bytes + SEAL_BYTES
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="cache-disk")
        self._sizes: OrderedDict[str, int] = OrderedDict()
        """Of files by name, the one used least lately first."""
        self._num_bytes = 0
        self._paused_until_s = 0.0
        self._num_reads = 0

    async def start(self) -> None:
        """Find out what is there."""
        for name, size in await self._in_thread(self._scan):
            self._note(name, size)
        await self._evict()

    async def stop(self) -> None:
        """Let go of it."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def get(self, key: bytes) -> bytes | None:
        """What is kept under the key."""
        name = key.hex() + _ENTRY
        # When the threads are busy, waiting for them could take longer than an answer.
        if name not in self._sizes or self._num_reads >= 4 * _NUM_THREADS:
            return None
        self._num_reads += 1
        reading = self._in_thread(lambda: self._read(name))
        reading.add_done_callback(self._read_ended)
        try:
            async with asyncio.timeout(_READ_TIMEOUT_S):
                data = await asyncio.shield(reading)
        except TimeoutError:
            return None
        if data is None:
            self._forget(name)
        elif name in self._sizes:
            self._sizes.move_to_end(name)
        return data

    async def put(self, key: bytes, data: bytes) -> None:
        """Keep it, in place of what was used least lately."""
        if time.monotonic() < self._paused_until_s:
            return
        name = key.hex() + _ENTRY
        sealed = seal(data, time.time())
        try:
            await self._in_thread(lambda: self._write(name, sealed))
        except OSError as error:
            self._paused_until_s = time.monotonic() + _PAUSE_S
            logger.warning(
                "the cache writes nothing to %s for %g s: %s", self._directory, _PAUSE_S, error.strerror
            )
            return
        self._note(name, len(sealed))
        await self._evict()

    def _read_ended(self, reading: "asyncio.Future[bytes | None]") -> None:
        self._num_reads -= 1
        if not reading.cancelled():
            reading.exception()  # looked at: nobody may be waiting any more

    def _note(self, name: str, size: int) -> None:
        self._forget(name)
        self._sizes[name] = size
        self._num_bytes += _taken(size)

    def _forget(self, name: str) -> None:
        self._num_bytes -= _taken(self._sizes.pop(name, 0))

    async def _evict(self) -> None:
        gone = []
        while self._num_bytes > self._max_bytes:
            name = next(iter(self._sizes))
            self._forget(name)
            gone.append(name)
        if gone:
            await self._in_thread(lambda: self._remove(gone))

    def _in_thread(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._threads, function)

    def _path(self, name: str) -> Path:
        return self._directory / name[:2] / name

    def _read(self, name: str) -> bytes | None:
        """The entry; one that is of no use to anybody is removed."""
        path = self._path(name)
        data = None
        with suppress(OSError):
            with open(path, "rb") as file:
                data = unseal(file.read(self._max_file_bytes + 1), now_s=time.time(), ttl_s=self._ttl_s)
            if data is not None:
                os.utime(path)  # so that it is known after a restart what was used last
        if data is None:
            self._remove([name])
        return data

    def _write(self, name: str, sealed: bytes) -> None:
        path = self._path(name)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = path.with_name(uuid.uuid4().hex + _UNFINISHED)
        try:
            with open(unfinished, "xb") as file:
                file.write(sealed)
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise

    def _remove(self, names: list[str]) -> None:
        for name in names:
            with suppress(OSError):
                self._path(name).unlink(missing_ok=True)

    def _scan(self) -> list[tuple[str, int]]:
        """Names and sizes, the one used least lately first; what was left half written is removed."""
        found = []
        with suppress(OSError):
            for path in self._directory.glob("*/*"):
                with suppress(OSError):
                    if path.suffix == _ENTRY:
                        status = path.stat()
                        found.append((status.st_mtime, path.name, status.st_size))
                    elif path.suffix == _UNFINISHED:
                        path.unlink(missing_ok=True)
        return [(name, size) for _, name, size in sorted(found)]


def _taken(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES
