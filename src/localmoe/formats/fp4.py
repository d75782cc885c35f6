"""Reference codecs for the two four-bit block formats, MXFP4 and NVFP4, in torch.

Both store a matrix [R, C] as E2M1 elements with one scale per block of neighbours along the last axis:

| format | block | block scale | tensor scale | value of an element |
|---|---|---|---|---|
| MXFP4 (OCP Microscaling Formats v1.0) | 32 | E8M0, 2^(byte - 127), 255 is NaN | none | E2M1 * E8M0 |
| NVFP4 (NVIDIA's notes) | 16 | E4M3 (OFP8 v1.0), 127 and 255 are NaN | float32 | E2M1 * E4M3 * tensor scale |

Codes: element c of a row lies in byte c // 2, low nibble for even c, high nibble for odd c. Bit 3 of a nibble is
the sign, bits 2 and 1 the exponent (bias 1), bit 0 the mantissa; codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6.
Codes are uint8 [R, C/2], scales the bit patterns as uint8 [R, C/32] or [R, C/16], row-major.

Rounding is to the nearest E2M1 value, ties to the even code, larger magnitudes to 6. The sign of zero is kept.
"""

import math
from dataclasses import dataclass

import torch

from localmoe.core.errors import CheckpointError
from localmoe.formats.blocks import check_finite, check_values, row_chunks

MXFP4_BLOCK_SIZE = 32
NVFP4_BLOCK_SIZE = 16
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each code."""

_E2M1_MAX = 6.0
_E4M3_MAX = 448.0
_MIN_NORMAL = torch.finfo(torch.float32).tiny
_ROUNDER = 2.0**23
"""Float32 numbers from here to twice this are the integers: a sum that lands there is rounded, ties to even."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mxfp4Matrix:
    """A matrix [R, C] in MXFP4.

    Raises:
        CheckpointError: codes and scales do not fit together.
    """

    codes: torch.Tensor
    """uint8 [R, C/2], two elements a byte."""
    scales: torch.Tensor
    """uint8 [R, C/32], E8M0."""

    def __post_init__(self) -> None:
        _check_parts(self.codes, self.scales, MXFP4_BLOCK_SIZE)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Values [R, C] in bfloat16, float16 or float32, rounded once from the exact product.

        Exact in bfloat16 and float32, but for products of 2^128 and more, which become infinite. A block whose
        scale is NaN is NaN.
        """
        scale_values = torch.tensor([math.ldexp(1.0, byte - 127) for byte in range(255)] + [math.nan])
        return _dequantize(self.codes, self.scales, scale_values, 1.0, dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class Nvfp4Matrix:
    """A matrix [R, C] in NVFP4.

    Raises:
        CheckpointError: codes and scales do not fit together.
    """

    codes: torch.Tensor
    """uint8 [R, C/2], two elements a byte."""
    scales: torch.Tensor
    """uint8 [R, C/16], E4M3."""
    tensor_scale: float
    """A float32 number."""

    def __post_init__(self) -> None:
        _check_parts(self.codes, self.scales, NVFP4_BLOCK_SIZE)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1] * 2

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Values [R, C] in bfloat16, float16 or float32.

        E2M1 * E4M3 is exact; times the tensor scale it is rounded to float32, then to `dtype`.
        """
        scale_values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return _dequantize(self.codes, self.scales, scale_values, self.tensor_scale, dtype)


def quantize_mxfp4(values_RC: torch.Tensor) -> Mxfp4Matrix:
    """Round a matrix to MXFP4 as section 6.3 of the specification says.

    The scale of a block is 2^(floor(log2(amax)) - 2), at least 2^-127 (also for a block of zeros); elements above
    6 times the scale become 6.

    Raises:
        CheckpointError: not a float matrix, a column count that 32 does not divide, or NaN or infinite values.
    """
    rows, columns = check_values(values_RC, MXFP4_BLOCK_SIZE, "FP4")
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows, columns // MXFP4_BLOCK_SIZE, dtype=torch.uint8)
    for chunk in row_chunks(rows, columns):
        blocks = values_RC[chunk].contiguous().float().view(-1, columns // MXFP4_BLOCK_SIZE, MXFP4_BLOCK_SIZE)
        amax = blocks.abs().amax(dim=-1)
        check_finite(amax, "FP4")
        # A float32's biased exponent is floor(log2) + 127: two less is the byte. Subnormals and zero clamp to 0.
        bytes_int = ((amax.view(torch.int32) >> 23) - 2).clamp_(min=0)
        reciprocals = ((254 - bytes_int) << 23).view(torch.float32)
        scales[chunk] = bytes_int.to(torch.uint8)
        codes[chunk] = pack_codes(_round_to_e2m1(blocks * reciprocals[..., None]).view(-1, columns))
    return Mxfp4Matrix(codes=codes, scales=scales)


def quantize_nvfp4(values_RC: torch.Tensor) -> Nvfp4Matrix:
    """Round a matrix to NVFP4 by plain rounding.

    The tensor scale is amax / (6 * 448), at least the smallest normal float32 (also for a matrix of zeros). A
    block's scale is its amax / 6 / tensor scale, rounded to E4M3; elements are divided by the product of both. A
    block whose scale rounds to zero becomes zeros with the signs of its elements.

    Raises:
        CheckpointError: not a float matrix, a column count that 16 does not divide, or NaN or infinite values.
    """
    rows, columns = check_values(values_RC, NVFP4_BLOCK_SIZE, "FP4")
    matrix_amax = (
        torch.stack([values_RC[chunk].abs().amax() for chunk in row_chunks(rows, columns)]).amax().float()
    )
    check_finite(matrix_amax, "FP4")
    tensor_scale = (matrix_amax / (_E2M1_MAX * _E4M3_MAX)).clamp_(min=_MIN_NORMAL)
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows, columns // NVFP4_BLOCK_SIZE, dtype=torch.uint8)
    for chunk in row_chunks(rows, columns):
        blocks = values_RC[chunk].contiguous().float().view(-1, columns // NVFP4_BLOCK_SIZE, NVFP4_BLOCK_SIZE)
        wanted = blocks.abs().amax(dim=-1).div_(_E2M1_MAX).div_(tensor_scale)
        block_scales = wanted.clamp_(max=_E4M3_MAX).to(torch.float8_e4m3fn)
        scales[chunk] = block_scales.view(torch.uint8)
        divisors = block_scales.float().mul_(tensor_scale)
        divisors[divisors == 0] = torch.inf
        codes[chunk] = pack_codes(_round_to_e2m1(blocks / divisors[..., None]).view(-1, columns))
    return Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=tensor_scale.item())


def pack_codes(codes_RC: torch.Tensor) -> torch.Tensor:
    """Pack contiguous uint8 codes [R, C], each below 16, into bytes [R, C/2], even columns in the low nibbles."""
    pairs = codes_RC.view(torch.int16)  # little-endian: the even column is the low byte
    return (pairs | (pairs >> 4)).bitwise_and_(0xFF).to(torch.uint8)


def unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack_codes`: bytes [R, C/2] to uint8 codes [R, C]."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).view(packed.shape[0], -1)


def _round_to_e2m1(scaled: torch.Tensor) -> torch.Tensor:
    """Nearest codes (uint8, same shape) of float32 values; the argument is overwritten."""
    signs = torch.signbit(scaled).view(torch.uint8) << 3
    magnitude = scaled.abs_()
    # E2M1 has steps of 1/2, 1 and 2 in [0, 2), [2, 4) and [4, 6]. Rounding to each of them gives three candidate
    # codes, of which the least is the right one; ties go to the even integer, which is the even code.
    # Adding 2^23 rounds like round(), which is split over threads however few elements there are.
    codes = (magnitude * 2).add_(_ROUNDER).sub_(_ROUNDER)
    torch.minimum(codes, magnitude.add(_ROUNDER).sub_(_ROUNDER - 2), out=codes)
    torch.minimum(codes, magnitude.mul_(0.5).add_(_ROUNDER).sub_(_ROUNDER - 4), out=codes)
    return codes.clamp_(max=7).to(torch.uint8).bitwise_or_(signs)


def _dequantize(
    codes: torch.Tensor, scales: torch.Tensor, scale_values: torch.Tensor, tensor_scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Look up every pair of elements by (scale byte, code byte) in a table of the 65,536 pairs of values."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"FP4 dequantises to bfloat16, float16 or float32, not to {dtype}")
    nibbles = unpack_codes(torch.arange(256, dtype=torch.uint8).view(256, 1)).int()
    pairs = torch.tensor(E2M1_VALUES)[nibbles].view(-1)
    table = torch.empty(256, 512, dtype=dtype)
    for chunk in row_chunks(256, 512):
        table[chunk] = scale_values[chunk, None] * pairs * tensor_scale
    # Two values travel as one integer, since a gather of single words is several times faster than one of rows.
    words = table.view(-1).view(torch.int64 if dtype == torch.float32 else torch.int32)
    rows, num_blocks = scales.shape
    row_bytes = codes.shape[1]
    out = torch.empty(rows, row_bytes, dtype=words.dtype)
    for chunk in row_chunks(rows, row_bytes):
        bases = scales[chunk].to(torch.int32)[..., None] << 8
        index = bases + codes[chunk].reshape(-1, num_blocks, row_bytes // num_blocks)
        torch.index_select(words, 0, index.view(-1), out=out[chunk].view(-1))
    return out.view(dtype)


def _check_parts(codes: torch.Tensor, scales: torch.Tensor, block_size: int) -> None:
    fits = (
        codes.dtype == scales.dtype == torch.uint8
        and codes.dim() == scales.dim() == 2
        and codes.shape[0] == scales.shape[0]
        and codes.shape[1] * 2 == scales.shape[1] * block_size
        and codes.numel() > 0
    )
    if not fits:
        raise CheckpointError(
            f"FP4 codes {codes.dtype} {tuple(codes.shape)} and scales {scales.dtype} {tuple(scales.shape)} "
            f"do not describe one matrix in blocks of {block_size}"
        )
