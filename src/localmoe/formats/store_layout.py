"""Layout version 3 of the expert store: what lies where in the file, and whether a header tells the truth.

    0    magic          8 bytes, "LMOESTOR"
    8    version        uint64, little-endian like everything here
    16   header length  uint64, such that the data begins at a multiple of 4096
    24   XXH3-64 of the header's bytes
    32   header         JSON (`StoreHeader`), filled up with spaces
    ...  extents        dense tensors, then one blob per (layer, expert), to the end of the file without a gap

An extent begins at a multiple of 4096 and is padded with zeros to one, so that it can be read by direct I/O; its
checksum, XXH3-64, covers the padding. Thus every byte of the file is checked by something.

Matrices are packed as `packed` says, ready for the CPU kernels. A blob holds the values of gate [F, D], up [F, D] and
down [D, F], then their scales in the same order; each of these six runs begins at a multiple of 64 bytes. A dense
matrix's extent holds its values, then its scales from a multiple of 64; a vector's holds float32 numbers. Dense
matrices are INT8 beside quantised experts, but BF16 where they are routers or 32 does not divide their columns; in
BF16 and F32 stores they are what the experts are. NVFP4's three float32 tensor scales are in the header.

All sizes follow from shape and format, so a header can be held against them before anything else is read.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
import xxhash

from localmoe.core.errors import StoreError
from localmoe.core.model import ExpertId, ModelShape, QkNorm, WeightFormat
from localmoe.formats.packed import COLUMN_MULTIPLE, packed_bytes
from localmoe.formats.store_version import LAYOUT_VERSION, STORE_MAGIC

LAYOUT_NAME = "interleaved-16"
ALIGNMENT_BYTES = 4096
RUN_ALIGNMENT_BYTES = 64
"""A cache line, and the widest vector register."""
PREAMBLE_BYTES = 32
MAX_HEADER_BYTES = 64 << 20

_PREAMBLE = struct.Struct("<8sQQQ")
_MAX_SIZE = 2**31 - 1
_MAX_EXPERTS = 2**18
"""An entry takes up to about 200 bytes, so that a header of this many stays under its limit."""
_SIZE_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "top_k",
    "expert_size",
    "vocab_size",
    "max_context_tokens",
)
_WIDEST_OFFSET = 2**60
_WIDEST_FLOAT = -2.2250738585072014e-308

Checksum = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
"""XXH3-64 as 16 hexadecimal digits."""
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class Extent(msgspec.Struct, frozen=True, kw_only=True):
    """A run of bytes in the file."""

    offset: Count
    num_bytes: Count
    """With padding."""
    xxh3: Checksum


class DenseEntry(Extent, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where one dense tensor lies."""

    name: str
    format: WeightFormat
    """Of a vector, F32: it is not packed."""
    shape: tuple[Count, ...]


class ExpertEntry(Extent, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where one expert's blob lies."""

    layer: Count
    expert: Count
    tensor_scales: tuple[float, float, float] | None = None
    """NVFP4's float32 scales of gate, up and down; absent in other formats."""


class StoreHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything a reader must know before it reads a weight."""

    layout: str
    """How matrices are packed, by name."""
    weights: WeightFormat
    shape: ModelShape
    source: str
    """Where the weights came from, for people."""
    file_bytes: Count
    dense: list[DenseEntry]
    experts: list[ExpertEntry]

    @property
    def extents(self) -> list[Extent]:
        return [*self.dense, *self.experts]


@dataclass(frozen=True, kw_only=True)
class MatrixLayout:
    """One packed matrix within an extent."""

    format: WeightFormat
    rows: int
    columns: int
    values: slice
    """Bytes of the extent."""
    scales: slice
    """Empty for BF16 and F32."""


@dataclass(frozen=True, kw_only=True)
class BlobLayout:
    """One expert's blob."""

    gate: MatrixLayout
    up: MatrixLayout
    down: MatrixLayout
    num_bytes: int
    """With padding."""


def blob_layout(shape: ModelShape, weights: WeightFormat) -> BlobLayout:
    """Where each matrix of an expert lies in its blob."""
    return expert_layout(shape.hidden_size, shape.expert_size, weights)


def expert_layout(hidden_size: int, expert_size: int, weights: WeightFormat) -> BlobLayout:
    """The same of an expert of these sizes."""
    F, D = expert_size, hidden_size
    (gate, up, down), num_bytes = _lay_out(weights, [(F, D), (F, D), (D, F)])
    return BlobLayout(gate=gate, up=up, down=down, num_bytes=num_bytes)


def dense_layout(entry: DenseEntry) -> MatrixLayout:
    """Where a dense matrix lies in its extent."""
    rows, columns = entry.shape
    return _lay_out(entry.format, [(rows, columns)])[0][0]


def _lay_out(weights: WeightFormat, matrices: list[tuple[int, int]]) -> tuple[list[MatrixLayout], int]:
    """Layouts of matrices [rows, columns] that share an extent, and the extent's size."""
    sizes = [packed_bytes(weights, rows, columns) for rows, columns in matrices]
    runs = []
    end = 0
    for num_bytes in [*(values for values, _ in sizes), *(scales for _, scales in sizes)]:
        start = _pad(end, RUN_ALIGNMENT_BYTES)
        end = start + num_bytes
        runs.append(slice(start, end))
    layouts = [
        MatrixLayout(format=weights, rows=rows, columns=columns, values=values, scales=scales)
        for (rows, columns), values, scales in zip(
            matrices, runs[: len(matrices)], runs[len(matrices) :], strict=True
        )
    ]
    return layouts, _pad(end)


def dense_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names (as in `core.model.TensorNames`) and shapes of a model's dense tensors."""
    D = shape.hidden_size
    q_size = shape.num_heads * shape.head_dim
    kv_size = shape.num_kv_heads * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed": (shape.vocab_size, D), "final_norm": (D,)}
    if not shape.tie_embeddings:
        shapes["head"] = (shape.vocab_size, D)
    for layer in range(shape.num_layers):
        prefix = f"layers.{layer}."
        shapes[prefix + "attn_norm"] = (D,)
        shapes[prefix + "q"] = (q_size, D)
        shapes[prefix + "k"] = (kv_size, D)
        shapes[prefix + "v"] = (kv_size, D)
        shapes[prefix + "o"] = (D, q_size)
        if shape.qk_norm is QkNorm.PROJECTION:
            shapes |= {prefix + "q_norm": (q_size,), prefix + "k_norm": (kv_size,)}
        elif shape.qk_norm is QkNorm.HEAD:
            shapes |= {prefix + "q_norm": (shape.head_dim,), prefix + "k_norm": (shape.head_dim,)}
        shapes[prefix + "ffn_norm"] = (D,)
        if shape.num_experts > 1:
            shapes[prefix + "router"] = (shape.num_experts, D)
    return shapes


def dense_format(name: str, dimensions: tuple[int, ...], weights: WeightFormat) -> WeightFormat:
    """Format of a dense tensor in a store of this format."""
    if len(dimensions) == 1 or weights is WeightFormat.F32:
        return WeightFormat.F32
    if weights is WeightFormat.BF16 or name.endswith("router") or dimensions[1] % COLUMN_MULTIPLE:
        return WeightFormat.BF16
    return WeightFormat.INT8


def _dense_bytes(dimensions: tuple[int, ...], weights: WeightFormat) -> int:
    """Size of a dense tensor's extent."""
    if len(dimensions) == 1:
        return _pad(dimensions[0] * 4)
    rows, columns = dimensions
    return _lay_out(weights, [(rows, columns)])[1]


def plan_header(shape: ModelShape, weights: WeightFormat, source: str) -> StoreHeader:
    """A header with every extent in place and checksums and scales yet to be filled in."""
    # The header comes first in the file but its last numbers are known only at the end. So its room is measured
    # with numbers as long as they can get.
    widest = _header_at(shape, weights, source, _WIDEST_OFFSET, _WIDEST_FLOAT)
    return _header_at(shape, weights, source, _pad(PREAMBLE_BYTES + len(msgspec.json.encode(widest))), 1.0)


def data_start(header: StoreHeader) -> int:
    """Offset of the first extent."""
    return min(extent.offset for extent in header.extents)


def encode_header(header: StoreHeader) -> bytes:
    """Preamble and header, up to the first extent."""
    room = data_start(header) - PREAMBLE_BYTES
    encoded = msgspec.json.encode(header).ljust(room)
    assert len(encoded) == room
    return _PREAMBLE.pack(STORE_MAGIC, LAYOUT_VERSION, room, xxhash.xxh3_64_intdigest(encoded)) + encoded


def header_length(path: Path, preamble: bytes, file_bytes: int) -> int:
    """Length of the header that follows this preamble.

    Raises:
        StoreError: not a store, another layout version, or a length that cannot be.
    """
    magic: bytes
    version: int
    length: int
    magic, version, length, _ = _PREAMBLE.unpack(preamble)
    if magic != STORE_MAGIC:
        raise StoreError(f"{path}: is not an expert store")
    if version != LAYOUT_VERSION:
        raise StoreError(f"{path}: has layout version {version}, not {LAYOUT_VERSION}; convert again")
    if length > MAX_HEADER_BYTES or PREAMBLE_BYTES + length > file_bytes:
        raise StoreError(
            f"{path}: claims a header of {length} bytes, of {file_bytes} in all; {MAX_HEADER_BYTES} is most"
        )
    return length


def parse_header(path: Path, preamble: bytes, encoded: bytes, file_bytes: int) -> StoreHeader:
    """Decode a header and hold every number in it against shape, format and file.

    Raises:
        StoreError: the checksum is wrong, or a field is.
    """
    promised = _PREAMBLE.unpack(preamble)[3]
    found = xxhash.xxh3_64_intdigest(encoded)
    if found != promised:
        raise StoreError(f"{path}: the header is damaged: XXH3-64 expected {promised:016x}, found {found:016x}")
    try:
        header = msgspec.json.decode(encoded, type=StoreHeader)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: the header is not valid: {error}") from error
    if header.layout != LAYOUT_NAME:
        raise StoreError(f"{path}: the header is of another layout; convert again")
    if header.file_bytes != file_bytes:
        raise StoreError(f"{path}: the file has {file_bytes} bytes, its header says {header.file_bytes}")
    check_shape(path, header.shape, header.weights)
    _check_entries(path, header)
    _check_extents(path, header, PREAMBLE_BYTES + len(encoded))
    return header


def check_shape(path: Path, shape: ModelShape, weights: WeightFormat) -> None:
    """Refuse a shape that no store can have.

    Raises:
        StoreError: a size out of range, or rows of a matrix that are not whole blocks.
    """
    for field in _SIZE_FIELDS:
        if not 1 <= getattr(shape, field) <= _MAX_SIZE:
            raise StoreError(f"{path}: {field} of the model's shape is not in 1..{_MAX_SIZE}")
    if shape.num_layers * shape.num_experts > _MAX_EXPERTS:
        raise StoreError(
            f"{path}: {shape.num_layers} layers of {shape.num_experts} experts, {_MAX_EXPERTS} in all is most"
        )
    if (
        shape.top_k > shape.num_experts
        or shape.num_heads % shape.num_kv_heads
        or shape.head_dim % 2  # rotary embedding turns pairs
        or min(shape.rms_norm_eps, shape.rope_theta) <= 0
    ):
        raise StoreError(f"{path}: the model's shape contradicts itself: {shape}")
    if weights in (WeightFormat.BF16, WeightFormat.F32):
        return
    for field in ("hidden_size", "expert_size"):
        if getattr(shape, field) % COLUMN_MULTIPLE:
            raise StoreError(
                f"{path}: {field} {getattr(shape, field)} does not divide into blocks of {COLUMN_MULTIPLE}, as "
                f"{weights} needs; choose bf16"
            )


def _header_at(
    shape: ModelShape, weights: WeightFormat, source: str, offset: int, tensor_scale: float
) -> StoreHeader:
    blob_bytes = blob_layout(shape, weights).num_bytes
    dense = []
    for name, dimensions in dense_shapes(shape).items():
        stored = dense_format(name, dimensions, weights)
        num_bytes = _dense_bytes(dimensions, stored)
        dense.append(
            DenseEntry(
                name=name,
                format=stored,
                shape=dimensions,
                offset=offset,
                num_bytes=num_bytes,
                xxh3="0" * 16,
            )
        )
        offset += num_bytes
    experts = []
    for layer in range(shape.num_layers):
        for expert in range(shape.num_experts):
            experts.append(
                ExpertEntry(
                    layer=layer,
                    expert=expert,
                    offset=offset,
                    num_bytes=blob_bytes,
                    xxh3="0" * 16,
                    tensor_scales=(tensor_scale,) * 3 if weights is WeightFormat.NVFP4 else None,
                )
            )
            offset += blob_bytes
    return StoreHeader(
        layout=LAYOUT_NAME,
        weights=weights,
        shape=shape,
        source=source,
        file_bytes=offset,
        dense=dense,
        experts=experts,
    )


def _check_entries(path: Path, header: StoreHeader) -> None:
    """Exactly the tensors and experts that the shape implies, each of the implied kind and size."""
    shape = header.shape
    # Counts first: what is built below is then no larger than the header itself.
    if len(header.experts) != shape.num_layers * shape.num_experts:
        raise StoreError(
            f"{path}: lists {len(header.experts)} experts, its shape has {shape.num_layers} x {shape.num_experts}"
        )
    implied = dense_shapes(shape)
    if len(header.dense) != len(implied) or {entry.name for entry in header.dense} != implied.keys():
        raise StoreError(f"{path}: its dense tensors are not those of its shape")
    for dense in header.dense:
        dimensions = implied[dense.name]
        stored = dense_format(dense.name, dimensions, header.weights)
        expected = _dense_bytes(dimensions, stored)
        if (dense.format, dense.shape, dense.num_bytes) != (stored, dimensions, expected):
            raise StoreError(
                f"{path}: dense tensor {dense.name} is {dense.format} {dense.shape} in {dense.num_bytes} bytes, "
                f"its shape implies {stored} {dimensions} in {expected}"
            )
    blob_bytes = blob_layout(shape, header.weights).num_bytes
    seen = set()
    for entry in header.experts:
        where = f"{path}: layer {entry.layer} expert {entry.expert}"
        if not (0 <= entry.layer < shape.num_layers and 0 <= entry.expert < shape.num_experts):
            raise StoreError(f"{where} is not in the model's shape")
        if entry.num_bytes != blob_bytes:
            raise StoreError(f"{where} has {entry.num_bytes} bytes, its shape and format imply {blob_bytes}")
        if not _scales_are_valid(entry.tensor_scales, header.weights):
            raise StoreError(
                f"{where} has tensor scales {entry.tensor_scales}, which {header.weights} cannot have"
            )
        seen.add(ExpertId(entry.layer, entry.expert))
    if len(seen) != len(header.experts):
        raise StoreError(f"{path}: lists an expert twice")


def _check_extents(path: Path, header: StoreHeader, start: int) -> None:
    """Sorted by offset, the extents tile the file from `start` to its end."""
    for extent in sorted(header.extents, key=lambda extent: extent.offset):
        if extent.offset != start or start % ALIGNMENT_BYTES:
            raise StoreError(f"{path}: an extent lies at byte {extent.offset}, where {start} was due")
        start += extent.num_bytes
    if start != header.file_bytes:
        raise StoreError(f"{path}: the extents end at byte {start}, the file at {header.file_bytes}")


def _scales_are_valid(scales: tuple[float, float, float] | None, weights: WeightFormat) -> bool:
    if weights is not WeightFormat.NVFP4:
        return scales is None
    limits = torch.finfo(torch.float32)
    return scales is not None and all(limits.tiny <= scale <= limits.max for scale in scales)


def _pad(num_bytes: int, multiple: int = ALIGNMENT_BYTES) -> int:
    return -(-num_bytes // multiple) * multiple
