"""Reads extents of files into host memory, past the page cache, while the caller computes.

`submit` begins reads and `collect` says which have ended; a read's key is its ticket. The memory of a read is the
reader's until `collect` reports it, `cancel` drops it, or `close` returns.

What the kernel refuses costs speed, never correctness: direct reads, io_uring and registered memory each have
something to fall back on, and each choice is logged with its reason.
"""

import contextlib
import ctypes
import errno
import fcntl
import logging
import mmap
import os
import random
import stat
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from localmoe.core.errors import StoreError
from localmoe.tiers.config import MAX_QUEUE_DEPTH, DiskConfig

if TYPE_CHECKING:
    # Imported where it is used: a model that fits in memory is served without the extension, too.
    from localmoe._cpu import DiskReader as Reader

logger = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

_DEPTHS = (2, 4, 8, 16, 32)
_USUAL_DEPTH = 16
"""Where measuring says nothing: files that are small or come from the page cache."""
_DEPTH_TOLERANCE = 0.15
"""What a deeper queue must bring to be worth it: the kernel serves all it has at once, so what was read ahead slows
what a layer waits for. Where 2 kept the disk busy, 4 cost 3 to 4 % of a decode step, 8 another 7 to 17 %."""
_MEASURE_S = 0.6
_MEASURE_PASSES = 6
_LEAST_MEASURED_BYTES = 256 << 20
_SLICE_S = 0.25
"""Waits are cut so that Ctrl-C is heard."""


@dataclass(frozen=True, kw_only=True)
class Read(Generic[K]):
    """One extent to read. For a direct file, offset, size and address are multiples of 4096."""

    key: K
    """Names the read while it is under way."""
    offset: int
    num_bytes: int
    buffer: torch.Tensor
    """uint8, contiguous, at least `num_bytes` long."""
    file: int = 0
    """Index into the paths that were opened."""


@dataclass(frozen=True, kw_only=True)
class Done(Generic[K]):
    """A read that has ended."""

    key: K
    buffer: torch.Tensor
    error: str | None
    """What went wrong, beginning with the path; the buffer's content is then undefined."""


@dataclass(frozen=True, kw_only=True)
class DiskStats:
    """What a reader has done so far."""

    num_reads: int
    """Reads that ended well."""
    bytes_read: int
    busy_s: float
    """Time with at least one read under way, as far as `submit` and `collect` noticed."""
    in_flight: int
    """Reads under way."""


@dataclass(frozen=True)
class _File:
    path: Path
    descriptor: int
    num_bytes: int
    refusal: str | None
    """Why reads are not direct; None: they are."""


class DiskReader(Generic[K]):
    """Reads from a fixed list of files. One thread uses it at a time; `close` may come from another."""

    def __init__(
        self, files: Sequence[_File], reader: "Reader", method: str, queue_depth: int, timeout_s: float
    ) -> None:
        self._reader = reader  # first, so that it is the first to go: reads must end before their buffers do
        self._files = files
        self._method = method
        self._timeout_s = timeout_s
        self.queue_depth = queue_depth
        """Of each disk, as configured or as measured."""
        self._pending: dict[int, Read[K]] = {}
        """By tag; keeps buffers alive."""
        self._tags: dict[K, int] = {}
        self._next_tag = 0
        self._registered: tuple[torch.Tensor, ...] = ()

    @classmethod
    def open(cls, paths: Sequence[Path], config: DiskConfig) -> Self:
        """Open files and settle how they are read best.

        Raises:
            StoreError: a file cannot be opened or read, or `config.method` is refused.
        """
        files: list[_File] = []
        try:
            for path in paths:
                files.append(_open(path))  # noqa: PERF401 - what is open must be closed if the next one fails
            method, reason = _choose_method(files[0], config)
            depth, measured = config.queue_depth, "as configured"
            if depth is None:
                depth, measured = _choose_depth(files[0], method, config)  # a stripe has holes, which are no disk
            num_disks = len({os.fstat(file.descriptor).st_dev for file in files})
            reader = _make_reader(files, method, min(depth * num_disks, MAX_QUEUE_DEPTH), config)
        except BaseException:
            _close(files)
            raise
        logger.info(
            "reads %s by %s (%s), %s, queue depth %d (%s)",
            ", ".join(str(path) for path in paths),
            method,
            reason,
            "; ".join(sorted({f"buffered ({file.refusal})" if file.refusal else "direct" for file in files})),
            depth,
            measured,
        )
        return cls(files, reader, method, depth, config.timeout_s)

    def close(self) -> None:
        """Drop what has not begun, wait for the rest, and give up the files."""
        self._reader.close()
        self._pending.clear()
        self._tags.clear()
        self._registered = ()
        _close(self._files)
        self._files = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(self, *memories: torch.Tensor) -> bool:
        """Pin memory that reads go to, in place of what was registered before; False where that is refused.

        Not while reads are under way. Pages given back to the system later stay in use until this is called again.
        """
        number = self._reader.register_buffers([(memory.data_ptr(), memory.nbytes) for memory in memories])
        self._registered = () if number else memories
        num_bytes = sum(memory.nbytes for memory in memories)
        if number:
            reason = "RLIMIT_MEMLOCK may be too low" if number == errno.ENOMEM else os.strerror(number)
            logger.info("%d bytes of memory are not registered with %s: %s", num_bytes, self._method, reason)
        else:
            logger.info("%d bytes of memory are registered with %s", num_bytes, self._method)
        return number == 0

    def submit(self, reads: Iterable[Read[K]]) -> None:
        """Begin reads, in this order, after those that were submitted before."""
        entries = []
        for read in reads:
            assert read.key not in self._tags, "a key names one read at a time"
            buffer = read.buffer
            assert buffer.dtype == torch.uint8, "buffers are bytes"
            assert buffer.is_contiguous(), "a buffer is one run of bytes"
            assert buffer.nbytes >= read.num_bytes, "the buffer is too small"
            tag = self._next_tag
            self._next_tag += 1
            self._pending[tag] = read
            self._tags[read.key] = tag
            entries.append((tag, read.file, read.offset, read.num_bytes, buffer.data_ptr()))
        self._reader.submit(entries)

    def collect(self, wait: bool) -> list[Done[K]]:
        """The reads that have ended since the last call.

        Args:
            wait: until at least one has ended, if any is under way. Else just look, and keep the disk busy.

        Raises:
            StoreError: nothing has ended for `config.timeout_s`.
        """
        results = self._reader.wait(0, 0.0)
        deadline = time.monotonic() + self._timeout_s
        while wait and not results and self._pending:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                paths = ", ".join(str(file.path) for file in self._files)
                raise StoreError(
                    f"{paths}: {len(self._pending)} reads wait and none ended in {self._timeout_s:g} s"
                )
            results = self._reader.wait(1, min(left_s, _SLICE_S))
        return [self._finish(tag, status) for tag, status in results]

    def cancel(self, keys: Iterable[K]) -> list[K]:
        """Drop the reads that have not begun, and return their keys; `collect` will report the others."""
        tags = self._reader.cancel([self._tags[key] for key in keys if key in self._tags])
        dropped = [self._pending.pop(tag).key for tag in tags]
        for key in dropped:
            del self._tags[key]
        return dropped

    def stats(self) -> DiskStats:
        """Counters since the reader was opened."""
        reader = self._reader
        return DiskStats(
            num_reads=reader.num_reads,
            bytes_read=reader.bytes_read,
            busy_s=reader.busy_s,
            in_flight=reader.in_flight,
        )

    def _finish(self, tag: int, status: int) -> Done[K]:
        read = self._pending.pop(tag)
        del self._tags[read.key]
        file = self._files[read.file]
        if file.refusal and status == 0:
            # It was read for our own memory; a second copy in the page cache would be waste.
            os.posix_fadvise(file.descriptor, read.offset, read.num_bytes, os.POSIX_FADV_DONTNEED)
        return Done(
            key=read.key,
            buffer=read.buffer[: read.num_bytes],
            error=_describe(file.path, read, status) if status else None,
        )


def _describe(path: Path, read: Read[K], status: int) -> str:
    from localmoe._cpu import END_OF_FILE

    if status == END_OF_FILE:
        return f"{path}: ends before byte {read.offset + read.num_bytes}; the file has shrunk"
    return f"{path}: reading {read.num_bytes} bytes at {read.offset} failed: {os.strerror(status)}"


def _open(path: Path) -> _File:
    """Open for direct reads, or for buffered ones where the file system has no others. Raises StoreError."""
    try:
        # Non-blocking, so that a named pipe cannot hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path}: cannot be opened: it is not a file")
        return _File(path, descriptor, status.st_size, _refusal_of_direct_reads(descriptor))
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, OSError):
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        raise


def _refusal_of_direct_reads(descriptor: int) -> str | None:
    """Make a descriptor's reads direct, or say why that cannot be. In both cases they block."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
        # Some file systems take the flag and refuse the reads.
        os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        return None
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        refusal = f"O_DIRECT: {error.strerror}"
    fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
    # Reading ahead of large random reads is waste.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return refusal


def _close(files: Sequence[_File]) -> None:
    for file in files:
        os.close(file.descriptor)


def _make_reader(files: Sequence[_File], method: str, depth: int, config: DiskConfig) -> "Reader":
    try:
        from localmoe._cpu import DiskReader as Reader
    except ImportError as error:
        raise StoreError(
            f"{files[0].path}: does not fit in memory, and to read it piece by piece takes the C++ extension, which "
            f"was not built for want of a compiler: {error}"
        ) from error
    try:
        return Reader([file.descriptor for file in files], depth, method, config.piece_bytes)
    except RuntimeError as error:
        raise StoreError(f"{files[0].path}: cannot be read by {method}: {error}") from error


def _choose_method(file: _File, config: DiskConfig) -> tuple[str, str]:
    """A method that has been seen to read, and why that one. Raises StoreError."""
    if config.method != "auto":
        _try_reading(file, config.method, config)
        return config.method, "as configured"
    try:
        _try_reading(file, "io_uring", config)
        return "io_uring", "it works"
    except StoreError as error:
        _try_reading(file, "threads", config)
        return "threads", str(error)


def _try_reading(file: _File, method: str, config: DiskConfig) -> None:
    """Read one page. Raises StoreError."""
    memory = mmap.mmap(-1, mmap.PAGESIZE)
    reader = _make_reader([file], method, 1, config)
    from localmoe._cpu import END_OF_FILE

    try:
        reader.submit([(0, 0, 0, mmap.PAGESIZE, _address(memory))])
        results = reader.wait(1, config.timeout_s)
    finally:
        reader.close()
    status = results[0][1] if results else errno.ETIMEDOUT
    if status not in (0, END_OF_FILE):
        raise StoreError(f"{file.path}: cannot be read by {method}: {os.strerror(status)}")


def _choose_depth(file: _File, method: str, config: DiskConfig) -> tuple[int, str]:
    """The smallest depth that keeps the disk busy, and what was measured. Raises StoreError."""
    if file.refusal or file.num_bytes < max(_LEAST_MEASURED_BYTES, config.piece_bytes):
        return _USUAL_DEPTH, "not measured"
    speeds_PD = _measure_depths(file, method, config)
    # The disk's speed may change from one moment to the next; within a pass it is the same for all.
    relative_D = np.median(speeds_PD / (speeds_PD.mean(axis=1, keepdims=True) + 1), axis=0)
    is_enough_D = relative_D >= relative_D.max() * (1 - _DEPTH_TOLERANCE)
    typical_D = np.median(speeds_PD, axis=0)
    report = ", ".join(f"{depth}: {speed / 1e9:.2f} GB/s" for depth, speed in zip(_DEPTHS, typical_D, strict=True))
    return _DEPTHS[int(is_enough_D.argmax())], report


def _measure_depths(file: _File, method: str, config: DiskConfig) -> NDArray[np.float64]:
    """Bytes a second of random reads, one piece each, [passes, depths]. Raises StoreError."""
    memory = mmap.mmap(-1, config.piece_bytes)  # the reads may overwrite one another
    with contextlib.suppress(OSError):  # as arenas are, where the kernel has huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = _address(memory)
    num_places = file.num_bytes // config.piece_bytes
    reader = _make_reader([file], method, max(_DEPTHS), config)
    speeds_PD = np.zeros((_MEASURE_PASSES, len(_DEPTHS)))
    window_s = _MEASURE_S / speeds_PD.size
    num_in_flight = 0
    try:
        for number, speeds_D in enumerate(speeds_PD):
            # Up and down again, so that little is under way when the next depth begins.
            order = range(len(_DEPTHS)) if number % 2 == 0 else reversed(range(len(_DEPTHS)))
            for index in order:
                num_done = 0
                start = time.monotonic()
                while (elapsed_s := time.monotonic() - start) < window_s:
                    pages = [random.randrange(num_places) for _ in range(_DEPTHS[index] - num_in_flight)]
                    reader.submit(
                        [(0, 0, page * config.piece_bytes, config.piece_bytes, address) for page in pages]
                    )
                    results = reader.wait(1, window_s - elapsed_s)
                    num_in_flight += len(pages) - len(results)
                    num_done += len(results)
                    if any(status for _, status in results):
                        raise StoreError(f"{file.path}: reading failed while its speed was measured")
                speeds_D[index] = num_done * config.piece_bytes / elapsed_s
    finally:
        reader.close()
    return speeds_PD


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
