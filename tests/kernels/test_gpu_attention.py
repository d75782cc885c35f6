"""The Triton attention against the reference: what it adds to the stream, and what it leaves in the cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_device import gpu_kernels, not_finite, on_device
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import Batch, attention_weights

from localmoe.core.model import QkNorm, WeightFormat
from localmoe.kernels.base import AttentionWeights
from localmoe.kernels.reference import ReferenceKernels
from localmoe.kernels.triton.attention import PIECE_TOKENS


def check(device: str, batch: Batch, weights: AttentionWeights) -> None:
    x, keys, values = batch.run(gpu_kernels(device), weights, device=device)
    expected_x, expected_keys, expected_values = batch.run(ReferenceKernels(2), weights)
    rounds_inputs, rounds_cache = weights.q.format is not WeightFormat.F32, keys.dtype is torch.bfloat16
    assert x.isfinite().all()
    tolerance = 1e-5 + 2e-2 * rounds_inputs + 1e-2 * rounds_cache
    torch.testing.assert_close(x, expected_x, atol=tolerance, rtol=1e-5)
    for found, expected in ((keys, expected_keys), (values, expected_values)):
        relative = 2**-7 if rounds_cache else 1e-5
        torch.testing.assert_close(
            found, expected, atol=3e-2 if rounds_inputs else 1e-5, rtol=relative, equal_nan=True
        )
        if rounds_cache and not rounds_inputs:
            assert (found == expected).sum() >= 0.98 * expected.isfinite().sum()


@on_device
@pytest.mark.parametrize(
    ("num_heads", "num_groups", "head_dim"),
    [(2, 2, 64), (4, 1, 80), (12, 1, 16), (6, 2, 128), (70, 1, 8)],
)
def test_heads_of_every_shape(device: str, num_heads: int, num_groups: int, head_dim: int) -> None:
    weights = attention_weights(WeightFormat.F32, num_heads, num_groups, head_dim)
    check(device, Batch([(0, 18 if num_heads < 64 else 3), (37, 1)], weights), weights)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [None, *QkNorm])
def test_norms_and_caches(device: str, dtype: torch.dtype, norm: QkNorm | None) -> None:
    weights = attention_weights(WeightFormat.F32, 4, 2, 16, norm)
    block_tokens = 32 if dtype is torch.float32 else 16
    check(device, Batch([(0, 9), (130, 3), (15, 1)], weights, block_tokens=block_tokens, dtype=dtype), weights)


@on_device
@pytest.mark.parametrize("format_", list(WeightFormat))
def test_formats(device: str, format_: WeightFormat) -> None:
    weights = attention_weights(format_, 4, 2, 16, QkNorm.HEAD)
    check(device, Batch([(0, 5), (37, 1)], weights, dtype=torch.bfloat16), weights)


@on_device
@settings(deadline=None, max_examples=3)
@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 12)), min_size=1, max_size=3),
    st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    st.booleans(),
)
def test_any_sequences(device: str, spans: list[tuple[int, int]], heads: tuple[int, int], small: bool) -> None:
    weights = attention_weights(WeightFormat.BF16, *heads, 16)
    dtype = torch.bfloat16 if small else torch.float32
    check(device, Batch(spans, weights, block_tokens=32 if small else 16, dtype=dtype), weights)


@on_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_at_once_and_in_any_parts(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts of one piece, two and three, whose pieces are computed by one program or side by side."""
    monkeypatch.setattr("localmoe.kernels.triton.attention.PIECE_TOKENS", 128)
    weights = attention_weights(WeightFormat.INT8, 4, 2, 16, QkNorm.HEAD)
    spans = [(126, 4), (0, 7), (257, 1)]
    batch = Batch(spans, weights, dtype=dtype)
    expected = batch.run(gpu_kernels(device), weights, device=device)
    for enough_programs, sizes in ((512, [1, 3]), (0, []), (0, [3, 1])):
        monkeypatch.setattr("localmoe.kernels.triton.attention._ENOUGH_PROGRAMS", enough_programs)
        found = batch.run(gpu_kernels(device), weights, sizes, device=device)
        for part, wanted in zip(found, expected, strict=True):
            word = torch.int16 if part.dtype is torch.bfloat16 else torch.int32
            assert torch.equal(part.view(word), wanted.view(word)), (enough_programs, sizes)


@on_device
@not_finite
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_finite_number_spoils_only_what_sees_it(device: str, number: float, dtype: torch.dtype) -> None:
    """The token, those that follow it in its sequence, and nothing else."""
    weights = attention_weights(WeightFormat.F32, 4, 2, 16)
    batch = Batch([(3, 2), (70, 20), (0, 5)], weights, dtype=dtype)
    before = batch.run(gpu_kernels(device), weights, device=device)[0]
    batch.x_TD[2 + 13, 3] = number
    after, keys, values = batch.run(gpu_kernels(device), weights, device=device)
    sees = torch.zeros(27, dtype=torch.bool)
    sees[2 + 13 : 2 + 20] = True
    assert not after[sees].isfinite().any()
    assert torch.equal(after[~sees], before[~sees])
    block, offset = divmod(int(batch.step.slots_T[2 + 13]), 16)
    assert not keys[block, :, :, offset].isfinite().any()
    assert not values[block, :, offset].isfinite().any()


@on_device
@not_finite
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_of_no_finite_number_spoils_what_sees_it(device: str, dtype: torch.dtype) -> None:
    """Though its key be one."""
    weights = attention_weights(WeightFormat.F32, 4, 2, 16)
    batch = Batch([(3, 2), (70, 3)], weights, dtype=dtype)
    before = batch.run(gpu_kernels(device), weights, device=device)[0]
    block = int(batch.step.tables_SN[1, 4])
    batch.cache[1][block, 1, 5, 3] = torch.inf
    after = batch.run(gpu_kernels(device), weights, device=device)[0]
    assert torch.equal(after[:2], before[:2])
    assert not after[2:].isfinite().any()


@on_device
def test_scores_far_apart(device: str) -> None:
    """Softmax of scores by hundreds apart, over several tiles and pieces of keys."""
    weights = attention_weights(WeightFormat.F32, 4, 2, 16)
    weights = replace(weights, norm_D=weights.norm_D * 12)
    batch = Batch([(PIECE_TOKENS + 20, 2), (0, 10)], weights)
    found = batch.run(gpu_kernels(device), weights, device=device)[0]
    expected = batch.run(ReferenceKernels(2), weights)[0]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


@on_device
def test_every_step_is_copied_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer after another gets the same step, the next step another one."""
    weights = attention_weights(WeightFormat.F32, 4, 2, 16)
    kernels = gpu_kernels(device)
    first, second = Batch([(3, 2)], weights), Batch([(9, 1), (2, 2)], weights)
    outs = [batch.run(kernels, weights, device=device)[0] for batch in (first, first, second, first)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[3])
    changed = replace(first.step, cosines_Td=np.zeros_like(first.step.cosines_Td))
    first.step = changed
    assert not torch.equal(first.run(kernels, weights, device=device)[0], outs[0])
