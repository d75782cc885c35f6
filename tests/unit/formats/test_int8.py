"""The INT8 codec against a direct computation, and at its edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.core.errors import CheckpointError
from localmoe.formats.int8 import Int8Matrix, quantize_int8


def test_worked_out_by_hand() -> None:
    values = torch.zeros(1, 64)
    values[0, :6] = torch.tensor([127.0, -127.0, 0.5, 1.5, -2.5, 3.4])
    quantized = quantize_int8(values)
    assert quantized.scales.tolist() == [[1.0, 0.0]]
    assert quantized.codes[0, :8].tolist() == [127, -127, 0, 2, -2, 3, 0, 0]
    assert not quantized.codes[0, 32:].any()
    assert quantized.dequantize(torch.float32)[0, :6].tolist() == [127, -127, 0, 2, -2, 3]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), exponent=st.integers(-30, 16), seed=st.integers(0, 99))
def test_equals_a_direct_computation(rows: int, blocks: int, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, blocks * 32, generator=generator) * 2.0**exponent
    quantized = quantize_int8(values)
    for row in range(rows):
        for block in range(blocks):
            part = values[row, block * 32 : block * 32 + 32]
            scale = (part.abs().max() / 127).half()
            assert quantized.scales[row, block] == scale
            codes = (part / scale.float()).round().clamp(-127, 127) if scale else torch.zeros(32)
            assert torch.equal(quantized.codes[row, block * 32 : block * 32 + 32].float(), codes)
    exact = quantized.codes.double() * quantized.scales.double().repeat_interleave(32, dim=1)
    assert torch.equal(quantized.dequantize(torch.float32).double(), exact)
    assert torch.equal(quantized.dequantize(torch.bfloat16), exact.float().bfloat16())


def test_large_and_transposed_matrices_equal_each_row_alone() -> None:
    values = torch.randn(1024, 300, generator=torch.Generator().manual_seed(0)).T.bfloat16()
    whole = quantize_int8(values)
    for row in (0, 31, 32, 299):
        alone = quantize_int8(values[row : row + 1])
        assert torch.equal(whole.codes[row], alone.codes[0])
        assert torch.equal(whole.scales[row], alone.scales[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 9e6])
def test_what_no_scale_can_hold_is_refused(value: float) -> None:
    values = torch.ones(3, 64)
    values[2, 40] = value
    with pytest.raises(CheckpointError, match=r"NaN or infinite|too large"):
        quantize_int8(values)


@pytest.mark.parametrize(
    "values", [torch.ones(2, 48), torch.ones(64), torch.ones(0, 32), torch.ones(2, 32, dtype=torch.int32)]
)
def test_what_is_no_matrix_of_whole_blocks_is_refused(values: torch.Tensor) -> None:
    with pytest.raises(CheckpointError, match="INT8"):
        quantize_int8(values)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    codes, scales = torch.zeros(2, 64, dtype=torch.int8), torch.zeros(2, 2, dtype=torch.float16)
    Int8Matrix(codes=codes, scales=scales)
    for wrong in (
        {"codes": codes[:1]},
        {"codes": codes.view(torch.uint8)},
        {"scales": scales.float()},
        {"scales": scales[:, :1]},
        {"scales": scales.view(-1)},
    ):
        with pytest.raises(CheckpointError, match="do not describe one matrix"):
            Int8Matrix(**{"codes": codes, "scales": scales, **wrong})
    with pytest.raises(ValueError, match="float64"):
        Int8Matrix(codes=codes, scales=scales).dequantize(torch.float64)
