"""The expert store: a whole model in one read-only file, each expert in one contiguous, checked blob.

`store_layout` says what lies where. `StoreWriter` makes such a file or none at all; `Store` reads it and believes
nothing in it that shape, format and checksums do not confirm.

A writer works on `NAME.<16 hex digits>.partial` beside its goal and holds a lock (flock) on it until it is renamed
or removed. The system drops the lock of a killed process, so a partial file that can be locked is abandoned, and
the next writer of the same path removes it.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch
import xxhash

from localmoe.core.errors import CheckpointError, ChecksumError, ModelBuildError, StoreError
from localmoe.core.model import ExpertId, ModelShape, WeightFormat
from localmoe.formats.fp4 import Mxfp4Matrix, Nvfp4Matrix, quantize_mxfp4, quantize_nvfp4
from localmoe.formats.store_layout import (
    PREAMBLE_BYTES,
    DenseEntry,
    ExpertEntry,
    Extent,
    MatrixLayout,
    StoreHeader,
    blob_layout,
    check_shape,
    data_start,
    dense_dtype,
    encode_header,
    header_length,
    parse_header,
    plan_header,
)

_VERIFY_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainMatrix:
    """A matrix that is not quantised."""

    values: torch.Tensor
    """bfloat16 or float32 [R, C]."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype)


Matrix = Mxfp4Matrix | Nvfp4Matrix | PlainMatrix


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """One expert's matrices as stored; all three are views of one buffer."""

    gate: Matrix
    """[F, D]: expert size × hidden size."""
    up: Matrix
    """[F, D]"""
    down: Matrix
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
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def dense_names(self) -> frozenset[str]:
        """Our names of the dense tensors, as in `core.model.TensorNames`."""
        return frozenset(self._dense)

    def read_dense(self, name: str) -> torch.Tensor:
        """One dense tensor: bfloat16, or float32 in an F32 store.

        Raises:
            StoreError: no such tensor, or the file cannot be read any more.
            ChecksumError: its bytes are damaged.
        """
        if name not in self._dense:
            raise StoreError(f"{self.path}: has no dense tensor {name!r}")
        entry = self._dense[name]
        num_values = torch.Size(entry.shape).numel()
        values = self._read_checked(entry).view(dense_dtype(self.weights))
        return values[:num_values].view(entry.shape)

    def read_expert(self, expert_id: ExpertId) -> ExpertWeights:
        """One expert, as stored.

        Raises:
            StoreError: no such expert, or the file cannot be read any more.
            ChecksumError: its bytes are damaged.
        """
        if expert_id not in self._experts:
            raise StoreError(f"{self.path}: has no layer {expert_id.layer} expert {expert_id.expert}")
        entry = self._experts[expert_id]
        blob = self._read_checked(entry)
        gate_scale, up_scale, down_scale = entry.tensor_scales or (1.0, 1.0, 1.0)
        return ExpertWeights(
            gate=self._matrix(blob, self._layout.gate, gate_scale),
            up=self._matrix(blob, self._layout.up, up_scale),
            down=self._matrix(blob, self._layout.down, down_scale),
        )

    def verify(self, on_progress: Callable[[int, int], None]) -> None:
        """Read the whole file and check every extent, remembered or not.

        Args:
            on_progress: called with the bytes checked so far and their total.

        Raises:
            ChecksumError: names every damaged piece.
            StoreError: the file cannot be read any more.
        """
        entries: list[DenseEntry | ExpertEntry] = [*self._dense.values(), *self._experts.values()]
        total_bytes = sum(entry.num_bytes for entry in entries)
        done_bytes = 0
        damages = []
        for entry in entries:
            digest = xxhash.xxh3_64()
            for start in range(0, entry.num_bytes, _VERIFY_CHUNK_BYTES):
                num_bytes = min(_VERIFY_CHUNK_BYTES, entry.num_bytes - start)
                digest.update(_read(self.path, self._file, entry.offset + start, num_bytes).numpy().data)
                done_bytes += num_bytes
                on_progress(done_bytes, total_bytes)
            if digest.hexdigest() != entry.xxh3:
                damages.append(_damage(entry, digest.hexdigest()))
        if damages:
            raise ChecksumError(f"{self.path}: {'; '.join(damages)}")

    def _matrix(self, blob: torch.Tensor, layout: MatrixLayout, tensor_scale: float) -> Matrix:
        values = blob[layout.values]
        if self.weights in (WeightFormat.BF16, WeightFormat.F32):
            return PlainMatrix(values=values.view(dense_dtype(self.weights)).view(layout.rows, layout.columns))
        codes = values.view(layout.rows, -1)
        scales = blob[layout.scales].view(layout.rows, -1)
        if self.weights is WeightFormat.MXFP4:
            return Mxfp4Matrix(codes=codes, scales=scales)
        return Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=tensor_scale)

    def _read_checked(self, entry: DenseEntry | ExpertEntry) -> torch.Tensor:
        extent = _read(self.path, self._file, entry.offset, entry.num_bytes)
        # Two threads may both check an extent's first read; that costs time only.
        if entry.offset not in self._verified_offsets:
            found = xxhash.xxh3_64_hexdigest(extent.numpy().data)
            if found != entry.xxh3:
                raise ChecksumError(f"{self.path}: {_damage(entry, found)}")
            self._verified_offsets.add(entry.offset)
        return extent


class StoreWriter:
    """Writes a store in any order of its pieces; the file appears under its name only when it is complete.

        with StoreWriter(path, shape=shape, weights=weights, source="...") as writer:
            writer.write_dense("embed", tensor)
            writer.write_expert(ExpertId(0, 0), gate_FD, up_FD, down_DF)

    Leaving the block without an error completes the file, with an error removes it. A store that was at `path`
    before stays until then, and those who have it open keep it.

    Raises:
        StoreError: no store can have this shape in this format.
        ModelBuildError: a write failed (disk full, no permission), or a piece is missing at the end.
    """

    def __init__(self, path: Path, *, shape: ModelShape, weights: WeightFormat, source: str) -> None:
        check_shape(path, shape, weights)
        self._path = path
        self._weights = weights
        # A name that came from the file system need not be valid Unicode; the header must be.
        self._header = plan_header(shape, weights, source.encode(errors="replace").decode())
        self._layout = blob_layout(shape, weights)
        self._dense = {entry.name: entry for entry in self._header.dense}
        self._experts = {ExpertId(entry.layer, entry.expert): entry for entry in self._header.experts}
        self._missing_offsets = {extent.offset for extent in self._header.extents}
        self.total_bytes = self._header.file_bytes - data_start(self._header)
        """What `written_bytes` will be at the end."""
        self.written_bytes = 0

    def __enter__(self) -> Self:
        try:
            _remove_abandoned(self._path)
            self._partial, self._fd = _create_partial(self._path)
        except OSError as error:
            raise self._write_error(error) from error
        try:
            # Takes the room now, so that a disk too small is known before hours of work.
            os.posix_fallocate(self._fd, 0, self._header.file_bytes)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError):
                raise self._write_error(error) from error
            raise
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if exc_type is None:
                self._complete()
        finally:
            self._discard()

    def write_dense(self, name: str, tensor: torch.Tensor) -> None:
        """Convert a dense tensor to the store's dense type and write it.

        Raises:
            CheckpointError: NaN or infinite values.
            ModelBuildError: the write failed.
        """
        entry = self._dense[name]
        assert tuple(tensor.shape) == entry.shape
        values = _finite(tensor.to(dense_dtype(self._weights)))
        extent = torch.zeros(entry.num_bytes, dtype=torch.uint8)
        extent[: values.nbytes] = values.reshape(-1).view(torch.uint8)
        self._dense[name] = msgspec.structs.replace(entry, xxh3=self._write_extent(entry, extent))

    def write_expert(
        self, expert_id: ExpertId, gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor
    ) -> None:
        """Quantise an expert and write it.

        Raises:
            CheckpointError: NaN or infinite values.
            ModelBuildError: the write failed.
        """
        entry = self._experts[expert_id]
        extent = torch.zeros(entry.num_bytes, dtype=torch.uint8)
        tensor_scales = (
            self._encode_matrix(gate_FD, self._layout.gate, extent),
            self._encode_matrix(up_FD, self._layout.up, extent),
            self._encode_matrix(down_DF, self._layout.down, extent),
        )
        self._experts[expert_id] = msgspec.structs.replace(
            entry,
            xxh3=self._write_extent(entry, extent),
            tensor_scales=tensor_scales if self._weights is WeightFormat.NVFP4 else None,
        )

    def _encode_matrix(self, values_RC: torch.Tensor, layout: MatrixLayout, extent: torch.Tensor) -> float:
        """Put a matrix into its blob; the result is its tensor scale, 1.0 where the format has none."""
        assert values_RC.shape == (layout.rows, layout.columns)
        if self._weights is WeightFormat.NVFP4:
            nvfp4 = quantize_nvfp4(values_RC)
            extent[layout.values] = nvfp4.codes.view(-1)
            extent[layout.scales] = nvfp4.scales.view(-1)
            return nvfp4.tensor_scale
        if self._weights is WeightFormat.MXFP4:
            mxfp4 = quantize_mxfp4(values_RC)
            extent[layout.values] = mxfp4.codes.view(-1)
            extent[layout.scales] = mxfp4.scales.view(-1)
        else:
            extent[layout.values] = _finite(values_RC.to(dense_dtype(self._weights))).reshape(-1).view(torch.uint8)
        return 1.0

    def _write_extent(self, place: Extent, content: torch.Tensor) -> str:
        """Write a piece; the result is its checksum."""
        view = content.numpy().data
        try:
            _write_all(self._fd, view, place.offset)
        except OSError as error:
            raise self._write_error(error) from error
        self._missing_offsets.discard(place.offset)
        self.written_bytes += place.num_bytes
        return xxhash.xxh3_64_hexdigest(view)

    def _complete(self) -> None:
        if self._missing_offsets:
            raise ModelBuildError(
                f"{self._path}: {len(self._missing_offsets)} tensors or experts were not written"
            )
        header = msgspec.structs.replace(
            self._header, dense=list(self._dense.values()), experts=list(self._experts.values())
        )
        try:
            _write_all(self._fd, memoryview(encode_header(header)), 0)
            os.fsync(self._fd)
            os.rename(self._partial, self._path)
            directory_fd = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(directory_fd)
            finally:
                os.close(directory_fd)
        except OSError as error:
            raise self._write_error(error) from error

    def _discard(self) -> None:
        """Remove the partial file; there is none any more once it has been renamed."""
        os.close(self._fd)
        self._partial.unlink(missing_ok=True)

    def _write_error(self, error: OSError) -> ModelBuildError:
        return ModelBuildError(f"{self._path}: writing the expert store failed: {error.strerror}")


def _read_header(path: Path, file: FileIO) -> StoreHeader:
    try:
        status = os.fstat(file.fileno())
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode) or status.st_size < PREAMBLE_BYTES:
        raise StoreError(f"{path}: is not an expert store, or is cut off in its first bytes")
    preamble = _read(path, file, 0, PREAMBLE_BYTES).numpy().tobytes()
    encoded = _read(path, file, PREAMBLE_BYTES, header_length(path, preamble, status.st_size)).numpy().tobytes()
    return parse_header(path, preamble, encoded, status.st_size)


def _read(path: Path, file: FileIO, offset: int, num_bytes: int) -> torch.Tensor:
    """Bytes of the file as a new uint8 tensor."""
    buffer = torch.empty(num_bytes, dtype=torch.uint8)
    view = buffer.numpy().data
    done_bytes = 0
    while done_bytes < num_bytes:
        try:
            step_bytes = os.preadv(file.fileno(), [view[done_bytes:]], offset + done_bytes)
        except (OSError, ValueError) as error:  # ValueError: the store was closed
            raise StoreError(f"{path}: reading at byte {offset + done_bytes} failed: {error}") from error
        if step_bytes == 0:
            raise StoreError(f"{path}: ends at byte {offset + done_bytes}; the file has shrunk")
        done_bytes += step_bytes
    return buffer


def _damage(entry: DenseEntry | ExpertEntry, found: str) -> str:
    if isinstance(entry, DenseEntry):
        piece = f"dense tensor {entry.name}"
    else:
        piece = f"layer {entry.layer} expert {entry.expert}"
    return f"{piece} is damaged: XXH3-64 expected {entry.xxh3}, found {found}"


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise CheckpointError("NaN or infinite values cannot be stored")
    return values


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done_bytes = 0
    while done_bytes < len(view):
        done_bytes += os.pwrite(fd, view[done_bytes:], offset + done_bytes)


def _create_partial(path: Path) -> tuple[Path, int]:
    """A new locked file beside `path`, and its descriptor."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return partial, fd
        # Another writer took the file for abandoned before it was locked.
        os.close(fd)


def _remove_abandoned(path: Path) -> None:
    """Remove partial files of `path` whose writers are dead."""
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{16}\.partial")
    for partial in path.parent.iterdir():
        if not pattern.fullmatch(partial.name):
            continue
        try:
            fd = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its writer has just finished
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
        except BlockingIOError:
            continue  # its writer is alive
        finally:
            os.close(fd)
