"""Packed matrices: every element where the layout says, found by a slow loop; packing and unpacking are exact."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localmoe.core.errors import CheckpointError
from localmoe.core.model import WeightFormat
from localmoe.formats.fp4 import E2M1_VALUES, Mxfp4Matrix, Nvfp4Matrix
from localmoe.formats.int8 import Int8Matrix
from localmoe.formats.packed import PackedMatrix, pack_int8, pack_matrix, pack_mxfp4, pack_nvfp4, packed_bytes

QUANTIZED = [WeightFormat.NVFP4, WeightFormat.MXFP4, WeightFormat.INT8]


def random_bytes(seed: int, *shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def random_packed(weights: WeightFormat, rows: int, columns: int, seed: int = 0) -> tuple[PackedMatrix, Tensor]:
    """A packed matrix of random codes, and its values as the format's codec gives them."""
    if weights is WeightFormat.MXFP4:
        scales = random_bytes(seed, rows, columns // 32) % 250
        mxfp4 = Mxfp4Matrix(codes=random_bytes(seed + 1, rows, columns // 2), scales=scales)
        return pack_mxfp4(mxfp4), mxfp4.dequantize(torch.float32)
    if weights is WeightFormat.NVFP4:
        scales = random_bytes(seed, rows, columns // 16) % 127
        codes = random_bytes(seed + 1, rows, columns // 2)
        nvfp4 = Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=0.375)
        return pack_nvfp4(nvfp4), nvfp4.dequantize(torch.float32)
    if weights is WeightFormat.INT8:
        scales_f16 = torch.randn(rows, columns // 32, generator=torch.Generator().manual_seed(seed)).half()
        int8 = Int8Matrix(codes=random_bytes(seed + 1, rows, columns).view(torch.int8), scales=scales_f16)
        return pack_int8(int8), int8.dequantize(torch.float32)
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    return pack_matrix(values, weights), values


def e4m3(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -size if byte >> 7 else size


def slow_value(packed: PackedMatrix, row: int, column: int) -> float:
    """One element, found by counting bytes as the module's table says."""
    values, scales = packed.values.numpy().tobytes(), packed.scales.numpy().tobytes()
    group, r = divmod(row, 16)
    columns = packed.columns
    if packed.format is WeightFormat.F32:
        return float(struct.unpack_from("<f", values, ((group * columns + column) * 16 + r) * 4)[0])
    if packed.format is WeightFormat.BF16:
        pair = (group * -(-columns // 2) + column // 2) * 16 + r
        return float(struct.unpack("<f", b"\0\0" + values[pair * 4 + column % 2 * 2 :][:2])[0])
    block, within = divmod(column, 32)
    at_block = group * (columns // 32) + block
    if packed.format is WeightFormat.INT8:
        code = values[((group * (columns // 4) + column // 4) * 16 + r) * 4 + column % 4] - 128
        return float(code * struct.unpack_from("<e", scales, (at_block * 16 + r) * 2)[0])
    chunk, place = divmod(within, 8)
    byte = values[((at_block * 4 + chunk) * 16 + r) * 4 + place % 4]
    element = E2M1_VALUES[byte >> 4 if place >= 4 else byte & 15]
    if packed.format is WeightFormat.MXFP4:
        return element * 2.0 ** (scales[at_block * 16 + r] - 127)
    scale = e4m3(scales[(group * (columns // 16) + column // 16) * 16 + r])
    return element * scale * packed.tensor_scale


@pytest.mark.parametrize("weights", list(WeightFormat))
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (16, 64), (19, 96), (33, 32)])
def test_each_element_lies_where_the_layout_says(weights: WeightFormat, rows: int, columns: int) -> None:
    packed, values = random_packed(weights, rows, columns)
    found = [[slow_value(packed, row, column) for column in range(columns)] for row in range(rows)]
    assert torch.equal(torch.tensor(found, dtype=torch.float64).float(), values)


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_padding_rows_are_zeros(weights: WeightFormat) -> None:
    packed, _ = random_packed(weights, 19, 64)
    padding = 0x80 if weights is WeightFormat.INT8 else 0
    words = packed.values.view(2, -1, 16, 4)
    assert (words[1, :, 3:] == padding).all()
    if weights in QUANTIZED:
        item = 2 if weights is WeightFormat.INT8 else 1
        assert not packed.scales.view(2, -1, 16, item)[1, :, 3:].any()


@pytest.mark.parametrize("weights", [WeightFormat.BF16, WeightFormat.F32])
@pytest.mark.parametrize("columns", [1, 7, 8])
def test_plain_formats_take_any_number_of_columns(weights: WeightFormat, columns: int) -> None:
    packed, values = random_packed(weights, 5, columns)
    assert torch.equal(packed.dequantize(), values)
    assert [[slow_value(packed, r, c) for c in range(columns)] for r in range(5)] == values.tolist()
    if weights is WeightFormat.BF16 and columns % 2:
        assert not packed.values.view(-1, 16, 4)[-1, :, 2:].any()


@settings(max_examples=60, deadline=None)
@given(
    weights=st.sampled_from(list(WeightFormat)),
    rows=st.integers(1, 70),
    blocks=st.integers(1, 8),
    seed=st.integers(0, 999),
)
def test_packing_loses_nothing(weights: WeightFormat, rows: int, blocks: int, seed: int) -> None:
    packed, values = random_packed(weights, rows, blocks * 32, seed)
    before = packed.values.clone()
    assert torch.equal(packed.dequantize(), values)
    assert torch.equal(packed.dequantize(torch.bfloat16), values.bfloat16())
    assert torch.equal(packed.values, before)
    assert (packed.values.nbytes, packed.scales.nbytes) == packed_bytes(weights, rows, blocks * 32)


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_matrices_larger_than_a_piece_of_work(weights: WeightFormat) -> None:
    packed, values = random_packed(weights, 1003, 1056)
    assert torch.equal(packed.dequantize(), values)


def test_sizes_worked_out_by_hand() -> None:
    assert packed_bytes(WeightFormat.MXFP4, 17, 64) == (32 * 32, 32 * 2)
    assert packed_bytes(WeightFormat.NVFP4, 17, 64) == (32 * 32, 32 * 4)
    assert packed_bytes(WeightFormat.INT8, 16, 64) == (1024, 16 * 2 * 2)
    assert packed_bytes(WeightFormat.BF16, 1, 3) == (16 * 4 * 2, 0)
    assert packed_bytes(WeightFormat.F32, 1, 3) == (16 * 3 * 4, 0)


@pytest.mark.parametrize("weights", QUANTIZED)
def test_columns_that_32_does_not_divide_are_refused(weights: WeightFormat) -> None:
    with pytest.raises(CheckpointError, match="48"):
        pack_matrix(torch.ones(16, 48), weights)


@pytest.mark.parametrize("weights", list(WeightFormat))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(weights: WeightFormat, value: float) -> None:
    values = torch.ones(3, 64)
    values[2, 33] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        pack_matrix(values, weights)


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_runs_of_another_size_or_type_are_refused(weights: WeightFormat) -> None:
    packed, _ = random_packed(weights, 16, 64)
    fields = {"format": weights, "rows": 16, "columns": 64, "values": packed.values, "scales": packed.scales}
    PackedMatrix(**fields)
    for wrong in (
        {"rows": 17},
        {"columns": 96},
        {"values": packed.values[:-1]},
        {"values": packed.values.view(torch.int8)},
        {"values": packed.values.view(2, -1)},
        {"values": torch.cat([packed.values, packed.values])[::2]},
        {"scales": torch.cat([packed.scales, packed.values[:1]])},
    ):
        with pytest.raises(CheckpointError, match="packed"):
            PackedMatrix(**{**fields, **wrong})


@pytest.mark.parametrize(
    ("weights", "scale"), [(WeightFormat.MXFP4, 0xFF), (WeightFormat.NVFP4, 0x7F), (WeightFormat.NVFP4, 0xFF)]
)
def test_scale_that_is_nan_is_found(weights: WeightFormat, scale: int) -> None:
    packed, _ = random_packed(weights, 16, 64)
    packed.check_finite()
    packed.scales[5] = scale
    with pytest.raises(CheckpointError, match="NaN"):
        packed.check_finite()


def test_int8_scale_that_is_infinite_is_found() -> None:
    packed, _ = random_packed(WeightFormat.INT8, 16, 64)
    packed.check_finite()
    packed.scales.view(torch.float16)[3] = torch.inf
    with pytest.raises(CheckpointError, match="NaN"):
        packed.check_finite()
