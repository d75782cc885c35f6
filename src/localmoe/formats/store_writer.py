"""Writing an expert store: the whole file, or none at all.

A writer works on `NAME.<16 hex digits>.partial` beside its goal and holds a lock (flock) on it until it is renamed
or removed. The system drops the lock of a killed process, so a partial file that can be locked is abandoned, and
the next writer of the same path removes it.
"""

import fcntl
import os
import re
import secrets
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
import torch
import xxhash

from localmoe.core.errors import CheckpointError, ModelBuildError
from localmoe.core.model import ExpertId, ModelShape, WeightFormat
from localmoe.formats.packed import PackedMatrix, pack_matrix
from localmoe.formats.store_layout import (
    Extent,
    MatrixLayout,
    blob_layout,
    check_shape,
    data_start,
    dense_layout,
    encode_header,
    plan_header,
)


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
            remove_abandoned(self._path)
            self._partial, self._fd = create_partial(self._path)
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

    def write_dense(self, name: str, tensor: torch.Tensor | PackedMatrix) -> None:
        """Write a dense tensor; one that is not packed in its format yet is rounded to it.

        Raises:
            CheckpointError: NaN or infinite values.
            ModelBuildError: the write failed.
        """
        entry = self._dense[name]
        assert tuple(tensor.shape) == entry.shape
        extent = torch.zeros(entry.num_bytes, dtype=torch.uint8)
        if len(entry.shape) == 2:
            _put(extent, tensor, dense_layout(entry))
        else:
            assert isinstance(tensor, torch.Tensor)
            extent.view(torch.float32)[: entry.shape[0]] = _finite(tensor.to(torch.float32))
        self._dense[name] = msgspec.structs.replace(entry, xxh3=self._write_extent(entry, extent))

    def write_expert(
        self,
        expert_id: ExpertId,
        gate_FD: torch.Tensor | PackedMatrix,
        up_FD: torch.Tensor | PackedMatrix,
        down_DF: torch.Tensor | PackedMatrix,
    ) -> None:
        """Write an expert; matrices that are not packed in the store's format yet are rounded to it.

        Raises:
            CheckpointError: NaN or infinite values.
            ModelBuildError: the write failed.
        """
        entry = self._experts[expert_id]
        extent = torch.zeros(entry.num_bytes, dtype=torch.uint8)
        tensor_scales = (
            _put(extent, gate_FD, self._layout.gate),
            _put(extent, up_FD, self._layout.up),
            _put(extent, down_DF, self._layout.down),
        )
        self._experts[expert_id] = msgspec.structs.replace(
            entry,
            xxh3=self._write_extent(entry, extent),
            tensor_scales=tensor_scales if self._weights is WeightFormat.NVFP4 else None,
        )

    def _write_extent(self, place: Extent, content: torch.Tensor) -> str:
        """Write a piece; the result is its checksum."""
        view = content.numpy().data
        try:
            write_all(self._fd, view, place.offset)
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
            write_all(self._fd, memoryview(encode_header(header)), 0)
            complete(self._partial, self._fd, self._path)
        except OSError as error:
            raise self._write_error(error) from error

    def _discard(self) -> None:
        """Remove the partial file; there is none any more once it has been renamed."""
        os.close(self._fd)
        self._partial.unlink(missing_ok=True)

    def _write_error(self, error: OSError) -> ModelBuildError:
        return ModelBuildError(f"{self._path}: writing the expert store failed: {error.strerror}")


def _put(extent: torch.Tensor, matrix: torch.Tensor | PackedMatrix, layout: MatrixLayout) -> float:
    """Put a matrix into its place; the result is its tensor scale, 1.0 where the format has none."""
    assert tuple(matrix.shape) == (layout.rows, layout.columns)
    if isinstance(matrix, PackedMatrix):
        assert matrix.format is layout.format
        matrix.check_finite()
        packed = matrix
    else:
        packed = pack_matrix(matrix, layout.format)
    extent[layout.values] = packed.values
    extent[layout.scales] = packed.scales
    return packed.tensor_scale


def _finite(values: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(values).all():
        raise CheckpointError("NaN or infinite values cannot be stored")
    return values


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of it there. Raises OSError."""
    done_bytes = 0
    while done_bytes < len(view):
        done_bytes += os.pwrite(fd, view[done_bytes:], offset + done_bytes)


def create_partial(path: Path) -> tuple[Path, int]:
    """A new locked file beside `path`, to be renamed to it, and its descriptor. Raises OSError."""
    while True:
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return partial, fd
        # Another writer took the file for abandoned before it was locked.
        os.close(fd)


def complete(partial: Path, fd: int, path: Path) -> None:
    """Give a partial file its name, once the disk has all of it. Raises OSError."""
    os.fsync(fd)
    partial.rename(path)
    directory_fd = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory_fd)
    finally:
        os.close(directory_fd)


def remove_abandoned(path: Path) -> None:
    """Remove partial files of `path` whose writers are dead. Raises OSError."""
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
