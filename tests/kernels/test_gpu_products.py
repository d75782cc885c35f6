"""The Triton products, norms, routers and heads against the reference, and the same bits in every batch."""

import pytest
import torch
from gpu_device import gpu_kernels, not_finite, on_device
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import (
    QUANTIZED,
    random,
    random_codes,
    random_ints,
    router_weights,
    same_bits,
    weight_matrix,
)
from torch import Tensor

from localmoe.core.model import WeightFormat
from localmoe.formats.fp4 import Mxfp4Matrix, Nvfp4Matrix
from localmoe.formats.packed import PackedMatrix, pack_matrix, pack_mxfp4, pack_nvfp4
from localmoe.kernels.base import RouterWeights
from localmoe.kernels.reference import ReferenceKernels
from localmoe.kernels.triton.product import DeviceMatrices
from localmoe.kernels.triton.rows import prepare

each_format = pytest.mark.parametrize("weights", list(WeightFormat))
a_few = settings(deadline=None, max_examples=6)
TOKENS = [1, 2, 5, 17, 40]


def multiply(matrices: DeviceMatrices, x_TC: Tensor, device: str) -> Tensor:
    out = torch.full((len(x_TC), matrices.rows), torch.nan, device=device)
    matrices.multiply(prepare(x_TC.to(device), matrices.tiling), out)
    return out.cpu()


def check_product(out_TR: Tensor, x_TC: Tensor, weights: PackedMatrix, *, exact: bool = False) -> None:
    """The product of what was rounded to bfloat16 but for float32 sums, within the documented error of the exact."""
    w, x, out = weights.dequantize(), x_TC, out_TR.double()
    sizes = x.double().abs() @ w.double().abs().T
    exact = exact or weights.format is WeightFormat.F32
    rounded_x, rounded_w = (x, w) if exact else (x.bfloat16(), w.bfloat16())
    if weights.format is WeightFormat.NVFP4:  # the tensor scale comes after the sum
        rounded_w = w
    assert ((out - rounded_x.double() @ rounded_w.double().T).abs() <= 1e-5 * sizes).all()
    bound = 0 if exact else 2**-7 if weights.format is WeightFormat.INT8 else 2**-8
    assert ((out - x.double() @ w.double().T).abs() <= (bound + 1e-5) * sizes).all()


@on_device
@each_format
@a_few
@given(st.integers(1, 150), st.integers(1, 200), st.sampled_from(TOKENS), st.integers(0, 1000))
def test_product(device: str, weights: WeightFormat, rows: int, columns: int, num_tokens: int, seed: int) -> None:
    if weights in QUANTIZED:
        columns = -(-columns // 32) * 32
    matrix = random_codes(weights, rows, columns, seed)
    x = random(num_tokens, columns, seed=seed) * 4.0 ** random_ints(-3, 4, num_tokens, columns, seed=seed)
    check_product(multiply(DeviceMatrices([matrix], torch.device(device)), x, device), x, matrix)


@on_device
@pytest.mark.parametrize("columns", [31, 64])
def test_exact_product_of_bf16_weights(device: str, columns: int) -> None:
    matrix, x = random_codes(WeightFormat.BF16, 70, columns), random(5, columns)
    out = multiply(DeviceMatrices([matrix], torch.device(device), exact=True), x, device)
    check_product(out, x, matrix, exact=True)


@on_device
@each_format
def test_matrices_one_below_the_other(device: str, weights: WeightFormat) -> None:
    """Of rows that fill no group, and with tensor scales of their own."""
    matrices = [weight_matrix(weights, rows, 96, seed) for rows, seed in ((40, 1), (17, 2), (100, 3))]
    x = random(3, 96)
    together = DeviceMatrices(matrices, torch.device(device))
    assert together.rows == 48 + 32 + 100
    out = multiply(together, x, device)
    for matrix, offset in zip(matrices, together.offsets, strict=True):
        check_product(out[:, offset : offset + matrix.rows], x, matrix)


def test_matrices_that_differ_in_kind_are_refused() -> None:
    for other in (weight_matrix(WeightFormat.BF16, 16, 32), weight_matrix(WeightFormat.INT8, 16, 64)):
        with pytest.raises(ValueError, match="cannot be multiplied together"):
            DeviceMatrices([weight_matrix(WeightFormat.INT8, 16, 32), other], torch.device("cpu"))


@on_device
@each_format
def test_a_product_that_is_added(device: str, weights: WeightFormat) -> None:
    matrix, x, before = weight_matrix(weights, 70, 64), random(20, 64), random(20, 70, seed=1)
    matrices, out = DeviceMatrices([matrix], torch.device(device)), before.clone().to(device)
    matrices.multiply(prepare(x.to(device), matrices.tiling), out, add=True)
    assert same_bits(out.cpu(), before + multiply(matrices, x, device))


@on_device
@each_format
def test_a_tokens_product_has_the_same_bits_in_every_batch(device: str, weights: WeightFormat) -> None:
    matrices = DeviceMatrices([random_codes(weights, 70, 160)], torch.device(device))
    x = random(66, 160)
    together = multiply(matrices, x, device)
    for count in (1, 16, 17, 65):
        assert same_bits(multiply(matrices, x[66 - count :], device), together[66 - count :]), count


@on_device
@each_format
@not_finite
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_a_number_that_is_not_finite_spoils_its_token_alone(
    device: str, weights: WeightFormat, number: float
) -> None:
    x = random(3, 96)
    matrices = DeviceMatrices([random_codes(weights, 40, 96)], torch.device(device))
    others = torch.arange(3) != 1
    before = multiply(matrices, x, device)
    x[1, 37] = number
    after = multiply(matrices, x, device)
    assert not after[1].isfinite().any()
    assert same_bits(after[others], before[others])


@on_device
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_extreme_scales_of_nvfp4(device: str, num_tokens: int) -> None:
    """Zero, subnormal ones, the least normal one and the largest, under a small and a large tensor scale."""
    scales = torch.tensor([0x00, 0x01, 0x07, 0x08, 0x7E, 0x02, 0x09, 0x38], dtype=torch.uint8).repeat(20, 1)
    for tensor_scale in (2.0**-126, 1e30):
        codes = random_ints(0, 256, 20, 64).byte()
        matrix = pack_nvfp4(Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=tensor_scale))
        x = random(num_tokens, 128) * (1e10 if tensor_scale < 1 else 1)
        check_product(multiply(DeviceMatrices([matrix], torch.device(device)), x, device), x, matrix)


@on_device
@pytest.mark.parametrize("num_tokens", [1, 30])
@pytest.mark.parametrize("scale", [2, 60, 127, 200, 236])
def test_extreme_scales_of_mxfp4(device: str, num_tokens: int, scale: int) -> None:
    codes, scales = random_ints(0, 256, 20, 16).byte(), torch.full((20, 1), scale, dtype=torch.uint8)
    matrix = pack_mxfp4(Mxfp4Matrix(codes=codes, scales=scales))
    x = random(num_tokens, 32) * (1e10 if scale < 127 else 1)
    check_product(multiply(DeviceMatrices([matrix], torch.device(device)), x, device), x, matrix)


@on_device
@each_format
def test_embedding_gives_the_rows_exactly(device: str, weights: WeightFormat) -> None:
    columns = 288 if weights in QUANTIZED else 301
    matrix = random_codes(weights, 50, columns)
    ids = torch.tensor([0, 49, 15, 16, 17, 3, 3], dtype=torch.int32)
    assert same_bits(gpu_kernels(device).embedding(matrix)(ids).cpu(), matrix.dequantize()[ids])


@on_device
def test_embedding_of_every_scale(device: str) -> None:
    """All that are numbers, not negative and, of MXFP4, below 2^114."""
    codes = random_ints(0, 256, 241, 16).byte()
    every = torch.arange(241, dtype=torch.uint8)[:, None]
    mxfp4 = pack_mxfp4(Mxfp4Matrix(codes=codes, scales=every))
    nvfp4 = pack_nvfp4(Nvfp4Matrix(codes=codes[:127], scales=every[:127].repeat(1, 2), tensor_scale=0.3))
    for matrix in (mxfp4, nvfp4):
        ids = torch.arange(matrix.rows, dtype=torch.int32)
        assert same_bits(gpu_kernels(device).embedding(matrix)(ids).cpu(), matrix.dequantize())


@on_device
@each_format
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_head(device: str, weights: WeightFormat, num_tokens: int) -> None:
    norm, matrix, x = random(96, seed=1), weight_matrix(weights, 77, 96), 3 * random(num_tokens, 96)
    found = gpu_kernels(device).head(norm, matrix, 1e-5)(x.to(device)).cpu()
    expected = ReferenceKernels(2).head(norm, matrix, 1e-5)(x)
    tolerance = 1e-5 if weights is WeightFormat.F32 else 2e-2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-5)
    assert same_bits(gpu_kernels(device).head(norm, matrix, 1e-5)(x[:1].to(device)).cpu(), found[:1])


def route(device: str, bound: RouterWeights, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part.cpu() for part in gpu_kernels(device).router(bound)(x.to(device)))


@on_device
@pytest.mark.parametrize("weights", [WeightFormat.BF16, WeightFormat.F32, WeightFormat.INT8])
@settings(deadline=None, max_examples=4)
@given(st.sampled_from([1, 5, 17]), st.integers(1, 20), st.integers(1, 70), st.booleans(), st.integers(0, 1000))
def test_router(
    device: str, weights: WeightFormat, num_tokens: int, experts: int, columns: int,
    normalize: bool, seed: int,
) -> None:  # fmt: skip
    top_k = 1 + seed % experts
    columns = 64 if weights in QUANTIZED else columns
    bound = router_weights(random(experts, columns, seed=seed), top_k, normalize=normalize, weights=weights)
    x = random(num_tokens, columns, seed=seed + 1)
    h, ids, shares = route(device, bound, x)
    expected_h, _, expected_shares = ReferenceKernels(2).router(bound)(x)
    exact = weights not in QUANTIZED
    torch.testing.assert_close(h, expected_h, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shares, expected_shares, atol=1e-5 if exact else 5e-2, rtol=1e-4)
    assert bound.router is not None
    logits = expected_h.double() @ bound.router.dequantize().double().T
    # As the reference's, but for logits so close that rounding orders them.
    best = logits.sort(-1, descending=True).values[:, :top_k]
    torch.testing.assert_close(logits.gather(1, ids.long()), best, atol=1e-4 if exact else 0.2, rtol=1e-5)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert ids.dtype == torch.int32


@on_device
@pytest.mark.parametrize("top_k", [1, 3, 12])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_of_equal_experts_the_lower_id_comes_first(device: str, top_k: int, num_tokens: int) -> None:
    kinds = torch.tensor([2, 1, 0, 2, 2, 1, 0, 0, 1, 2, 0, 1])
    matrix = random(3, 48)[kinds]
    bound = router_weights(matrix, top_k, normalize=True, weights=WeightFormat.F32)
    h, ids, _ = route(device, bound, random(num_tokens, 48, seed=1))
    for logits, found in zip((h @ matrix.T).tolist(), ids.tolist(), strict=True):
        by_kind = dict(zip(kinds.tolist(), logits, strict=True))
        assert found == sorted(range(12), key=lambda e: (-by_kind[int(kinds[e])], e))[:top_k]


@on_device
def test_one_expert_needs_no_router(device: str) -> None:
    bound = RouterWeights(norm_D=random(50), router=None, top_k=1, normalize=True, eps=1e-5)
    x = random(7, 50, seed=1)
    h, ids, shares = route(device, bound, x)
    expected_h, expected_ids, expected_shares = ReferenceKernels(2).router(bound)(x)
    torch.testing.assert_close(h, expected_h, atol=1e-6, rtol=1e-5)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(shares, expected_shares)


@on_device
def test_a_tokens_route_has_the_same_bits_in_every_batch(device: str) -> None:
    bound = router_weights(random(20, 65), 4, normalize=True, weights=WeightFormat.BF16)
    x = random(30, 65, seed=1)
    expected = route(device, bound, x)
    for count in (1, 17):
        for found, wanted in zip(route(device, bound, x[30 - count :]), expected, strict=True):
            assert same_bits(found, wanted[30 - count :])


@on_device
@not_finite
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_route_of_no_finite_number_names_experts_all_the_same(device: str, number: float) -> None:
    bound = router_weights(random(10, 64), 4, normalize=True, weights=WeightFormat.F32)
    x = random(3, 64, seed=1)
    before = route(device, bound, x)
    x[1, 5] = number
    after = route(device, bound, x)
    for old, new in zip(before, after, strict=True):
        assert same_bits(new[[0, 2]], old[[0, 2]])
    assert len({*after[1][1].tolist()} & {*range(10)}) == 4
    assert not after[2][1].isfinite().any()


@on_device
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e30])
def test_inputs_of_any_size(device: str, size: float) -> None:
    for weights in WeightFormat:
        matrix: PackedMatrix = pack_matrix(random(40, 96) / 100, weights)
        x = random(14, 96)
        x[:, :32] *= size
        x[:, 64:] = 0.0
        check_product(multiply(DeviceMatrices([matrix], torch.device(device)), x, device), x, matrix)
