"""The C++ attention against the reference: what it adds to the stream, and what it leaves in the cache."""

from dataclasses import replace

import pytest
import torch
from cpu_levels import EVERYWHERE, LEVELS, cpu_kernels, each_level
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import MIXED, QUANTIZED, Batch, attention_weights, reference_rounding_inputs

from localmoe.core.model import QkNorm, WeightFormat
from localmoe.kernels.base import AttentionWeights
from localmoe.kernels.reference import ReferenceKernels


def check(level: str, batch: Batch, weights: AttentionWeights) -> None:
    x, keys, values = batch.run(cpu_kernels(level), weights)
    with reference_rounding_inputs(weights.q.format):
        expected_x, expected_keys, expected_values = batch.run(ReferenceKernels(2), weights)
    rounds_inputs, rounds_cache = weights.q.format in QUANTIZED, keys.dtype is torch.bfloat16
    # Last bits differ, which may move a number to its neighbour in int8 or bfloat16.
    tolerance = 1e-5 + 2e-2 * rounds_inputs + 4e-3 * rounds_cache
    assert x.isfinite().all()
    torch.testing.assert_close(x, expected_x, atol=tolerance, rtol=1e-5)
    for found, expected in ((keys, expected_keys), (values, expected_values)):
        relative = 2**-7 if rounds_cache else 1e-5
        torch.testing.assert_close(
            found, expected, atol=3e-2 if rounds_inputs else 1e-5, rtol=relative, equal_nan=True
        )
        if rounds_cache and not rounds_inputs:
            assert (found == expected).sum() >= 0.98 * expected.isfinite().sum()


@each_level
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
@pytest.mark.parametrize(("num_heads", "num_groups"), [(2, 2), (4, 2), (4, 1), (8, 1), (16, 1), (12, 1), (6, 2)])
def test_heads_of_every_shape(level: str, num_heads: int, num_groups: int, head_dim: int) -> None:
    """Up to more query heads of a key head than a tile has rows, and head sizes that fill no vector."""
    weights = attention_weights(WeightFormat.F32, num_heads, num_groups, head_dim)
    check(level, Batch(MIXED, weights), weights)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_tokens", [16, 32])
@pytest.mark.parametrize("norm", [None, *QkNorm])
@pytest.mark.parametrize("format_", list(WeightFormat))
def test_norms_caches_and_formats(
    level: str, dtype: torch.dtype, block_tokens: int, norm: QkNorm | None, format_: WeightFormat
) -> None:
    weights = attention_weights(format_, 4, 2, 16, norm)
    check(level, Batch(MIXED, weights, block_tokens=block_tokens, dtype=dtype), weights)


@each_level
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (4, 2), (3, 1), (16, 1)]),
    st.booleans(),
)
def test_any_sequences(level: str, spans: list[tuple[int, int]], heads: tuple[int, int], small: bool) -> None:
    weights = attention_weights(WeightFormat.BF16, *heads, 16)
    dtype = torch.bfloat16 if small else torch.float32
    check(level, Batch(spans, weights, block_tokens=32 if small else 16, dtype=dtype), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format_", [WeightFormat.INT8, WeightFormat.BF16, WeightFormat.F32])
@pytest.mark.parametrize("heads", [(4, 2, 80), (32, 2, 8)])
def test_the_same_bits_at_once_and_in_any_parts_everywhere(
    dtype: torch.dtype, format_: WeightFormat, heads: tuple[int, int, int]
) -> None:
    weights = attention_weights(format_, *heads, QkNorm.HEAD)
    batch = Batch([(0, 150), (250, 1), (3, 14)], weights, dtype=dtype)
    expected = batch.run(cpu_kernels(LEVELS[0], 1), weights, [1])
    for level, num_threads in EVERYWHERE:
        kernels = cpu_kernels(level, num_threads)
        for sizes in ([], [1000], [7, 64, 1, 13, 16]):
            for found, wanted in zip(batch.run(kernels, weights, sizes), expected, strict=True):
                word = torch.int16 if found.dtype is torch.bfloat16 else torch.int32
                assert torch.equal(found.view(word), wanted.view(word)), (level, num_threads, sizes)


@each_level
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("format_", [WeightFormat.INT8, WeightFormat.F32])
def test_no_finite_number_spoils_only_what_sees_it(level: str, number: float, format_: WeightFormat) -> None:
    """The token, those that follow it in its sequence, and nothing else."""
    weights = attention_weights(format_, 4, 2, 16)
    batch = Batch([(3, 2), (140, 40), (0, 5)], weights)
    before = batch.run(cpu_kernels(level), weights)[0]
    batch.x_TD[2 + 13, 3] = number
    after, keys, values = batch.run(cpu_kernels(level), weights)
    sees = torch.zeros(47, dtype=torch.bool)
    sees[2 + 13 : 2 + 40] = True
    assert not after[sees].isfinite().any()
    assert torch.equal(after[~sees], before[~sees])
    block, offset = divmod(int(batch.step.slots_T[2 + 13]), 16)
    assert not keys[block, :, :, offset].isfinite().any()
    assert not values[block, :, offset].isfinite().any()


@each_level
def test_scores_far_apart(level: str) -> None:
    """Softmax of scores by hundreds apart, over many chunks of keys."""
    weights = attention_weights(WeightFormat.F32, 4, 2, 16)
    weights = replace(weights, norm_D=weights.norm_D * 12)
    batch = Batch([(500, 30), (0, 140)], weights)
    found = batch.run(cpu_kernels(level), weights)[0]
    expected = batch.run(ReferenceKernels(2), weights)[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)
