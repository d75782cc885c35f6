"""A token may name one expert several times, all but once without weight: it is as if it had named it once."""

import pytest
import torch
from cpu_levels import cpu_kernels, each_format, each_level
from kernel_samples import expert_weights, random, random_routes

from localmoe.core.model import WeightFormat
from localmoe.kernels.base import Kernels, placed_experts
from localmoe.kernels.reference import ReferenceKernels


def check(kernels: Kernels, weights: WeightFormat, num_tokens: int) -> None:
    experts = placed_experts(kernels, expert_weights(weights, 9, 96, 64))
    ids, shares = random_routes(num_tokens, 9, 4, seed=1)
    h, x = random(num_tokens, 96), random(num_tokens, 96, seed=1)
    kept = torch.arange(num_tokens) % 4 + 1  # how many of each token's experts stay
    repeats = torch.arange(4)[None] >= kept[:, None]
    repeated_ids, repeated_shares = torch.where(repeats, ids[:, :1], ids), shares.masked_fill(repeats, 0)
    expected = x.clone()
    for t, count in enumerate(kept.tolist()):
        row = slice(t, t + 1)
        experts(h[row], ids[row, :count].contiguous(), shares[row, :count].contiguous(), expected[row])
    whole, parts = x.clone(), x.clone()
    experts(h, repeated_ids, repeated_shares, whole)
    used = sorted(set(repeated_ids.flatten().tolist()))
    experts.begin(h, repeated_ids)
    experts.compute(used[1::2])
    experts.compute(used[::2])
    experts.finish(repeated_shares, parts)
    assert torch.equal(parts, whole)
    if isinstance(kernels, ReferenceKernels):
        torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)  # BLAS adds otherwise for more tokens
    else:
        assert torch.equal(whole, expected)


@each_level
@each_format
@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_cpu(level: str, weights: WeightFormat, num_tokens: int) -> None:
    check(cpu_kernels(level), weights, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 3, 40])
def test_reference(num_tokens: int) -> None:
    check(ReferenceKernels(2), WeightFormat.F32, num_tokens)
