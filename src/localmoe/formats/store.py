"""The expert store: a whole model in one read-only file, each expert in one contiguous, checked blob.

`store_layout` says what lies where, `store_writer` makes such files. `Store` maps it into memory and
believes nothing in it that shape, format and checksums do not confirm.

Weights are views of the mapping: nothing is copied, processes share the pages, and the system may drop and reread
them. The mapping is private, so that even a stray write to a tensor would not reach the file. A tensor keeps the
whole mapping alive, after `Store.close`, too. Disk errors and a file cut short are found, as a StoreError, when an
extent is first checked; from then on touching a page that the disk cannot give any more, or that has been cut off
the file, ends the process with SIGBUS. Replacing a store by renaming, as the writer does, is harmless.
"""

import ctypes
import errno
import mmap
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Self

import torch
import xxhash

from localmoe.core.errors import ChecksumError, StoreError
from localmoe.core.model import ExpertId
from localmoe.formats.packed import PackedMatrix
from localmoe.formats.store_layout import (
    PREAMBLE_BYTES,
    DenseEntry,
    ExpertEntry,
    MatrixLayout,
    StoreHeader,
    blob_layout,
    dense_layout,
    header_length,
    parse_header,
)

_VERIFY_CHUNK_BYTES = 8 << 20
_MAP_NORESERVE = 0x4000
"""Lets a file larger than memory be mapped privately; named by Python's mmap from 3.13 on."""
_MADV_POPULATE_READ = 22
"""Linux 5.14 and later; not named by Python's mmap."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """One expert's matrices as stored."""

    gate: PackedMatrix
    """[F, D]: expert size × hidden size."""
    up: PackedMatrix
    """[F, D]"""
    down: PackedMatrix
    """[D, F]"""

    def dequantize(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gate [F, D], up [F, D] and down [D, F] as plain tensors."""
        return self.gate.dequantize(dtype), self.up.dequantize(dtype), self.down.dequantize(dtype)


class Store:
    """An open expert store. Reads may come from any number of threads; close it when none is under way."""

    def __init__(self, path: Path, file: FileIO, header: StoreHeader) -> None:
        self.path = path
        self.shape = header.shape
        self.weights = header.weights
        self.source = header.source
        self.total_bytes = header.file_bytes
        self._file = file
        self._content: torch.Tensor | None = _map(path, file, header.file_bytes)
        """The whole file, until it is closed."""
        self._layout = blob_layout(header.shape, header.weights)
        self._dense = {entry.name: entry for entry in header.dense}
        self._experts = {ExpertId(entry.layer, entry.expert): entry for entry in header.experts}
        self._verified_offsets: set[int] = set()
        """Extents whose checksums were found right; the file does not change."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a store and check its header; no weight is read.

        Raises:
            StoreError: the file is missing, truncated, of another version, or its header lies.
        """
        try:
            # Non-blocking, so that a named pipe cannot hold us up; regular files do not care.
            file = FileIO(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            return cls(path, file, _read_header(path, file))
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Give up the file. What was read stays valid, and keeps the mapping until the last of it is gone."""
        self._content = None
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dense_names(self) -> frozenset[str]:
        """Our names of the dense tensors, as in `core.model.TensorNames`."""
        return frozenset(self._dense)

    def dense_matrix(self, name: str) -> PackedMatrix:
        """One dense matrix, as stored: a view of the file.

        Raises:
            StoreError: no such matrix, or the file cannot be read any more.
            ChecksumError: its bytes are damaged.
        """
        entry = self._dense_entry(name, num_dims=2)
        return matrix_in(self._checked(entry), entry)

    def dense_vector(self, name: str) -> torch.Tensor:
        """One norm's weights, float32 [n]: a view of the file.

        Raises:
            StoreError: no such vector, or the file cannot be read any more.
            ChecksumError: its bytes are damaged.
        """
        entry = self._dense_entry(name, num_dims=1)
        return vector_in(self._checked(entry), entry)

    def read_expert(self, expert_id: ExpertId) -> ExpertWeights:
        """One expert, as stored: views of the file.

        Raises:
            StoreError: no such expert, or the file cannot be read any more.
            ChecksumError: its bytes are damaged.
        """
        entry = self.expert_entry(expert_id)
        return self.expert_in(self._checked(entry), entry)

    def expert_blob(self, expert_id: ExpertId) -> torch.Tensor:
        """The bytes of one expert's extent, uint8: a view of the file.

        Raises:
            StoreError: there is no such expert, or it cannot be read.
            ChecksumError: it is damaged.
        """
        return self._checked(self.expert_entry(expert_id))

    def encoded_header(self) -> bytes:
        """The file up to its first extent; no two stores that differ have the same. Raises StoreError."""
        return self._present(0, min(entry.offset for entry in self._entries)).numpy().tobytes()

    @property
    def dense_entries(self) -> list[DenseEntry]:
        """Where the dense tensors lie, for those who read them themselves."""
        return list(self._dense.values())

    @property
    def blob_bytes(self) -> int:
        """Size of every expert's extent."""
        return self._layout.num_bytes

    @property
    def expert_entries(self) -> dict[ExpertId, ExpertEntry]:
        """Where every expert lies, layer by layer."""
        shape = self.shape
        ids = (ExpertId(layer, expert) for layer in range(shape.num_layers) for expert in range(shape.num_experts))
        return {expert_id: self.expert_entry(expert_id) for expert_id in ids}

    def expert_entry(self, expert_id: ExpertId) -> ExpertEntry:
        """Where an expert lies, for those who read it themselves. Raises StoreError if there is none."""
        if expert_id not in self._experts:
            raise StoreError(f"{self.path}: has no layer {expert_id.layer} expert {expert_id.expert}")
        return self._experts[expert_id]

    def expert_in(self, blob: torch.Tensor, entry: ExpertEntry) -> ExpertWeights:
        """The matrices of an expert whose extent was read into `blob`: views of it."""
        gate_scale, up_scale, down_scale = entry.tensor_scales or (1.0, 1.0, 1.0)
        return ExpertWeights(
            gate=_matrix(blob, self._layout.gate, gate_scale),
            up=_matrix(blob, self._layout.up, up_scale),
            down=_matrix(blob, self._layout.down, down_scale),
        )

    def verify(self, on_progress: Callable[[int, int], None]) -> None:
        """Read the whole file and check every extent, remembered or not.

        Args:
            on_progress: called with the bytes checked so far and their total.

        Raises:
            ChecksumError: names every damaged piece.
            StoreError: the file cannot be read any more.
        """
        entries = self._entries
        total_bytes = sum(entry.num_bytes for entry in entries)
        done_bytes = 0
        damages = []
        for entry in entries:
            digest = xxhash.xxh3_64()
            for start in range(0, entry.num_bytes, _VERIFY_CHUNK_BYTES):
                num_bytes = min(_VERIFY_CHUNK_BYTES, entry.num_bytes - start)
                digest.update(self._present(entry.offset + start, num_bytes).numpy().data)
                done_bytes += num_bytes
                on_progress(done_bytes, total_bytes)
            if digest.hexdigest() != entry.xxh3:
                damages.append(_damage(entry, digest.hexdigest()))
        if damages:
            raise ChecksumError(f"{self.path}: {'; '.join(damages)}")

    def check(self, num_threads: int) -> None:
        """Bring every extent that has not been read yet into memory and check it, at the speed of memory or disk.

        Raises:
            ChecksumError: names every damaged piece.
            StoreError: the file cannot be read any more.
        """
        pending = [entry for entry in self._entries if entry.offset not in self._verified_offsets]
        with ThreadPoolExecutor(num_threads) as pool:
            damages = [damage for damage in pool.map(self._find_damage, pending) if damage]
        if damages:
            raise ChecksumError(f"{self.path}: {'; '.join(damages)}")

    @property
    def _entries(self) -> list[DenseEntry | ExpertEntry]:
        return [*self._dense.values(), *self._experts.values()]

    def _dense_entry(self, name: str, *, num_dims: int) -> DenseEntry:
        entry = self._dense.get(name)
        if entry is None or len(entry.shape) != num_dims:
            raise StoreError(f"{self.path}: has no dense {'matrix' if num_dims == 2 else 'vector'} {name!r}")
        return entry

    def _checked(self, entry: DenseEntry | ExpertEntry) -> torch.Tensor:
        """The bytes of an extent, which is checked if it has not been."""
        # Two threads may both check an extent's first read; that costs time only.
        if entry.offset not in self._verified_offsets and (damage := self._find_damage(entry)):
            raise ChecksumError(f"{self.path}: {damage}")
        return self._bytes(entry.offset, entry.num_bytes)

    def _find_damage(self, entry: DenseEntry | ExpertEntry) -> str | None:
        # Pages are made present without Python's global lock: threads run side by side.
        damage = find_damage(self._present(entry.offset, entry.num_bytes), entry)
        if damage is None:
            self._verified_offsets.add(entry.offset)
        return damage

    def _bytes(self, offset: int, num_bytes: int) -> torch.Tensor:
        if self._content is None:
            raise StoreError(f"{self.path}: is closed")
        return self._content[offset : offset + num_bytes]

    def _present(self, offset: int, num_bytes: int) -> torch.Tensor:
        """Bytes of the file that can be touched: read from disk if need be.

        Raises:
            StoreError: the file has shrunk, or the disk fails.
        """
        content = self._bytes(offset, num_bytes)
        try:
            file_bytes = os.fstat(self._file.fileno()).st_size
            if file_bytes < self.total_bytes:
                raise StoreError(f"{self.path}: ends at byte {file_bytes}; the file has shrunk")
            # Asks for all of it at once; page faults would ask for little at a time.
            os.posix_fadvise(self._file.fileno(), offset, num_bytes, os.POSIX_FADV_WILLNEED)
            _populate(content)
        except OSError as error:
            raise StoreError(f"{self.path}: reading at byte {offset} failed: {error.strerror}") from error
        return content


def find_damage(content: torch.Tensor, entry: DenseEntry | ExpertEntry) -> str | None:
    """What is wrong with the bytes of an extent, if anything. Large ones are hashed without Python's global lock."""
    found = xxhash.xxh3_64_hexdigest(content.numpy().data)
    return None if found == entry.xxh3 else _damage(entry, found)


def matrix_in(content: torch.Tensor, entry: DenseEntry) -> PackedMatrix:
    """The dense matrix whose extent was read into `content`: a view of it."""
    return _matrix(content, dense_layout(entry))


def vector_in(content: torch.Tensor, entry: DenseEntry) -> torch.Tensor:
    """The same of a vector, float32 [n]."""
    return content.view(torch.float32)[: entry.shape[0]]


def _read_header(path: Path, file: FileIO) -> StoreHeader:
    try:
        status = os.fstat(file.fileno())
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size < PREAMBLE_BYTES:
        raise StoreError(f"{path}: is not an expert store, or is cut off in its first bytes")
    preamble = _read(path, file, 0, PREAMBLE_BYTES)
    encoded = _read(path, file, PREAMBLE_BYTES, header_length(path, preamble, status.st_size))
    return parse_header(path, preamble, encoded, status.st_size)


def _read(path: Path, file: FileIO, offset: int, num_bytes: int) -> bytes:
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    done_bytes = 0
    while done_bytes < num_bytes:
        try:
            step_bytes = os.preadv(file.fileno(), [view[done_bytes:]], offset + done_bytes)
        except OSError as error:
            raise StoreError(f"{path}: reading at byte {offset + done_bytes} failed: {error.strerror}") from error
        if step_bytes == 0:
            raise StoreError(f"{path}: ends at byte {offset + done_bytes}; the file has shrunk")
        done_bytes += step_bytes
    return bytes(buffer)


def _map(path: Path, file: FileIO, num_bytes: int) -> torch.Tensor:
    """The file's bytes as a uint8 tensor. It owns the mapping, which is never closed by hand."""
    try:
        # Writable, since torch has no read-only tensors; private, so that nothing can be written to the file.
        mapping = mmap.mmap(
            file.fileno(),
            num_bytes,
            flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    except (OSError, ValueError) as error:  # ValueError: the file has shrunk since its header was read
        raise StoreError(f"{path}: cannot be mapped into memory: {error}") from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _populate(content: torch.Tensor) -> None:
    """Make pages of a mapping present. Where a plain access would be killed by SIGBUS, this raises OSError."""
    address = content.data_ptr()
    start = address - address % mmap.PAGESIZE
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    # Through ctypes, since mmap.madvise holds Python's global lock while the disk is read.
    if madvise(start, address + content.nbytes - start, _MADV_POPULATE_READ):
        number = ctypes.get_errno()
        if number == errno.EFAULT:  # stands for what would be a SIGBUS
            number = errno.EIO
        if number != errno.EINVAL:  # a kernel that does not know this; pages come as they are touched
            raise OSError(number, os.strerror(number))


def _matrix(extent: torch.Tensor, layout: MatrixLayout, tensor_scale: float = 1.0) -> PackedMatrix:
    return PackedMatrix(
        format=layout.format,
        rows=layout.rows,
        columns=layout.columns,
        values=extent[layout.values],
        scales=extent[layout.scales],
        tensor_scale=tensor_scale,
    )


def _damage(entry: DenseEntry | ExpertEntry, found: str) -> str:
    if isinstance(entry, DenseEntry):
        piece = f"dense tensor {entry.name}"
    else:
        piece = f"layer {entry.layer} expert {entry.expert}"
    return f"{piece} is damaged: XXH3-64 expected {entry.xxh3}, found {found}"
