"""The C++ kernels but attention against the reference, and the same bits at every level, in every batch, on any
number of threads."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from cpu_levels import EVERYWHERE, LEVELS, cpu_kernels, each_format, each_level
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import (
    QUANTIZED,
    expert_weights,
    random,
    random_codes,
    random_ints,
    random_routes,
    reference_rounding_inputs,
    rounded,
    router_weights,
    same_bits,
    weight_matrix,
)
from torch import Tensor

from localmoe import _cpu
from localmoe.core.model import WeightFormat
from localmoe.formats.fp4 import Mxfp4Matrix, Nvfp4Matrix
from localmoe.formats.packed import PackedMatrix, pack_matrix, pack_mxfp4, pack_nvfp4
from localmoe.formats.store import ExpertWeights
from localmoe.kernels.base import RouterWeights, placed_experts
from localmoe.kernels.cpu import CpuKernels
from localmoe.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def reference() -> ReferenceKernels:
    return ReferenceKernels(2)


def check_product(out_TR: Tensor, x_TC: Tensor, weights: PackedMatrix) -> None:
    """The product of rounded inputs but for float32 sums, and within the documented error of the exact product."""
    w_RC, x, out = weights.dequantize().double(), x_TC.double(), out_TR.double()
    sizes = x.abs() @ w_RC.abs().T
    if weights.format not in QUANTIZED:
        assert ((out - x @ w_RC.T).abs() <= 1e-5 * sizes).all()
        return
    assert ((out - rounded(x_TC) @ w_RC.T).abs() <= 1e-5 * sizes).all()
    largest_TB = x.abs().view(len(x), -1, 32).amax(-1)
    bound = largest_TB / 254 @ w_RC.abs().view(len(w_RC), -1, 32).sum(-1).T
    assert ((out - x @ w_RC.T).abs() <= bound + 1e-5 * sizes).all()


@each_level
@each_format
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 100), st.integers(1, 150), st.integers(1, 40), st.integers(0, 1000))
def test_product(level: str, weights: WeightFormat, rows: int, columns: int, num_tokens: int, seed: int) -> None:
    if weights in QUANTIZED:
        columns = -(-columns // 32) * 32
    matrix = random_codes(weights, rows, columns, seed)
    x = random(num_tokens, columns, seed=seed) * 4.0 ** random_ints(-3, 4, num_tokens, columns, seed=seed)
    check_product(cpu_kernels(level).linear(matrix)(x), x, matrix)


@each_format
@pytest.mark.parametrize(("rows", "columns"), [(200, 160), (33, 32)])
def test_a_tokens_product_has_the_same_bits_everywhere(weights: WeightFormat, rows: int, columns: int) -> None:
    matrix, x = random_codes(weights, rows, columns), random(70, columns)
    first = cpu_kernels(LEVELS[0], 1)
    alone = torch.cat([first.linear(matrix)(x[[t]]) for t in range(70)])
    for level, num_threads in EVERYWHERE:
        kernels = cpu_kernels(level, num_threads)
        for count in range(1, 71):
            assert same_bits(kernels.linear(matrix)(x[70 - count :]), alone[70 - count :]), (level, num_threads)


@each_level
def test_other_operations_wait_for_what_is_being_computed(level: str) -> None:
    kernels = cpu_kernels(level)
    layers = [placed_experts(kernels, expert_weights(WeightFormat.MXFP4, 9, 256, 512)) for _ in range(2)]
    double = kernels.linear(weight_matrix(WeightFormat.MXFP4, 48, 256))
    ids, shares = random_routes(40, 9, 4, seed=1)
    h, x = random(40, 256), random(40, 256, seed=1)
    layers[0](h, ids, shares, whole := x.clone())
    alone = double(h)
    for _ in range(20):
        layers[0].begin(h, ids)
        layers[0].compute(range(9))
        assert same_bits(double(h), alone)
        layers[0].finish(shares, again := x.clone())
        assert same_bits(again, whole)
        layers[1].begin(h, ids)
        layers[1].compute(range(9))  # and never finished


@each_level
def test_kernels_and_experts_may_go_while_computing(level: str) -> None:
    for _ in range(5):
        kernels = CpuKernels(level, 2, pin=False)
        matrices = [random_codes(WeightFormat.MXFP4, *size) for size in ((512, 256), (512, 256), (256, 512))]
        memory = matrices[0].values.numpy().copy()
        gate = replace(matrices[0], values=torch.from_numpy(memory))
        experts = kernels.experts(1, 256, 512, WeightFormat.MXFP4)
        experts.place(0, ExpertWeights(gate=gate, up=matrices[1], down=matrices[2]))
        experts.begin(random(400, 256), torch.zeros(400, 1, dtype=torch.int32))
        experts.compute([0])
        read = weakref.ref(memory)
        del memory, gate, experts
        gc.collect()
        assert read() is not None, "the threads may be at it"
        del kernels
        gc.collect()
        assert read() is None


@each_level
@each_format
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_a_number_that_is_not_finite_spoils_its_token_alone(
    level: str, weights: WeightFormat, number: float, num_tokens: int
) -> None:
    matrix, x = random_codes(weights, 40, 96), random(num_tokens, 96)
    kernels = cpu_kernels(level)
    others = torch.arange(num_tokens) != num_tokens // 2
    before = kernels.linear(matrix)(x)
    x[num_tokens // 2, 37] = number
    after = kernels.linear(matrix)(x)
    assert not after[num_tokens // 2].isfinite().any()
    assert same_bits(after[others], before[others])


@each_level
@each_format
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-31, 2e-30, 1e-20, 1e30])
def test_inputs_of_any_size(level: str, weights: WeightFormat, size: float) -> None:
    """The second block is of ordinary numbers, and the third of zeros."""
    matrix, x = pack_matrix(random(40, 96) / 100, weights), random(14, 96)
    x[:, :32] = x[:, :32].clamp(-1, 1) * size
    x[:, 64:] = 0.0
    check_product(cpu_kernels(level).linear(matrix)(x), x, matrix)
    assert not cpu_kernels(level).linear(matrix)(torch.zeros(3, 96)).any()


@each_level
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_extreme_scales_of_nvfp4(level: str, num_tokens: int) -> None:
    """Zero, subnormal ones, the least normal one and the largest, under a small and a large tensor scale."""
    scales = torch.tensor([0x00, 0x01, 0x07, 0x08, 0x7E, 0x02, 0x09, 0x38], dtype=torch.uint8).repeat(20, 1)
    for tensor_scale in (2.0**-126, 1e30):
        codes = random_ints(0, 256, 20, 64).byte()
        matrix = pack_nvfp4(Nvfp4Matrix(codes=codes, scales=scales, tensor_scale=tensor_scale))
        x = random(num_tokens, 128) * (1e10 if tensor_scale < 1 else 1)
        check_product(cpu_kernels(level).linear(matrix)(x), x, matrix)


@each_level
@pytest.mark.parametrize("num_tokens", [1, 30])
@pytest.mark.parametrize("scale", [0, 1, 2, 127, 236])
def test_extreme_scales_of_mxfp4(level: str, num_tokens: int, scale: int) -> None:
    codes, scales = random_ints(0, 256, 20, 16).byte(), torch.full((20, 1), scale, dtype=torch.uint8)
    matrix = pack_mxfp4(Mxfp4Matrix(codes=codes, scales=scales))
    x = random(num_tokens, 32) * (1e10 if scale < 127 else 1)
    check_product(cpu_kernels(level).linear(matrix)(x), x, matrix)


@each_level
@each_format
def test_embedding_gives_the_rows_exactly(level: str, weights: WeightFormat) -> None:
    matrix = random_codes(weights, 50, 96)
    ids = torch.tensor([0, 49, 15, 16, 17, 3, 3], dtype=torch.int32)
    rows = cpu_kernels(level).embedding(matrix)(ids)
    assert same_bits(rows, matrix.dequantize()[ids])


@each_level
def test_embedding_of_every_scale(level: str) -> None:
    """All that are numbers, and not negative."""
    codes = random_ints(0, 256, 255, 16).byte()
    every = torch.arange(255, dtype=torch.uint8)[:, None]
    mxfp4 = pack_mxfp4(Mxfp4Matrix(codes=codes, scales=every))
    nvfp4 = pack_nvfp4(Nvfp4Matrix(codes=codes[:127], scales=every[:127].repeat(1, 2), tensor_scale=0.3))
    for matrix in (mxfp4, nvfp4):
        rows = cpu_kernels(level).embedding(matrix)(torch.arange(matrix.rows, dtype=torch.int32))
        assert same_bits(rows, matrix.dequantize())


@each_level
@each_format
@pytest.mark.parametrize("num_tokens", [1, 19])
def test_head(level: str, weights: WeightFormat, num_tokens: int, reference: ReferenceKernels) -> None:
    norm, matrix, x = random(96, seed=1), weight_matrix(weights, 77, 96), 3 * random(num_tokens, 96)
    found = cpu_kernels(level).head(norm, matrix, 1e-5)(x)
    with reference_rounding_inputs(weights):
        expected = reference.head(norm, matrix, 1e-5)(x)
    # Where norms differ in the last bit, an input may round to the neighbouring code.
    tolerance = 2e-2 if weights in QUANTIZED else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-5)
    for count in (1, num_tokens):
        assert same_bits(cpu_kernels(LEVELS[0], 3).head(norm, matrix, 1e-5)(x[:count]), found[:count])


@each_level
@pytest.mark.parametrize("weights", [WeightFormat.BF16, WeightFormat.F32])
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 70), st.booleans(), st.integers(0, 1000))
def test_router(
    level: str, weights: WeightFormat, num_tokens: int, experts: int, columns: int, normalize: bool, seed: int
) -> None:
    top_k = 1 + seed % experts
    matrix = random(experts, columns, seed=seed)
    bound = router_weights(matrix, top_k, normalize=normalize, weights=weights)
    x = random(num_tokens, columns, seed=seed + 1)
    h, ids, shares = cpu_kernels(level).router(bound)(x)
    expected_h, _, expected_shares = ReferenceKernels(2).router(bound)(x)
    torch.testing.assert_close(h, expected_h, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(shares, expected_shares, atol=1e-5, rtol=1e-4)
    assert bound.router is not None
    logits = expected_h.double() @ bound.router.dequantize().double().T
    # As the reference's, but for logits so close that rounding orders them.
    best = logits.sort(-1, descending=True).values[:, :top_k]
    torch.testing.assert_close(logits.gather(1, ids.long()), best, atol=1e-4, rtol=1e-5)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert ids.dtype == torch.int32


@each_level
@pytest.mark.parametrize("top_k", [1, 3, 12])
@pytest.mark.parametrize("num_tokens", [1, 20])
def test_of_equal_experts_the_lower_id_comes_first(level: str, top_k: int, num_tokens: int) -> None:
    kinds = torch.tensor([2, 1, 0, 2, 2, 1, 0, 0, 1, 2, 0, 1])
    matrix = random(3, 48)[kinds]
    bound = router_weights(matrix, top_k, normalize=True, weights=WeightFormat.F32)
    x = random(num_tokens, 48, seed=1)
    h, ids, _ = cpu_kernels(level).router(bound)(x)
    for logits, found in zip((h @ matrix.T).tolist(), ids.tolist(), strict=True):
        by_kind = dict(zip(kinds.tolist(), logits, strict=True))
        assert found == sorted(range(12), key=lambda e: (-by_kind[int(kinds[e])], e))[:top_k]


@each_level
def test_one_expert_needs_no_router(level: str, reference: ReferenceKernels) -> None:
    bound = RouterWeights(norm_D=random(50), router=None, top_k=1, normalize=True, eps=1e-5)
    x = random(7, 50, seed=1)
    h, ids, shares = cpu_kernels(level).router(bound)(x)
    expected_h, expected_ids, expected_shares = reference.router(bound)(x)
    torch.testing.assert_close(h, expected_h, atol=1e-6, rtol=1e-5)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(shares, expected_shares)


def test_a_tokens_route_has_the_same_bits_everywhere() -> None:
    bound = router_weights(random(20, 65), 4, normalize=True, weights=WeightFormat.BF16)
    x = random(30, 65, seed=1)
    expected = cpu_kernels(LEVELS[0], 1).router(bound)(x)
    for level, num_threads in EVERYWHERE:
        route = cpu_kernels(level, num_threads).router(bound)
        for count in (1, 2, 13, 30):
            for found, wanted in zip(route(x[30 - count :]), expected, strict=True):
                assert same_bits(found, wanted[30 - count :])


@each_level
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_route_of_no_finite_number_names_experts_all_the_same(level: str, number: float) -> None:
    bound = router_weights(random(10, 64), 4, normalize=True, weights=WeightFormat.F32)
    x = random(3, 64, seed=1)
    before = cpu_kernels(level).router(bound)(x)
    x[1, 5] = number
    after = cpu_kernels(level).router(bound)(x)
    for old, new in zip(before, after, strict=True):
        assert same_bits(new[[0, 2]], old[[0, 2]])
    assert len({*after[1][1].tolist()} & {*range(10)}) == 4
    assert not after[2][1].isfinite().any()


@each_level
@each_format
@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([1, 2, 5, 11, 12, 13, 25, 40, 70]),
    st.integers(1, 12),
    st.integers(1, 8),
    st.booleans(),
    st.integers(0, 1000),
)
def test_experts(
    level: str, weights: WeightFormat, num_tokens: int, num_experts: int, k: int, wide: bool, seed: int
) -> None:
    hidden, width = (64, 160) if wide else (96, 32)
    if weights not in QUANTIZED:
        hidden, width = hidden - 3, width - 5
    bound = expert_weights(weights, num_experts, hidden, width)
    ids, shares = random_routes(num_tokens, num_experts, min(k, num_experts), seed)
    h, x = random(num_tokens, hidden, seed=seed), random(num_tokens, hidden, seed=seed + 1)
    found, expected = x.clone(), x.clone()
    placed_experts(cpu_kernels(level), bound)(h, ids, shares, found)
    with reference_rounding_inputs(weights):
        placed_experts(ReferenceKernels(2), bound)(h, ids, shares, expected)
    # The inner activations differ in the last bits, which may move one to the neighbouring int8 code: by 1/127 of
    # its block's largest, times a weight.
    largest = (expected - x).abs().max().item()
    tolerance = 2e-2 * largest if weights in QUANTIZED else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-5)


@each_format
def test_a_tokens_experts_have_the_same_bits_everywhere(weights: WeightFormat) -> None:
    bound = expert_weights(weights, 9, 96, 160)
    ids, shares = random_routes(70, 8, 3, seed=1)  # the ninth expert is never used
    h, x = random(70, 96), random(70, 96, seed=1)
    alone = x.clone()
    first = placed_experts(cpu_kernels(LEVELS[0], 1), bound)
    for t in range(70):
        first(h[[t]], ids[[t]], shares[[t]], alone[t : t + 1])
    for level, num_threads in EVERYWHERE:
        compute = placed_experts(cpu_kernels(level, num_threads), bound)
        for count in (1, 2, 3, 4, 5, 8, 12, 13, 16, 17, 31, 48, 69, 70):
            rows = slice(70 - count, 70)
            out = x[rows].clone()
            compute(h[rows], ids[rows], shares[rows], out)
            assert same_bits(out, alone[rows]), (level, num_threads, count)


@each_level
@each_format
def test_experts_in_parts_have_the_same_bits(level: str, weights: WeightFormat) -> None:
    experts = placed_experts(cpu_kernels(level), expert_weights(weights, 9, 96, 160))
    disturb = cpu_kernels(level).linear(weight_matrix(weights, 48, 96))
    for num_tokens in (1, 3, 40):
        ids, shares = random_routes(num_tokens, 9, 4, seed=1)
        h, x = random(num_tokens, 96), random(num_tokens, 96, seed=1)
        whole, parts, some = x.clone(), x.clone(), x.clone()
        experts(h, ids, shares, whole)
        experts.begin(h, ids)
        experts.begin(h, ids)  # a step that was given up is forgotten
        for part in ([7], [], [0, 5, 2], [8, 1], [6, 4, 3]):
            experts.compute(part)
            disturb(random(70, 96))
        experts.finish(shares, parts)
        assert same_bits(parts, whole)
        # What was not computed counts for nothing, as if it had no share.
        experts.begin(h, ids)
        experts.compute([5, 0])
        experts.finish(shares, some)
        experts(h, ids, shares * ((ids == 0) | (ids == 5)), expected := x.clone())
        torch.testing.assert_close(some, expected, atol=1e-5, rtol=1e-5)


@each_level
@each_format
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_experts_of_no_finite_number_spoil_their_token_alone(
    level: str, weights: WeightFormat, number: float
) -> None:
    compute = placed_experts(cpu_kernels(level), expert_weights(weights, 4, 64, 96))
    ids, shares = random_routes(20, 4, 2, seed=1)
    h, before = random(20, 64), torch.zeros(20, 64)
    compute(h, ids, shares, before)
    h[7, 40] = number
    after = torch.zeros(20, 64)
    compute(h, ids, shares, after)
    others = torch.arange(20) != 7
    assert not after[7].isfinite().any()
    assert same_bits(after[others], before[others])


@each_level
@pytest.mark.parametrize("num_bytes", [0, 1, 255, 256, (1 << 20) + 300])
def test_reading_reaches_every_whole_line(level: str, num_bytes: int) -> None:
    """What is read is added up in words of 32 bits, here all 1; up to 255 bytes at the end may be left out."""
    data = np.ones(-(-num_bytes // 4), np.uint32).view(np.uint8)[:num_bytes]
    assert _cpu.Runtime(level, 2).read(data) == num_bytes // 256 * 64
