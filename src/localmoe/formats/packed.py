"""Matrices packed for the processor: the layout of the store's file, of memory, and of the CPU kernels.

The rows (outputs) of a matrix [R, C] are taken in groups of 16, so that one vector instruction works on 16 rows at
once; the last group is filled up with rows of zeros, G = ceil(R / 16). Little-endian, and in C order:

| format | values | scales |
|---|---|---|
| MXFP4 | uint8 [G, C/32, 4, 16, 4], E2M1 | uint8 [G, C/32, 16], E8M0 |
| NVFP4 | as MXFP4 | uint8 [G, C/16, 16], E4M3; one float32 for the whole matrix beside them |
| INT8 | uint8 [G, C/4, 16, 4], code + 128 | float16 [G, C/32, 16] |
| BF16 | bfloat16 [G, ceil(C/2), 16, 2], an odd C filled up with a column of zeros | none |
| F32 | float32 [G, C, 16] | none |

FP4: byte i of row r in chunk j of block b holds the codes of columns 32b + 8j + i (low nibble) and 32b + 8j + 4 + i
(high nibble). Padding rows have value 0 and scale byte 0. In the three quantised formats 32 divides C.

In every format this is a matrix of 32-bit words [R, C / columns in a word], transposed within each group of rows.
`fp4` and `int8` say what the codes mean: packing and unpacking only move bits, so both are exact.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from localmoe.core.errors import CheckpointError
from localmoe.core.model import WeightFormat
from localmoe.formats.blocks import CHUNK_ELEMENTS, row_chunks
from localmoe.formats.fp4 import (
    MXFP4_BLOCK_SIZE,
    NVFP4_BLOCK_SIZE,
    Mxfp4Matrix,
    Nvfp4Matrix,
    quantize_mxfp4,
    quantize_nvfp4,
)
from localmoe.formats.int8 import INT8_BLOCK_SIZE, Int8Matrix, quantize_int8

GROUP_ROWS = 16
COLUMN_MULTIPLE = 32
"""The columns of a quantised matrix are a multiple of this, in NVFP4, too."""
_WORD_COLUMNS = {
    WeightFormat.NVFP4: 8,
    WeightFormat.MXFP4: 8,
    WeightFormat.INT8: 4,
    WeightFormat.BF16: 2,
    WeightFormat.F32: 1,
}
_WORD_BYTES = 4
_BLOCK_SIZES = {
    WeightFormat.NVFP4: NVFP4_BLOCK_SIZE,
    WeightFormat.MXFP4: MXFP4_BLOCK_SIZE,
    WeightFormat.INT8: INT8_BLOCK_SIZE,
}
_INT8_FLIP = -0x7F7F7F80
"""0x80 in each byte of a word, as a signed number: turns int8 into uint8 with 128 added, and back."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedMatrix:
    """A matrix [R, C] as the CPU kernels read it. Its tensors may be views of a file: never write to them.

    Raises:
        CheckpointError: the parts do not describe one matrix.
    """

    format: WeightFormat
    rows: int
    columns: int
    values: Tensor
    """uint8 [values bytes], contiguous."""
    scales: Tensor
    """uint8 [scales bytes], contiguous; empty for BF16 and F32."""
    tensor_scale: float = 1.0
    """A float32 number; 1.0 but for NVFP4."""

    def __post_init__(self) -> None:
        expected = packed_bytes(self.format, self.rows, self.columns)
        for tensor, num_bytes in zip((self.values, self.scales), expected, strict=True):
            if tensor.dtype != torch.uint8 or tensor.shape != (num_bytes,) or not tensor.is_contiguous():
                raise CheckpointError(
                    f"a packed {self.format} matrix of {self.rows} x {self.columns} has runs of {expected} bytes, "
                    f"not {tensor.dtype} {tuple(tensor.shape)}"
                )

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [R, C] in bfloat16, float16 or float32, as the format's codec gives them; always a copy."""
        words = _deinterleave(self.values.view(torch.int32), self.rows)
        if self.format in (WeightFormat.BF16, WeightFormat.F32):
            stored = torch.bfloat16 if self.format is WeightFormat.BF16 else torch.float32
            return words.view(stored)[:, : self.columns].to(dtype).contiguous()
        if self.format is WeightFormat.INT8:
            _flip_(words)
            scales = _deinterleave(self.scales.view(torch.float16), self.rows)
            return Int8Matrix(codes=words.view(torch.int8), scales=scales).dequantize(dtype)
        codes, scales = _fp4_codes(words), _deinterleave(self.scales, self.rows)
        if self.format is WeightFormat.MXFP4:
            return Mxfp4Matrix(codes=codes, scales=scales).dequantize(dtype)
        return Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=self.tensor_scale).dequantize(dtype)

    def check_finite(self) -> None:
        """Raises CheckpointError where a value or a block scale is NaN or infinite, or an E4M3 scale negative."""
        if self.format is WeightFormat.MXFP4:
            bad = self.scales == 0xFF
        elif self.format is WeightFormat.NVFP4:
            bad = self.scales > 0x7E  # NaN, or negative, which no quantiser writes and no kernel reads
        elif self.format is WeightFormat.INT8:
            bad = ~torch.isfinite(self.scales.view(torch.float16))
        elif self.format is WeightFormat.BF16:
            bad = ~torch.isfinite(self.values.view(torch.bfloat16))
        else:
            bad = ~torch.isfinite(self.values.view(torch.float32))
        if bad.any():
            raise CheckpointError("NaN or infinite values cannot be stored")


def packed_bytes(weights: WeightFormat, rows: int, columns: int) -> tuple[int, int]:
    """Bytes of the values and of the scales of a packed matrix.

    Raises:
        CheckpointError: there is no such matrix, as when 32 does not divide the columns of a quantised one.
    """
    block_size = _BLOCK_SIZES.get(weights)
    if rows < 1 or columns < 1 or (block_size and columns % COLUMN_MULTIPLE):
        raise CheckpointError(f"no matrix of {rows} x {columns} can be packed as {weights}")
    padded_rows = -(-rows // GROUP_ROWS) * GROUP_ROWS
    values_bytes = padded_rows * -(-columns // _WORD_COLUMNS[weights]) * _WORD_BYTES
    if block_size is None:
        return values_bytes, 0
    scale_bytes = 2 if weights is WeightFormat.INT8 else 1
    return values_bytes, padded_rows * (columns // block_size) * scale_bytes


def pack_matrix(values_RC: Tensor, weights: WeightFormat) -> PackedMatrix:
    """Round a float matrix to a format and pack it.

    Raises:
        CheckpointError: not a float matrix, columns that blocks do not divide, or NaN or infinite values.
    """
    if weights in _QUANTIZE_AND_PACK:
        return _QUANTIZE_AND_PACK[weights](values_RC)
    if values_RC.dim() != 2 or not values_RC.is_floating_point():
        raise CheckpointError(f"not a matrix of floats but {values_RC.dtype} of shape {tuple(values_RC.shape)}")
    rows, columns = values_RC.shape
    if weights is WeightFormat.BF16:
        values_RC = functional.pad(values_RC.to(torch.bfloat16), (0, columns % 2))
    else:
        values_RC = values_RC.to(torch.float32)
    packed = PackedMatrix(
        format=weights,
        rows=rows,
        columns=columns,
        values=_interleave(values_RC.contiguous().view(torch.int32)).view(torch.uint8),
        scales=torch.empty(0, dtype=torch.uint8),
    )
    packed.check_finite()
    return packed


def pack_mxfp4(matrix: Mxfp4Matrix) -> PackedMatrix:
    """Pack a matrix that is MXFP4 already; exact."""
    return _pack_fp4(WeightFormat.MXFP4, matrix.codes, matrix.scales, 1.0)


def pack_nvfp4(matrix: Nvfp4Matrix) -> PackedMatrix:
    """Pack a matrix that is NVFP4 already; exact. Raises CheckpointError where 32 does not divide its columns."""
    return _pack_fp4(WeightFormat.NVFP4, matrix.codes, matrix.scales, matrix.tensor_scale)


def pack_int8(matrix: Int8Matrix) -> PackedMatrix:
    """Pack a matrix that is INT8 already; exact."""
    rows, columns = matrix.shape
    words = _interleave(matrix.codes.contiguous().view(torch.int32))
    _flip_(words)
    return PackedMatrix(
        format=WeightFormat.INT8,
        rows=rows,
        columns=columns,
        values=words.view(torch.uint8),
        scales=_interleave(matrix.scales).view(torch.uint8),
    )


_QUANTIZE_AND_PACK: dict[WeightFormat, Callable[[Tensor], PackedMatrix]] = {
    WeightFormat.MXFP4: lambda values_RC: pack_mxfp4(quantize_mxfp4(values_RC)),
    WeightFormat.NVFP4: lambda values_RC: pack_nvfp4(quantize_nvfp4(values_RC)),
    WeightFormat.INT8: lambda values_RC: pack_int8(quantize_int8(values_RC)),
}


def _pack_fp4(weights: WeightFormat, codes: Tensor, scales: Tensor, tensor_scale: float) -> PackedMatrix:
    rows, columns = codes.shape[0], codes.shape[1] * 2
    packed_bytes(weights, rows, columns)  # refuses columns that are not whole words
    words = _interleave(codes.contiguous().view(torch.int32))
    _swap_(words, 0x0000FF00, 8)
    _swap_(words, 0x00F000F0, 4)
    return PackedMatrix(
        format=weights,
        rows=rows,
        columns=columns,
        values=words.view(torch.uint8),
        scales=_interleave(scales),
        tensor_scale=tensor_scale,
    )


def _fp4_codes(words_RW: Tensor) -> Tensor:
    """Undo the nibbles' shuffle: words [R, C/8], which are overwritten, to the codec's bytes [R, C/2]."""
    _swap_(words_RW, 0x00F000F0, 4)
    _swap_(words_RW, 0x0000FF00, 8)
    return words_RW.view(torch.uint8)


# Everything below works in pieces too small for torch to split over threads: moving bits is fast, waiting is not.


def _swap_(words: Tensor, mask: int, distance: int) -> None:
    """In each word, swap the bits under `mask` with those `distance` above them.

    Bytes 1 and 2 swapped, then nibbles 1 and 2 of each half, take columns 0 1 2 3 4 5 6 7, in nibbles from the
    lowest, to 0 4 1 5 2 6 3 7 (Warren, Hacker's Delight, section 7-2).
    """
    for part in _parts(words):
        difference = part.bitwise_right_shift(distance).bitwise_xor_(part).bitwise_and_(mask)
        part.bitwise_xor_(difference).bitwise_xor_(difference.bitwise_left_shift_(distance))


def _flip_(words: Tensor) -> None:
    for part in _parts(words):
        part.bitwise_xor_(_INT8_FLIP)


def _parts(words: Tensor) -> Iterator[Tensor]:
    flat = words.view(-1)
    return (flat[start : start + CHUNK_ELEMENTS] for start in range(0, len(flat), CHUNK_ELEMENTS))


def _interleave(units_RU: Tensor) -> Tensor:
    """Transpose within groups of 16 rows, the last filled up with zeros: [R, U] to [G * U * 16]."""
    rows, num_units = units_RU.shape
    num_full, left = divmod(rows, GROUP_ROWS)
    groups = units_RU[: num_full * GROUP_ROWS].view(num_full, GROUP_ROWS, num_units).transpose(1, 2)
    out = units_RU.new_empty(num_full + (left > 0), num_units, GROUP_ROWS)
    for chunk in row_chunks(num_full, GROUP_ROWS * num_units):
        out[chunk] = groups[chunk]
    if left:
        out[num_full, :, :left] = units_RU[num_full * GROUP_ROWS :].T
        out[num_full, :, left:] = 0
    return out.view(-1)


def _deinterleave(units: Tensor, rows: int) -> Tensor:
    """Undo `_interleave`: [G * U * 16] to a new tensor [R, U]."""
    num_groups = -(-rows // GROUP_ROWS)
    groups = units.view(num_groups, -1, GROUP_ROWS).transpose(1, 2)
    out = torch.empty_like(groups, memory_format=torch.contiguous_format)
    for chunk in row_chunks(num_groups, GROUP_ROWS * groups.shape[2]):
        out[chunk] = groups[chunk]
    return out.view(num_groups * GROUP_ROWS, -1)[:rows]
