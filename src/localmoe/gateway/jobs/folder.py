"""Files that clients keep here, or that are made for them: their contents, in one directory, and what is known of
them.

A file is written under a name of its own kind, and gets its true one when it is complete; it is there for clients
once the store knows it. What is left of files that did not get so far is removed a day later.
"""

import asyncio
import errno
import logging
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from localmoe.core.errors import QuotaExceededError, StorageError, StorageFullError
from localmoe.core.jobs import FileRecord, FileStore

logger = logging.getLogger(__name__)

_BUFFER_BYTES = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ABANDONED_S = 24 * 3600.0
_TIDY_EVERY_S = 3600.0
_UNFINISHED = ".part"
_OURS = re.compile(r"file-[0-9a-f]{32}(-[0-9a-f]{32}\.part)?")
"""Nothing else is ever removed: the directory may be anybody's."""
_AT_ONCE = 500


class FileFolder:
    """Keeps files.

    Args:
        store: what is known of them.
        directory: made if it is not there. Gateways that share a store share it, too.
        max_owner_bytes: that one owner's may take together.
    """

    def __init__(self, store: FileStore, directory: Path, *, max_owner_bytes: int) -> None:
        self.store = store
        self.max_owner_bytes = max_owner_bytes
        self._directory = directory
        self._next_tidy_s = 0.0
        self._coming_bytes: Counter[str] = Counter()
        """By owner, of files that are being written."""

    def path(self, file_id: str) -> Path:
        """Where a file's contents are. The id is one that the store knows, never merely what a client has sent."""
        return self._directory / file_id

    @asynccontextmanager
    async def upload(self, file_id: str, owner_id: str, *, least_bytes: int) -> AsyncIterator["FileWriter"]:
        """A new file of a client's, as `write`.

        Args:
            least_bytes: that it has, as far as is known before it comes.

        Raises:
            QuotaExceededError: with it, and all that come at the same time, the owner would have too much. The writer
                raises it, too.
        """
        left_bytes = self.max_owner_bytes - await self.store.num_bytes(owner_id)
        taken_bytes = 0

        def take(num_bytes: int) -> None:
            nonlocal taken_bytes
            more = max(0, num_bytes - taken_bytes)
            if self._coming_bytes[owner_id] + more > left_bytes:
                raise QuotaExceededError(
                    f"with this file, yours would be more than the {self.max_owner_bytes} bytes that you may keep"
                    " here; delete some first"
                )
            self._coming_bytes[owner_id] += more
            taken_bytes += more

        try:
            take(least_bytes)
            async with self.write(file_id, take=take) as writer:
                yield writer
        finally:
            self._coming_bytes[owner_id] -= taken_bytes
            self._coming_bytes += Counter()  # without those that have nothing

    @asynccontextmanager
    async def write(
        self, file_id: str, *, take: Callable[[int], None] = lambda num_bytes: None
    ) -> AsyncIterator["FileWriter"]:
        """A new file, which is there when the block ends, and is not if that raises.

        Args:
            take: told how many bytes it is to have before they are written; may refuse them.

        Raises:
            StorageFullError: there is no room for it.
            StorageError: it cannot be written.
        """
        unfinished = self._directory / f"{file_id}-{uuid.uuid4().hex}{_UNFINISHED}"
        writer = FileWriter(await asyncio.to_thread(_create, unfinished), take)
        try:
            yield writer
            await writer.finish()
            with _explained():
                await asyncio.to_thread(_publish, unfinished, self.path(file_id))
        except BaseException:
            await asyncio.to_thread(writer.discard, unfinished)
            raise

    async def add(self, record: FileRecord) -> None:
        """Let a client's file that was written be known.

        Raises:
            QuotaExceededError: the owner has no room for it. It is removed then.
        """
        try:
            await self.store.add(record, max_owner_bytes=self.max_owner_bytes)
        except (QuotaExceededError, StorageFullError):  # after other failures it may be known all the same
            await self.remove(record.id)
            raise

    async def delete(self, file_id: str) -> None:
        """Forget a file, and remove its contents."""
        await self.store.delete(file_id)
        await self.remove(file_id)

    async def remove(self, file_id: str) -> None:
        """Remove contents."""
        try:
            await asyncio.to_thread(self.path(file_id).unlink, missing_ok=True)
        except OSError as error:  # it is swept up later
            logger.warning("cannot remove file %s: %s", file_id, error)

    async def sweep(self) -> None:
        """Remove files whose time is over; now and then also what was never finished, or is not known, and a day
        old. Raises StorageError."""
        for file_id in await self.store.delete_expired():
            await self.remove(file_id)
        if time.monotonic() >= self._next_tidy_s:
            self._next_tidy_s = time.monotonic() + _TIDY_EVERY_S
            old = await asyncio.to_thread(self._old_names, time.time() - _ABANDONED_S)
            for first in range(0, len(old), _AT_ONCE):
                names = old[first : first + _AT_ONCE]
                for name in set(names) - await self.store.known(names):
                    await self.remove(name)

    def _old_names(self, before_s: float) -> list[str]:
        names = []
        with suppress(OSError), os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(OSError):  # it may be gone by now
                    if _OURS.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < before_s:
                        names.append(entry.name)
        return names


class FileWriter:
    """A file in the making."""

    def __init__(self, file: BinaryIO, take: Callable[[int], None]) -> None:
        self._file = file
        self._take = take
        self._pending = bytearray()
        self.num_bytes = 0

    async def write(self, data: bytes) -> None:
        """Append to it. Raises StorageError; see also `FileFolder.upload`."""
        self._take(self.num_bytes + len(data))
        self._pending += data
        self.num_bytes += len(data)
        if len(self._pending) >= _BUFFER_BYTES:
            await self._flush()

    async def finish(self) -> None:
        """Let it outlive a loss of power. Raises StorageError."""
        await self._flush()
        with _explained():
            await asyncio.to_thread(self._sync)

    def discard(self, path: Path) -> None:
        """Leave nothing of it."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            path.unlink(missing_ok=True)

    async def _flush(self) -> None:
        data, self._pending = self._pending, bytearray()
        with _explained():
            await asyncio.to_thread(self._write_all, data)

    def _write_all(self, data: bytearray) -> None:
        left = memoryview(data)
        while left:  # what fits on a disk that is nearly full is written without an error
            left = left[self._file.write(left) :]

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def new_file_id() -> str:
    """One that nobody can guess."""
    return f"file-{uuid.uuid4().hex}"


def _create(path: Path) -> BinaryIO:
    with _explained():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0)


def _publish(unfinished: Path, path: Path) -> None:
    """Give a file its name, so that it has it after a loss of power, too."""
    unfinished.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFullError(
                "the disk that files are kept on is full: make room on it; nothing was kept"
            ) from error
        raise StorageError(f"the file cannot be kept: {error.strerror}") from error
