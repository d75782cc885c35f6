"""A token may have places without an expert, id -1: it is as if it had chosen fewer."""

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
    # Of the first token none, of the others one to four, anywhere.
    kept = random(num_tokens, 4, seed=2) > 0
    kept[:, 2] |= ~kept.any(1)
    kept[0] = False
    some_ids = ids.masked_fill(~kept, -1)
    expected = x.clone()
    for t in range(1, num_tokens):
        row = slice(t, t + 1)
        experts(h[row], ids[row][kept[row]][None], shares[row][kept[row]][None], expected[row])
    spoiled_shares = shares.masked_fill(~kept, torch.nan)
    whole, parts = x.clone(), x.clone()
    experts(h, some_ids, spoiled_shares, whole)
    used = sorted(set(some_ids.flatten().tolist()) - {-1})
    experts.begin(h, some_ids)
    experts.compute(used[1::2])
    experts.compute(used[::2])
    experts.finish(spoiled_shares, parts)
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
