"""Reading GGUF files of unknown origin.

Follows the GGUF specification, versions 2 and 3, little-endian
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Every length in the file is compared with the bytes
that are left before anything of that length is allocated; arrays of numbers stay numpy arrays, so that no value
grows much when it is read.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from localmoe.core.errors import CheckpointError
from localmoe.formats.blocks import row_chunks
from localmoe.formats.fp4 import Mxfp4Matrix
from localmoe.formats.int8 import Int8Matrix
from localmoe.formats.packed import PackedMatrix, pack_int8, pack_mxfp4

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 2**20
MAX_HEADER_BYTES = 64 * 2**20
"""Metadata and tensor table together; vocabularies of 260 000 tokens with their merges take about 16 MiB."""
MAX_KEY_BYTES = 2**16 - 1
MAX_NAME_BYTES = 256
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MIN_ELEMENT_BYTES = {_BOOL: 1, _STRING: 8, _ARRAY: 12} | {t: struct.calcsize(f) for t, f in _SCALARS.items()}
_MIN_KEY_VALUE_BYTES = 8 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 4 + 8 + 4 + 8

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """Where one tensor lies."""

    name: str
    shape: tuple[int, ...]
    """Row-major, as in torch: the reverse of the order in the file."""
    quantization: GGMLQuantizationType
    offset_bytes: int
    """From the start of the file."""
    num_bytes: int


class GGUFFile:
    """A GGUF file whose header has been checked against the file's size."""

    def __init__(self, path: Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]) -> None:
        self.path = path
        self.metadata = metadata
        """Arrays of numbers and of booleans are numpy arrays; of strings and of arrays, lists."""
        self.tensors = tensors

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the header; no tensor bytes are read.

        Raises:
            CheckpointError: the file is missing, truncated, or says something that cannot be true.
        """
        try:
            with path.open("rb") as file:
                metadata, tensors = _parse(_Cursor(path, file))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(path, metadata, tensors)

    def value(self, key: str, kind: type[ValueT]) -> ValueT:
        """A metadata value. Raises CheckpointError if it is missing or of another type."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.path}: the metadata has no {key!r}")
        value = self.metadata[key]
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key!r} is of type {type(value).__name__}, not {kind.__name__}")
        return value

    def read(self, name: str) -> torch.Tensor:
        """One tensor, dequantised to float32, in row-major shape.

        Raises:
            CheckpointError: no such tensor, a quantisation that cannot be decoded, or the file has shrunk.
        """
        tensor = self._tensor(name)
        raw = self._raw(tensor, tensor.offset_bytes, tensor.num_bytes)
        try:
            with np.errstate(all="ignore"):
                values = quants.dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.quantization)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: {name!r} is stored as {tensor.quantization.name}, which cannot be dequantised"
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values, np.float32).reshape(tensor.shape))

    def read_packed(self, name: str, index: int | None = None) -> PackedMatrix:
        """One matrix as it is stored, bit for bit: MXFP4 as MXFP4, Q8_0 as INT8.

        Args:
            index: which matrix of a stack [E, R, C]; only that one is read. None for a tensor [R, C].

        Raises:
            CheckpointError: no such tensor or matrix, another quantisation, or the file has shrunk.
        """
        tensor = self._tensor(name)
        if tensor.quantization not in _MATRIX_OF_BLOCKS:
            raise CheckpointError(
                f"{self.path}: {name!r} is stored as {tensor.quantization.name}, which is not taken over as it is"
            )
        shape = tensor.shape
        fits = len(shape) == 2 if index is None else len(shape) == 3 and 0 <= index < shape[0]
        if not fits:
            raise CheckpointError(f"{self.path}: {name!r} of shape {shape} has no matrix at index {index}")
        rows, columns = shape[-2:]
        block_values, block_bytes = GGML_QUANT_SIZES[tensor.quantization]
        num_blocks = columns // block_values
        num_bytes = rows * num_blocks * block_bytes
        raw = self._raw(tensor, tensor.offset_bytes + (index or 0) * num_bytes, num_bytes)
        return _MATRIX_OF_BLOCKS[tensor.quantization](torch.from_numpy(raw).view(rows, num_blocks, block_bytes))

    def _tensor(self, name: str) -> GGUFTensor:
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: has no tensor {name!r}")
        return self.tensors[name]

    def _raw(self, tensor: GGUFTensor, offset_bytes: int, num_bytes: int) -> NDArray[np.uint8]:
        try:
            raw = np.fromfile(self.path, np.uint8, num_bytes, offset=offset_bytes)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
        if raw.nbytes != num_bytes:
            raise CheckpointError(f"{self.path}: became shorter while it was read: {tensor.name!r} is cut off")
        return raw


def _mxfp4(blocks: torch.Tensor) -> PackedMatrix:
    """Blocks [R, B, 17]: an E8M0 byte, then byte i with element i in its low, element 16 + i in its high nibble."""
    rows, num_blocks, _ = blocks.shape
    codes = torch.empty(rows, num_blocks, 2, 8, dtype=torch.uint8)
    for chunk in row_chunks(rows, num_blocks * 16):
        # A word holds elements i, 16 + i, i + 1, 17 + i from its lowest nibble on.
        words = blocks[chunk, :, 1:].contiguous().view(torch.int16)
        codes[chunk, :, 0] = ((words & 0x0F) | ((words >> 4) & 0xF0)).to(torch.uint8)
        codes[chunk, :, 1] = (((words >> 4) & 0x0F) | ((words >> 8) & 0xF0)).to(torch.uint8)
    return pack_mxfp4(Mxfp4Matrix(codes=codes.view(rows, -1), scales=blocks[:, :, 0]))


def _int8(blocks: torch.Tensor) -> PackedMatrix:
    """Blocks [R, B, 34]: a float16 scale, then 32 int8."""
    rows, num_blocks, _ = blocks.shape
    codes = torch.empty(rows, num_blocks, 32, dtype=torch.uint8)
    for chunk in row_chunks(rows, num_blocks * 32):
        codes[chunk] = blocks[chunk, :, 2:]
    scales = blocks[:, :, :2].contiguous().view(torch.float16).view(rows, num_blocks)
    return pack_int8(Int8Matrix(codes=codes.view(rows, -1).view(torch.int8), scales=scales))


_MATRIX_OF_BLOCKS: dict[GGMLQuantizationType, Callable[[torch.Tensor], PackedMatrix]] = {
    GGMLQuantizationType.MXFP4: _mxfp4,
    GGMLQuantizationType.Q8_0: _int8,
}


class _Cursor:
    """Reads forward through the header and refuses to go beyond what may be there."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self.file_bytes = file.seek(0, 2)
        self._left_bytes = min(self.file_bytes, MAX_HEADER_BYTES)
        file.seek(0)

    @property
    def position(self) -> int:
        return self._file.tell()

    def error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {reason}")

    def check_count(self, count: int, min_bytes: int, what: str) -> None:
        """Refuse `count` things of at least `min_bytes` each if they cannot be in the rest of the header."""
        if count * min_bytes > self._left_bytes:
            raise self.error(
                f"{what} claims {count} entries of at least {min_bytes} bytes where {self._left_bytes} are left"
            )

    def take(self, num_bytes: int, what: str) -> bytes:
        if num_bytes > self._left_bytes:
            raise self.error(f"{what} needs {num_bytes} bytes where {self._left_bytes} are left")
        raw = self._file.read(num_bytes)
        if len(raw) != num_bytes:
            raise self.error(f"became shorter while it was read: {what} is cut off")
        self._left_bytes -= num_bytes
        return raw

    def number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout), what))[0]

    def string(self, what: str, *, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.number("<Q", what)
        if length > max_bytes:
            raise self.error(f"{what} claims {length} bytes; at most {max_bytes} are allowed")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    if cursor.take(4, "the magic number") != MAGIC:
        raise cursor.error("not a GGUF file: it does not begin with the bytes GGUF")
    version = cursor.number("<I", "the version")
    if version not in VERSIONS:
        hint = " (a big-endian file)" if version in (v << 24 for v in VERSIONS) else ""
        raise cursor.error(f"GGUF version {version}{hint} is not supported; versions 2 and 3, little-endian, are")
    num_tensors = cursor.number("<Q", "the number of tensors")
    num_values = cursor.number("<Q", "the number of metadata values")
    cursor.check_count(num_values, _MIN_KEY_VALUE_BYTES, "the metadata")

    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string("a metadata key", max_bytes=MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r:.100} occurs twice")
        kind = cursor.number("<I", f"the type of {key!r:.100}")
        metadata[key] = _value(cursor, kind, f"metadata {key!r:.100}", depth=0)

    cursor.check_count(num_tensors, _MIN_TENSOR_INFO_BYTES, "the tensor table")
    tensors: dict[str, GGUFTensor] = {}
    alignment = _alignment(cursor, metadata)
    for _ in range(num_tensors):
        tensor = _tensor_info(cursor, alignment)
        if tensor.name in tensors:
            raise cursor.error(f"tensor {tensor.name!r} occurs twice")
        tensors[tensor.name] = tensor
    return metadata, _place(cursor, tensors, alignment)


def _value(cursor: _Cursor, kind: int, what: str, depth: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind], what)
    if kind == _BOOL:
        return _boolean(cursor, cursor.take(1, what), what)
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _array(cursor, what, depth + 1)
    raise cursor.error(f"{what} has the unknown type {kind}")


def _boolean(cursor: _Cursor, raw: bytes, what: str) -> bool:
    if raw not in (b"\0", b"\1"):
        raise cursor.error(f"{what} is a boolean with the value {raw[0]}")
    return raw == b"\1"


def _array(cursor: _Cursor, what: str, depth: int) -> Any:
    if depth > MAX_ARRAY_DEPTH:
        raise cursor.error(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
    kind = cursor.number("<I", f"the element type of {what}")
    length = cursor.number("<Q", f"the length of {what}")
    if kind not in _MIN_ELEMENT_BYTES:
        raise cursor.error(f"{what} has elements of the unknown type {kind}")
    cursor.check_count(length, _MIN_ELEMENT_BYTES[kind], what)
    if kind in _SCALARS:
        layout = np.dtype(_SCALARS[kind])
        return np.frombuffer(cursor.take(length * layout.itemsize, what), layout)
    if kind == _BOOL:
        flags = np.frombuffer(cursor.take(length, what), np.uint8)
        if flags.size and flags.max() > 1:
            raise cursor.error(f"{what} is a boolean with the value {flags.max()}")
        return flags.astype(np.bool_)
    element: Callable[[], Any] = (
        (lambda: cursor.string(what)) if kind == _STRING else (lambda: _array(cursor, what, depth + 1))
    )
    return [element() for _ in range(length)]


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(
            f"general.alignment is {alignment!r:.40}; a power of two from 8 to {MAX_ALIGNMENT} is allowed"
        )
    return alignment


def _tensor_info(cursor: _Cursor, alignment: int) -> GGUFTensor:
    """One entry of the tensor table, its offset still relative to the tensor data."""
    name = cursor.string("a tensor name", max_bytes=MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    num_dims = cursor.number("<I", what)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"{what} has {num_dims} dimensions; 1 to {MAX_DIMS} are allowed")
    dims = struct.unpack(f"<{num_dims}Q", cursor.take(8 * num_dims, what))
    kind = cursor.number("<I", what)
    offset_bytes = cursor.number("<Q", what)
    try:
        quantization = GGMLQuantizationType(kind)
        block_values, block_bytes = GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError) as error:
        raise cursor.error(f"{what} has the unknown type {kind}") from error
    if 0 in dims:
        raise cursor.error(f"{what} has an empty dimension: {dims}")
    if dims[0] % block_values:
        raise cursor.error(f"{what} has rows of {dims[0]} values, not whole blocks of {block_values}")
    if offset_bytes % alignment:
        raise cursor.error(f"{what} begins at {offset_bytes}, not at a multiple of {alignment} bytes")
    return GGUFTensor(
        name=name,
        shape=dims[::-1],
        quantization=quantization,
        offset_bytes=offset_bytes,
        num_bytes=prod(dims) // block_values * block_bytes,
    )


def _place(cursor: _Cursor, tensors: dict[str, GGUFTensor], alignment: int) -> dict[str, GGUFTensor]:
    """Turn offsets into file positions, and check that every extent is in the file and in no other."""
    data_start = -(-cursor.position // alignment) * alignment
    placed: dict[str, GGUFTensor] = {}
    previous_end, previous_name = data_start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset_bytes):
        begin = data_start + tensor.offset_bytes
        end = begin + tensor.num_bytes
        if end > cursor.file_bytes:
            raise cursor.error(
                f"tensor {tensor.name!r} ends at byte {end}, beyond the file's {cursor.file_bytes} bytes"
            )
        if begin < previous_end:
            raise cursor.error(f"tensors {previous_name!r} and {tensor.name!r} overlap")
        previous_end, previous_name = end, tensor.name
        placed[tensor.name] = replace(tensor, offset_bytes=begin)
    return placed
