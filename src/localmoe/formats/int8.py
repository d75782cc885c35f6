"""Reference codec for INT8 in blocks of 32, in torch.

A matrix [R, C] is stored as signed bytes with one float16 scale per block of 32 neighbours along the last axis; an
element's value is its byte times its block's scale. This is the information of GGUF's Q8_0
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), so that those blocks are taken over exactly.
"""

from dataclasses import dataclass

import torch

from localmoe.core.errors import CheckpointError
from localmoe.formats.blocks import check_finite, check_values, row_chunks

INT8_BLOCK_SIZE = 32

_MAX_CODE = 127
_ROUNDER = 1.5 * 2.0**23
"""Float32 numbers within 2^22 of this are the integers: a sum that lands there is rounded, ties to even."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Int8Matrix:
    """A matrix [R, C] in INT8.

    Raises:
        CheckpointError: codes and scales do not fit together.
    """

    codes: torch.Tensor
    """int8 [R, C]. Quantising gives -127 to 127; -128 is allowed, since Q8_0 can hold it."""
    scales: torch.Tensor
    """float16 [R, C/32]."""

    def __post_init__(self) -> None:
        codes, scales = self.codes, self.scales
        fits = (
            codes.dtype == torch.int8
            and scales.dtype == torch.float16
            and codes.dim() == scales.dim() == 2
            and codes.shape == (scales.shape[0], scales.shape[1] * INT8_BLOCK_SIZE)
            and codes.numel() > 0
        )
        if not fits:
            raise CheckpointError(
                f"INT8 codes {codes.dtype} {tuple(codes.shape)} and scales {scales.dtype} {tuple(scales.shape)} "
                f"do not describe one matrix in blocks of {INT8_BLOCK_SIZE}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """Values [R, C] in bfloat16, float16 or float32: exact in float32, rounded once from that to the others."""
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"INT8 dequantises to bfloat16, float16 or float32, not to {dtype}")
        rows, columns = self.shape
        values = torch.empty(rows, columns, dtype=dtype)
        for chunk in row_chunks(rows, columns):
            blocks = self.codes[chunk].float().view(-1, columns // INT8_BLOCK_SIZE, INT8_BLOCK_SIZE)
            values[chunk] = blocks.mul_(self.scales[chunk].float()[..., None]).view(-1, columns)
        return values


def quantize_int8(values_RC: torch.Tensor) -> Int8Matrix:
    """Round a matrix to INT8.

    The scale of a block is amax / 127, rounded to float16; elements are divided by it, rounded to the nearest
    integer, ties to even, and clipped to -127..127. A block whose scale rounds to zero becomes zeros.

    Raises:
        CheckpointError: not a float matrix, a column count that 32 does not divide, NaN or infinite values, or
            values so large that their scale is no float16 number (over about 8.3 million).
    """
    rows, columns = check_values(values_RC, INT8_BLOCK_SIZE, "INT8")
    num_blocks = columns // INT8_BLOCK_SIZE
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, num_blocks, dtype=torch.float16)
    for chunk in row_chunks(rows, columns):
        blocks = values_RC[chunk].contiguous().float().view(-1, num_blocks, INT8_BLOCK_SIZE)
        amax = blocks.abs().amax(dim=-1)
        check_finite(amax, "INT8")
        scales[chunk] = amax.div_(_MAX_CODE)
        divisors = scales[chunk].float()
        if torch.isinf(divisors).any():
            raise CheckpointError("values are too large for INT8: the scale of a block is no float16 number")
        divisors[divisors == 0] = torch.inf
        # Adding and subtracting rounds like round(), which is split over threads however few elements there are.
        rounded = (blocks / divisors[..., None]).add_(_ROUNDER).sub_(_ROUNDER).clamp_(-_MAX_CODE, _MAX_CODE)
        codes[chunk] = rounded.view(-1, columns).to(torch.int8)
    return Int8Matrix(codes=codes, scales=scales)
