"""The FP4 codecs against hand-worked blocks, the rules of the formats, and their edges."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from localmoe.core.errors import CheckpointError
from localmoe.formats.fp4 import (
    E2M1_VALUES,
    MXFP4_BLOCK_SIZE,
    NVFP4_BLOCK_SIZE,
    Mxfp4Matrix,
    Nvfp4Matrix,
    pack_codes,
    quantize_mxfp4,
    quantize_nvfp4,
    unpack_codes,
)

QUANTIZERS = [quantize_mxfp4, quantize_nvfp4]
MIN_NORMAL = 2.0**-126


def matrices(columns: int, limit: float) -> st.SearchStrategy[torch.Tensor]:
    floats = st.floats(-limit, limit, width=32)
    rows = st.integers(1, 4)
    return rows.flatmap(lambda n: hnp.arrays(np.float32, (n, columns), elements=floats)).map(torch.from_numpy)


def per_element(block_values: torch.Tensor, block_size: int) -> torch.Tensor:
    return block_values.repeat_interleave(block_size, dim=1)


def nearest_code(value: float) -> int:
    """The rule itself: the nearest of the eight magnitudes, ties to the even code."""
    magnitude = abs(value)
    distances = [abs(magnitude - candidate) for candidate in E2M1_VALUES[:8]]
    best = [code for code, distance in enumerate(distances) if distance == min(distances)]
    code = best[0] if len(best) == 1 else next(code for code in best if code % 2 == 0)
    return code | (8 if math.copysign(1.0, value) < 0 else 0)


def test_the_sixteen_values_are_those_of_e2m1() -> None:
    for code, value in enumerate(E2M1_VALUES):
        exponent, mantissa = code >> 1 & 3, code & 1
        magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
        assert abs(value) == magnitude
        assert math.copysign(1.0, value) == (-1.0 if code & 8 else 1.0)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_each_value_survives_a_round_trip_with_its_sign(quantize) -> None:
    values = torch.tensor([E2M1_VALUES * 2])
    matrix = quantize(values)
    assert unpack_codes(matrix.codes).tolist() == [[*range(16), *range(16)]]
    back = matrix.dequantize(torch.float32)
    torch.testing.assert_close(back, values, rtol=2e-7, atol=0)
    assert torch.equal(torch.signbit(back), torch.signbit(values))


def test_mxfp4_bytes_of_a_block_worked_out_by_hand() -> None:
    # amax = 7 and floor(log2(7)) = 2, so the exponent is 2 - 2 = 0 and the scale byte 0 + 127 = 127.
    #   0.5 -> code 1      -3 -> code 5, sign 8 -> 13 (D)     byte 0: low 1, high D = D1
    #   7   -> 6 = code 7  2.5 is halfway between 2 (code 4) and 3 (code 5): even code 4     byte 1: 47
    #  -0   -> code 8      0.26 is past 0.25, so 0.5 = code 1                                byte 2: 18
    #   5   is halfway between 4 (code 6) and 6 (code 7): even code 6;  -1.75: 1.5 (3) or 2 (4): 4 + 8 = C: C6
    values = torch.zeros(1, 64)
    values[0, :8] = torch.tensor([0.5, -3.0, 7.0, 2.5, -0.0, 0.26, 5.0, -1.75])
    # The second block is the first times 2^-10: the same codes with scale byte 117.
    values[0, 32:] = values[0, :32] * 2.0**-10
    matrix = quantize_mxfp4(values)
    assert matrix.codes.numpy().tobytes() == 2 * (bytes.fromhex("D14718C6") + bytes(12))
    assert matrix.scales.tolist() == [[127, 117]]


def test_nvfp4_bytes_of_two_blocks_worked_out_by_hand() -> None:
    # amax of the matrix = 2688 = 6 * 448, so the tensor scale is 1.
    # Block 0: amax / 6 = 448, in E4M3 1.75 * 2^8: exponent 8 + 7 = 1111, mantissa 110: 0 1111 110 = 7E.
    #   2688 / 448 = 6 -> code 7;  -448 / 448 = -1 -> code 2, sign 8 -> A: byte A7
    # Block 1: amax 9 / 6 = 1.5 in E4M3: exponent 0 + 7 = 0111, mantissa 100: 0 0111 100 = 3C.
    #   9 / 1.5 = 6 -> 7;  -4.5 / 1.5 = -3 -> D: byte D7;  0.75 / 1.5 = 0.5 -> 1;
    #   1.125 / 1.5 = 0.75, halfway between 0.5 (1) and 1 (2): even code 2: byte 21
    # Block 2: amax 6.375 / 6 = 1.0625, halfway between 1 (38) and 1.125 (39): even mantissa, 38. 6.375 -> 6 = 7.
    values = torch.zeros(1, 48)
    values[0, :2] = torch.tensor([2688.0, -448.0])
    values[0, 16:20] = torch.tensor([9.0, -4.5, 0.75, 1.125])
    values[0, 32] = 6.375
    matrix = quantize_nvfp4(values)
    expected = bytes.fromhex("A7") + bytes(7) + bytes.fromhex("D721") + bytes(6) + bytes.fromhex("07") + bytes(7)
    assert matrix.tensor_scale == 1.0
    assert matrix.scales.tolist() == [[0x7E, 0x3C, 0x38]]
    assert matrix.codes.numpy().tobytes() == expected


def test_block_scales_are_the_bit_patterns_of_torchs_own_types() -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 64) * torch.logspace(-6, 6, 64)[:, None]
    mxfp4 = quantize_mxfp4(values)
    amax = values.view(64, 2, 32).abs().amax(-1)
    expected = torch.exp2(torch.floor(torch.log2(amax)) - 2)
    if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7 and later
        assert torch.equal(mxfp4.scales.view(torch.float8_e8m0fnu).float(), expected)
    assert torch.equal(torch.exp2(mxfp4.scales.float() - 127), expected)
    nvfp4 = quantize_nvfp4(values)
    amax = values.view(64, 4, 16).abs().amax(-1)
    rounded = (amax / 6 / nvfp4.tensor_scale).clamp(max=448).to(torch.float8_e4m3fn)
    assert torch.equal(nvfp4.scales.view(torch.float8_e4m3fn).float(), rounded.float())


def test_every_scale_byte_means_what_the_specifications_say() -> None:
    codes = torch.full((256, 16), 0x22, dtype=torch.uint8)  # 1.0 everywhere
    every_byte = torch.arange(256, dtype=torch.uint8)
    mxfp4 = Mxfp4Matrix(codes=codes, scales=every_byte[:, None]).dequantize(torch.float32)
    assert mxfp4[:255, 0].tolist() == [math.ldexp(1.0, byte - 127) for byte in range(255)]
    assert mxfp4[255].isnan().all()
    nvfp4 = Nvfp4Matrix(codes=codes, scales=every_byte[:, None].repeat(1, 2), tensor_scale=1.0)
    values = nvfp4.dequantize(torch.float32)[:, 0]
    for byte in range(128):
        exponent, mantissa = byte >> 3, byte & 7
        if byte == 127:
            assert values[byte].isnan()
            assert values[byte + 128].isnan()
        else:
            magnitude = mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            assert values[byte] == magnitude
            assert values[byte + 128] == -magnitude


def test_largest_mxfp4_scale_overflows_to_infinity() -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    codes[0, 0] = 0x73  # 1.5 and 6
    scales = torch.tensor([[254]], dtype=torch.uint8)
    values = Mxfp4Matrix(codes=codes, scales=scales).dequantize(torch.float32)
    assert values[0, :3].tolist() == [1.5 * 2.0**127, math.inf, 0.0]


@settings(max_examples=50, deadline=None)
@given(codes=hnp.arrays(np.uint8, (3, 32), elements=st.integers(0, 15)))
def test_pack_and_unpack_are_inverse(codes: np.ndarray) -> None:
    tensor = torch.from_numpy(codes)
    packed = pack_codes(tensor)
    rows = codes.tolist()
    assert packed.tolist() == [[low | high << 4 for low, high in zip(r[::2], r[1::2], strict=True)] for r in rows]
    assert torch.equal(unpack_codes(packed), tensor)


@settings(max_examples=50, deadline=None)
@given(values=hnp.arrays(np.float32, 30, elements=st.floats(-7.875, 7.875, width=32)))
def test_elements_round_to_nearest_with_ties_to_even(values: np.ndarray) -> None:
    block = torch.tensor([[4.0, 0.0, *values.tolist()]])  # 4 sets the scale to 1
    codes = unpack_codes(quantize_mxfp4(block).codes)
    assert codes[0, 2:].tolist() == [nearest_code(value) for value in values.tolist()]


def test_every_tie_and_its_neighbours_round_right() -> None:
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    around = [v for tie in ties for v in (np.nextafter(np.float32(tie), np.float32(s)) for s in (0, 9))]
    values = [float(v) for v in (*ties, *around)]
    block = torch.zeros(1, 64)
    block[0, :21] = torch.tensor(values)
    block[0, 32:53] = -block[0, :21]
    block[0, 31] = block[0, 63] = 4.0
    codes = unpack_codes(quantize_mxfp4(block).codes)
    assert codes[0, :21].tolist() == [nearest_code(v) for v in values]
    assert codes[0, 32:53].tolist() == [nearest_code(-v) for v in values]


@settings(max_examples=50, deadline=None)
@given(values=matrices(64, 2.0**100))
def test_mxfp4_error_is_bounded_per_block(values: torch.Tensor) -> None:
    matrix = quantize_mxfp4(values)
    scales = per_element(torch.exp2(matrix.scales.double() - 127), MXFP4_BLOCK_SIZE)
    errors = (matrix.dequantize(torch.float32).double() - values.double()).abs()
    saturated = values.double().abs() > 6 * scales
    # Half of the widest step, which is 2 scales; only what saturates (from 6 to less than 8) may be off by 2.
    assert (errors <= torch.where(saturated, 2 * scales, scales)).all()
    amax = per_element(values.double().view(-1, 2, 32).abs().amax(-1), MXFP4_BLOCK_SIZE)
    assert (scales <= (amax / 4).clamp(min=2.0**-127)).all()


@settings(max_examples=50, deadline=None)
@given(values=matrices(64, 2.0**100))
def test_nvfp4_error_is_bounded_per_block(values: torch.Tensor) -> None:
    matrix = quantize_nvfp4(values)
    e4m3 = per_element(matrix.scales.view(torch.float8_e4m3fn).double(), NVFP4_BLOCK_SIZE)
    errors = (matrix.dequantize(torch.float32).double() - values.double()).abs()
    # Half of the widest step, or, where the block's scale was rounded down, what the largest element lost by it:
    # 6 times half a step of E4M3, which is 1/16 of it, or 2^-10 for a subnormal.
    bound = torch.maximum(e4m3, 6 * (e4m3 / 16).clamp(min=2.0**-10)) * matrix.tensor_scale
    assert (errors <= bound * 1.00001).all()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_mxfp4_of_dequantised_values_is_the_same_matrix(data: st.DataObject) -> None:
    codes = torch.from_numpy(data.draw(hnp.arrays(np.uint8, (2, 64), elements=st.integers(0, 15))))
    # Canonical: each block's largest magnitude is 4 or 6, which is what the rule for the scale produces.
    codes[:, ::32] = torch.from_numpy(
        data.draw(hnp.arrays(np.uint8, (2, 2), elements=st.sampled_from([6, 7, 14])))
    )
    scales = torch.from_numpy(data.draw(hnp.arrays(np.uint8, (2, 2), elements=st.integers(0, 252))))
    matrix = Mxfp4Matrix(codes=pack_codes(codes), scales=scales)
    for dtype in (torch.float32, torch.bfloat16):
        again = quantize_mxfp4(matrix.dequantize(dtype))
        assert torch.equal(again.codes, matrix.codes)
        assert torch.equal(again.scales, matrix.scales)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_nvfp4_of_dequantised_values_is_the_same_matrix(data: st.DataObject) -> None:
    codes = torch.from_numpy(data.draw(hnp.arrays(np.uint8, (2, 32), elements=st.integers(0, 15))))
    # Canonical: each block's largest magnitude is 6 and one block has the largest scale.
    codes[:, ::16] = 7
    scales = torch.from_numpy(data.draw(hnp.arrays(np.uint8, (2, 2), elements=st.integers(1, 126))))
    scales[0, 0] = 126
    tensor_scale = data.draw(st.floats(MIN_NORMAL, 2.0**100, width=32))
    matrix = Nvfp4Matrix(codes=pack_codes(codes), scales=scales, tensor_scale=tensor_scale)
    again = quantize_nvfp4(matrix.dequantize(torch.float32))
    assert torch.equal(again.codes, matrix.codes)
    assert torch.equal(again.scales, matrix.scales)
    # Its largest value, rounded to float32, determines the tensor scale up to one unit in the last place.
    assert again.tensor_scale == pytest.approx(tensor_scale, rel=2.0**-23)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@settings(max_examples=50, deadline=None)
@given(values=matrices(64, 2.0**127))
def test_negated_values_differ_in_their_sign_bits_only(quantize, values: torch.Tensor) -> None:
    positive, negative = quantize(values), quantize(-values)
    assert torch.equal(positive.codes ^ 0x88, negative.codes)
    assert torch.equal(positive.scales, negative.scales)


def test_zero_blocks_have_the_least_scale_and_keep_their_signs() -> None:
    values = torch.zeros(2, 64)
    values[1] = -0.0
    for quantize in QUANTIZERS:
        matrix = quantize(values)
        assert not matrix.scales.any()
        assert matrix.codes.tolist() == [[0x00] * 32, [0x88] * 32]
        back = matrix.dequantize(torch.float32)
        assert not back.any()
        assert torch.equal(torch.signbit(back), torch.signbit(values))
    assert quantize_nvfp4(values).tensor_scale == MIN_NORMAL


def test_mxfp4_scale_saturates_at_the_ends_of_float32() -> None:
    largest, least = torch.finfo(torch.float32).max, 2.0**-149
    values = torch.zeros(1, 128)
    values[0, 0], values[0, 32], values[0, 64], values[0, 96] = largest, least, 4 * 2.0**-127, 0.25 * 2.0**-127
    values[0, 97] = 0.375 * 2.0**-127
    matrix = quantize_mxfp4(values)
    # 3.4e38 is just below 2^128: exponent 127 - 2 = 125. Least scale 2^-127: below a quarter of it all is zero.
    assert matrix.scales.tolist() == [[252, 0, 0, 0]]
    back = matrix.dequantize(torch.float32)
    assert back[0, 0] == 6 * 2.0**125
    assert back[0, 32] == 0
    assert back[0, 64] == 4 * 2.0**-127
    assert back[0, 96:98].tolist() == [0.0, 0.5 * 2.0**-127]


def test_nvfp4_subnormal_block_scales_and_blocks_too_small_for_one() -> None:
    # Tensor scale 1. Scales wanted: 2^-9 (the least), 2^-10 (a tie, to the even 0), 1.5 * 2^-10 (rounds to 2^-9).
    values = torch.zeros(1, 64)
    values[0, 0] = 2688.0
    values[0, 16], values[0, 32], values[0, 48] = 6 * 2.0**-9, 6 * 2.0**-10, -9 * 2.0**-10
    matrix = quantize_nvfp4(values)
    assert matrix.scales.tolist() == [[126, 1, 0, 1]]
    back = matrix.dequantize(torch.float32)
    # -9 * 2^-10 is 4.5 scales: nearest is 4.
    assert back[0, ::16].tolist() == [2688.0, 6 * 2.0**-9, 0.0, -4 * 2.0**-9]


def test_nvfp4_tensor_of_subnormal_values_keeps_a_normal_tensor_scale() -> None:
    values = torch.zeros(1, 16)
    values[0, :2] = torch.tensor([6 * 2.0**-130, -3 * 2.0**-130])
    matrix = quantize_nvfp4(values)
    assert matrix.tensor_scale == MIN_NORMAL
    assert matrix.dequantize(torch.float32)[0, :2].tolist() == values[0, :2].tolist()


@pytest.mark.parametrize("quantize", QUANTIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused(quantize, bad: float, dtype: torch.dtype) -> None:
    values = torch.ones(4, 64, dtype=dtype)
    values[3, 63] = bad
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantize(values)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_unsuitable_tensors_are_refused(quantize) -> None:
    with pytest.raises(CheckpointError, match="40 columns do not divide into FP4 blocks"):
        quantize(torch.ones(2, 40))
    for tensor in (torch.ones(64), torch.ones(2, 2, 64), torch.ones(2, 64, dtype=torch.int32), torch.ones(0, 64)):
        with pytest.raises(CheckpointError, match="matrix of floats"):
            quantize(tensor)


def test_parts_that_do_not_fit_together_are_refused() -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    right = torch.zeros(2, 2, dtype=torch.uint8)
    Mxfp4Matrix(codes=codes, scales=right)
    for scales in (right[:1], right[:, :1], right.int(), right[0]):
        with pytest.raises(CheckpointError, match="do not describe one matrix"):
            Mxfp4Matrix(codes=codes, scales=scales)
    with pytest.raises(CheckpointError, match="do not describe one matrix"):
        Nvfp4Matrix(codes=codes, scales=right, tensor_scale=1.0)


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_dequantise_to_each_type_and_to_no_other(quantize) -> None:
    torch.manual_seed(0)
    matrix = quantize(torch.randn(8, 64))
    exact = matrix.dequantize(torch.float32)
    assert matrix.shape == (8, 64)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(matrix.dequantize(dtype), exact.to(dtype))
    with pytest.raises(ValueError, match="int8"):
        matrix.dequantize(torch.int8)


@pytest.mark.parametrize("quantize", QUANTIZERS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_large_and_transposed_matrices_equal_a_direct_computation(quantize, seed: int) -> None:
    """Large enough to be worked on in several pieces, the last of them short."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1056, 608, generator=generator).t()
    before = values.clone()
    matrix = quantize(values)
    assert torch.equal(values, before)
    if isinstance(matrix, Mxfp4Matrix):
        block_size, scales = MXFP4_BLOCK_SIZE, torch.exp2(matrix.scales.float() - 127)
    else:
        block_size, scales = NVFP4_BLOCK_SIZE, matrix.scales.view(torch.float8_e4m3fn).float()
    scale = 1.0 if isinstance(matrix, Mxfp4Matrix) else matrix.tensor_scale
    expanded = (
        torch.tensor(E2M1_VALUES)[unpack_codes(matrix.codes).int()] * per_element(scales, block_size) * scale
    )
    assert torch.equal(matrix.dequantize(torch.float32), expanded)
    assert (expanded - values).abs().mean() < 0.11
