"""Packed matrices times tokens on the device, the weights expanded in registers.

A program multiplies 64 rows of weights, in the store's own layout, by 16 or 64 tokens: `acc_RT += w_RK @ x_KT` on
tensor cores with float32 sums. Weights are the left factor, so that one token costs as little padding as the hardware
allows, and every width of T takes the same instructions in the same order of columns. There is no second formula for
few tokens: on CUDA cores, n tokens cost n instructions a weight beside those that expand it, and an H200 reads 4-bit
weights so fast that it can issue some four for each; tensor cores take up to 16 tokens for the price of one.

Arithmetic: inputs are rounded to bfloat16. Weights in MXFP4, NVFP4 and BF16 are exact in bfloat16 (but for MXFP4
scales from 2^114 on, which become infinite), INT8's are rounded to it once; NVFP4's tensor scale multiplies the
float32 sum. So an output differs from the exact product by at most `2^-8 * sum |x| |w|`, for INT8 by twice that, and
float32 sums. `exact` products, and those with F32 weights, take float32 inputs, multiplied on tensor cores as three
products of TF32 parts: nearly float32's precision.

Sums are of whole rows in order of columns, 64 or 128 of them at a time, whatever the other tokens are.

Shape suffixes: R rows of a tile, K columns of a step, T tokens of a tile, B bytes of a step, S scales of a step.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, import-untyped"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from localmoe.core.model import WeightFormat
from localmoe.formats.packed import GROUP_ROWS, PackedMatrix

# What kernels know formats by.
MXFP4 = tl.constexpr(0)
NVFP4 = tl.constexpr(1)
INT8 = tl.constexpr(2)
BF16 = tl.constexpr(3)
F32 = tl.constexpr(4)

LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
"""Options of every launch. Products and sums are not fused behind our back, so that two kernels that compute the same
thing get the same bits; matrix instructions are what they are."""
TILE_ROWS = 64
FEW_TOKENS = 16
MANY_TOKENS = 64

_KERNEL_FORMATS = {
    WeightFormat.MXFP4: MXFP4.value,
    WeightFormat.NVFP4: NVFP4.value,
    WeightFormat.INT8: INT8.value,
    WeightFormat.BF16: BF16.value,
    WeightFormat.F32: F32.value,
}
_UNITS = {
    WeightFormat.MXFP4: (torch.uint8, torch.uint8),
    WeightFormat.NVFP4: (torch.uint8, torch.uint8),
    WeightFormat.INT8: (torch.uint8, torch.float16),
    WeightFormat.BF16: (torch.bfloat16, torch.uint8),
    WeightFormat.F32: (torch.float32, torch.uint8),
}


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a format's products are cut up."""

    format: int
    """As kernels know it."""
    exact: bool
    """Whether inputs and weights stay float32."""
    step_columns: int
    num_stages: int

    @property
    def input_dtype(self) -> torch.dtype:
        return torch.float32 if self.exact else torch.bfloat16

    @property
    def fp4(self) -> bool:
        """Whether inputs are in FP4's order of columns, see `input_place`."""
        return self.format in (MXFP4.value, NVFP4.value)


def tiling(weights: WeightFormat, *, exact: bool = False) -> Tiling:
    """How to multiply by weights of this format; `exact` is for BF16 and F32, which is always so."""
    assert not exact or weights in (WeightFormat.BF16, WeightFormat.F32)
    exact = exact or weights is WeightFormat.F32
    if exact:
        step_columns, num_stages = 32, 2
    else:
        step_columns, num_stages = (64, 4) if weights is WeightFormat.BF16 else (128, 4)
    return Tiling(format=_KERNEL_FORMATS[weights], exact=exact, step_columns=step_columns, num_stages=num_stages)


def units(weights: WeightFormat) -> tuple[torch.dtype, torch.dtype]:
    """Types in which kernels read the bytes of values and of scales."""
    return _UNITS[weights]


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A copy of an array on the device; the host does not wait for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor.clone()
    return tensor.pin_memory().to(device, non_blocking=True)  # torch keeps the pinned memory while it is read


def tile_tokens(num_tokens: int) -> int:
    return FEW_TOKENS if num_tokens <= FEW_TOKENS else MANY_TOKENS


class DeviceMatrices:
    """Packed matrices of one format and number of columns on the device, one below the other.

    The rows of each are filled up to whole groups of 16, as in its packed form: `offsets` says where each begins in
    an output of `rows` numbers a token.
    """

    def __init__(self, matrices: list[PackedMatrix], device: torch.device, *, exact: bool = False) -> None:
        formats, columns = {m.format for m in matrices}, {m.columns for m in matrices}
        if len(formats) > 1 or len(columns) > 1:
            raise ValueError(f"matrices of formats {formats} and columns {columns} cannot be multiplied together")
        self.format, self.columns = matrices[0].format, matrices[0].columns
        self.tiling = tiling(self.format, exact=exact)
        values_unit, scales_unit = units(self.format)
        self.values = torch.cat([m.values for m in matrices]).to(device).view(values_unit)
        self.scales = torch.cat([m.scales for m in matrices]).to(device).view(scales_unit)
        groups = [-(-m.rows // GROUP_ROWS) for m in matrices]
        tensor_scales = torch.tensor([m.tensor_scale for m in matrices]).repeat_interleave(torch.tensor(groups))
        self.tensor_scales = tensor_scales.to(device)
        """float32, of each group of rows."""
        starts = [sum(groups[:i]) * GROUP_ROWS for i in range(len(groups))]
        self.offsets = tuple(starts)
        self.rows = starts[-1] + matrices[-1].rows

    def multiply(self, x_TC: Tensor, out_TR: Tensor, *, add: bool = False) -> None:
        """Write `x @ weights.T` to float32 out [T, rows], or add it; x as `prepare` gives it for our tiling."""
        num_tokens, tile = len(x_TC), tile_tokens(len(x_TC))
        grid = (triton.cdiv(self.rows, TILE_ROWS), triton.cdiv(num_tokens, tile))
        _linear[grid](
            self.values,
            self.scales,
            self.tensor_scales,
            x_TC,
            out_TR,
            num_tokens,
            self.rows,
            self.columns,
            out_TR.stride(0),
            FORMAT=self.tiling.format,
            EXACT=self.tiling.exact,
            ADD=add,
            R=TILE_ROWS,
            K=self.tiling.step_columns,
            T=tile,
            num_stages=self.tiling.num_stages,
            **LAUNCH,
        )


@triton.jit
def input_place(columns, FP4: tl.constexpr):
    """Where columns lie in a token's input: FP4 holds columns 8j + i and 8j + 4 + i in one byte, so that they are
    neighbours there; otherwise in their own order."""
    place = columns
    if FP4:
        place = (columns & ~7) | ((columns & 3) << 1) | ((columns >> 2) & 1)
    return place


@triton.jit
def store_input(to, columns, x, mask, FP4: tl.constexpr):
    """Store numbers of a token's input, which begins at `to`, by their columns."""
    if to.dtype.element_ty == tl.bfloat16:
        tl.store(to + input_place(columns, FP4), to_bf16(x), mask=mask)
    else:
        tl.store(to + input_place(columns, FP4), x, mask=mask)


INTERPRETED = tl.constexpr(not isinstance(input_place, triton.JITFunction))
"""Whether Triton's interpreter runs the kernels, for tests: its dot takes bfloat16 numbers for integers."""


@triton.jit
def dot(a, b, acc, EXACT: tl.constexpr):
    """`acc + a @ b`, of float32 or of bfloat16 numbers."""
    if EXACT:
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    elif INTERPRETED:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def to_bf16(x):
    """Rounded to nearest, ties to even."""
    if INTERPRETED:  # it cuts off
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def e2m1(codes):
    """2^-14 times the value of codes, the low four bits, in float32: their bits are a float16's of that value."""
    bits = ((codes & 7) << 9) | ((codes & 8) << 12)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def block_scales(stored, FORMAT: tl.constexpr):
    """Scales in float32; of FP4 formats 2^14 times them, see `e2m1`."""
    if FORMAT == MXFP4:
        scales = (tl.minimum(stored.to(tl.int32) + 14, 255) << 23).to(tl.float32, bitcast=True)
    elif FORMAT == NVFP4:
        # The bits are a float16's of 2^-8 times the value.
        bits = (stored.to(tl.int32) & 0x7F) << 7
        scales = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 4194304.0
    else:
        scales = stored.to(tl.float32)
    return scales


@triton.jit
def _weights(
    values, scales, rows_R, in_R, start, columns, FORMAT: tl.constexpr, EXACT: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Weights [R, K] of these rows and the columns from `start` on, zero where there are none."""
    group_R = (rows_R // 16).to(tl.int64)
    lane_R = rows_R % 16
    if FORMAT >= BF16:
        WORD: tl.constexpr = 2 if FORMAT == BF16 else 1
        at_K = start + tl.arange(0, K)
        row_R = group_R * (columns + columns % WORD) * 16 + lane_R * WORD
        column_K = (at_K // WORD) * (16 * WORD) + at_K % WORD
        mask = in_R[:, None] & (at_K < columns)[None, :]
        w_RK = tl.load(values + row_R[:, None] + column_K[None, :], mask=mask, other=0.0)
        if EXACT:
            w_RK = w_RK.to(tl.float32)
    else:
        PACKED: tl.constexpr = 1 if FORMAT == INT8 else 2
        BLOCK: tl.constexpr = 16 if FORMAT == NVFP4 else 32
        B: tl.constexpr = K // PACKED
        S: tl.constexpr = K // BLOCK
        at_B = start // PACKED + tl.arange(0, B)
        row_R = group_R * (columns // PACKED) * 16 + lane_R * 4
        byte_B = (at_B // 4) * 64 + at_B % 4
        mask = in_R[:, None] & (at_B < columns // PACKED)[None, :]
        codes_RB = tl.load(values + row_R[:, None] + byte_B[None, :], mask=mask, other=0).to(tl.int32)
        at_S = start // BLOCK + tl.arange(0, S)
        scale_R = group_R * (columns // BLOCK) * 16 + lane_R
        mask = in_R[:, None] & (at_S < columns // BLOCK)[None, :]
        stored_RS = tl.load(scales + scale_R[:, None] + at_S[None, :] * 16, mask=mask, other=0)
        # A block's scale beside each of its bytes; a reshape moves nothing.
        scale_RB = tl.broadcast_to(block_scales(stored_RS, FORMAT)[:, :, None], (R, S, B // S)).reshape(R, B)
        if FORMAT == INT8:
            w_RK = to_bf16((codes_RB - 128).to(tl.float32) * scale_RB)
        else:
            low_RB = (e2m1(codes_RB) * scale_RB).to(tl.bfloat16)
            high_RB = (e2m1(codes_RB >> 4) * scale_RB).to(tl.bfloat16)
            w_RK = tl.join(low_RB, high_RB).reshape(R, K)
    return w_RK


@triton.jit
def product(
    values, scales, first_row, rows, columns, x, x_rows_T, in_T,
    FORMAT: tl.constexpr, EXACT: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Sums [R, T] float32, without tensor scale: the rows of a packed matrix from `first_row` on, times inputs.

    Args:
        values, scales: of the matrix, in units of its format.
        rows: of the matrix; sums of what is beyond them are zero.
        x: inputs, `columns` a row, each at its `input_place`.
        x_rows_T: int64, the row of x of each token.
        in_T: whether there is such a token.
    """
    rows_R = first_row + tl.arange(0, R)
    in_R = rows_R < rows
    acc_RT = tl.zeros((R, T), dtype=tl.float32)
    for start in range(0, columns, K):
        at_K = start + tl.arange(0, K)
        w_RK = _weights(values, scales, rows_R, in_R, start, columns, FORMAT, EXACT, R, K)
        mask = (at_K < columns)[:, None] & in_T[None, :]
        x_KT = tl.load(x + x_rows_T[None, :] * columns + at_K[:, None], mask=mask, other=0.0)
        acc_RT = dot(w_RK, x_KT, acc_RT, EXACT)
    return acc_RT


@triton.jit(do_not_specialize=["num_tokens"])
def _linear(
    values, scales, tensor_scales, x, out, num_tokens, rows, columns, out_stride,
    FORMAT: tl.constexpr, EXACT: tl.constexpr, ADD: tl.constexpr, R: tl.constexpr, K: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * R
    at_T = tl.program_id(1) * T + tl.arange(0, T)
    in_T = at_T < num_tokens
    acc_RT = product(
        values, scales, first_row, rows, columns, x, at_T.to(tl.int64), in_T, FORMAT, EXACT, R, K, T
    )  # fmt: skip
    rows_R = first_row + tl.arange(0, R)
    mask = (rows_R < rows)[:, None] & in_T[None, :]
    if FORMAT == NVFP4:
        acc_RT *= tl.load(tensor_scales + rows_R // 16, mask=rows_R < rows, other=0.0)[:, None]
    to = out + at_T.to(tl.int64)[None, :] * out_stride + rows_R[:, None]
    if ADD:
        acc_RT += tl.load(to, mask=mask, other=0.0)
    tl.store(to, acc_RT, mask=mask)
