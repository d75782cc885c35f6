"""The Triton experts against the reference, and the same bits in any slots, in any batch and in parts."""

from collections.abc import Sequence

import pytest
import torch
from gpu_device import gpu_kernels, not_finite, on_device
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_samples import QUANTIZED, expert_weights, random, random_routes, same_bits
from torch import Tensor

from localmoe.core.model import WeightFormat
from localmoe.formats.store import ExpertWeights
from localmoe.formats.store_layout import expert_layout
from localmoe.kernels.base import placed_experts
from localmoe.kernels.reference import ReferenceKernels
from localmoe.kernels.triton.experts import ExpertSlab, SlotExperts

each_format = pytest.mark.parametrize("weights", list(WeightFormat))


def check(found: Tensor, wanted: Tensor, weights: WeightFormat) -> None:
    """Inputs are rounded to bfloat16 twice on the way, INT8's weights, too."""
    tolerance = 1e-5 if weights is WeightFormat.F32 else 1e-2 * wanted.abs().max().item()
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=1e-5)


def in_slots(weights: Sequence[ExpertWeights], slots: Sequence[int], device: str) -> SlotExperts:
    """Experts in these slots of a slab whose rest is NaN or at least nonsense."""
    gate = weights[0].gate
    slab = ExpertSlab.allocate(
        expert_layout(gate.columns, gate.rows, gate.format), max(slots) + 1, torch.device(device)
    )
    slab.blobs.fill_(0xFF)
    experts = SlotExperts(slab, len(weights))
    for expert, (matrices, slot) in enumerate(zip(weights, slots, strict=True)):
        slab.write(slot, matrices)
        experts.place(expert, slot)
    return experts


def added(experts: SlotExperts, h: Tensor, ids: Tensor, shares: Tensor, device: str) -> Tensor:
    x = torch.zeros_like(h, device=device)
    experts(h.to(device), ids.to(device), shares.to(device), x)
    return x.cpu()


def expected(weights: Sequence[ExpertWeights], h: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
    x = torch.zeros_like(h)
    placed_experts(ReferenceKernels(2), weights)(h, ids, shares, x)
    return x


@on_device
@each_format
@settings(deadline=None, max_examples=4)
@given(st.sampled_from([1, 2, 5, 17, 40]), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_experts(
    device: str, weights: WeightFormat, num_tokens: int, num_experts: int, k: int, wide: bool, seed: int
) -> None:
    hidden, width = (64, 160) if wide else (96, 32)
    if weights not in QUANTIZED:
        hidden, width = hidden - 3, width - 5
    bound = expert_weights(weights, num_experts, hidden, width)
    ids, shares = random_routes(num_tokens, num_experts, min(k, num_experts), seed)
    h, x = random(num_tokens, hidden, seed=seed), random(num_tokens, hidden, seed=seed + 1)
    found = x.clone().to(device)
    placed_experts(gpu_kernels(device), bound)(h.to(device), ids.to(device), shares.to(device), found)
    check(found.cpu() - x, expected(bound, h, ids, shares), weights)


@on_device
@pytest.mark.parametrize("num_tokens", [3, 147])
def test_many_pairs_of_few_experts(device: str, num_tokens: int) -> None:
    """One expert gets tiles of its own kind, another none at all, and pairs are sorted in more than one go."""
    bound = expert_weights(WeightFormat.MXFP4, 9, 32, 32)
    ids, shares = random_routes(num_tokens, 8, 7, seed=1)
    h = random(num_tokens, 32)
    found = added(in_slots(bound, range(9), device), h, ids, shares, device)
    check(found, expected(bound, h, ids, shares), WeightFormat.MXFP4)


@on_device
@each_format
def test_the_same_bits_in_any_slots_and_every_batch(device: str, weights: WeightFormat) -> None:
    bound = expert_weights(weights, 4, 64, 32)
    ids, shares = random_routes(24, 4, 3, seed=1)
    h = random(24, 64)
    together = added(in_slots(bound, [0, 1, 2, 3], device), h, ids, shares, device)
    experts = in_slots(bound, [6, 2, 0, 3], device)
    for count in (1, 24):
        rows = slice(24 - count, 24)
        assert same_bits(added(experts, h[rows], ids[rows], shares[rows], device), together[rows]), count


@on_device
@each_format
def test_experts_that_are_not_here_add_nothing(device: str, weights: WeightFormat) -> None:
    bound = expert_weights(weights, 4, 64, 32)
    ids, shares = random_routes(9, 4, 3, seed=1)
    h = random(9, 64)
    experts = in_slots(bound, range(4), device)
    for absent in ({2, 0}, {0, 1, 2, 3}):
        for expert in absent:
            experts.remove(expert)
        here = torch.where(torch.isin(ids, torch.tensor(sorted(absent))), 0.0, shares)
        found = added(experts, h, ids, shares, device)
        check(found, expected(bound, h, ids, here), weights)
        for expert in absent:
            experts.place(expert, expert)
    assert same_bits(
        added(experts, h, ids, shares, device), added(in_slots(bound, range(4), device), h, ids, shares, device)
    )


@on_device
def test_a_place_without_an_expert_changes_nothing(device: str) -> None:
    experts = in_slots(expert_weights(WeightFormat.MXFP4, 4, 64, 32), range(4), device)
    ids, shares = random_routes(9, 4, 2, seed=1)
    h = random(9, 64)
    nothing = torch.full((9, 1), -1, dtype=torch.int32)
    more_ids = torch.cat([nothing, ids[:, :1], nothing, ids[:, 1:]], dim=1)
    more_shares = torch.cat([torch.ones(9, 1), shares[:, :1], torch.full((9, 1), torch.nan), shares[:, 1:]], dim=1)
    found = added(experts, h, more_ids, more_shares, device)
    assert torch.equal(found, added(experts, h, ids, shares, device))
    assert not added(experts, h, nothing, torch.ones(9, 1), device).any()


@on_device
def test_the_same_bits_in_parts_while_others_move(device: str) -> None:
    """Only what is computed counts, where it was when it was computed."""
    bound = expert_weights(WeightFormat.NVFP4, 6, 64, 32)
    ids, shares = random_routes(20, 6, 3, seed=1)
    h = random(20, 64)
    together = added(in_slots(bound, range(6), device), h, ids, shares, device)
    experts = in_slots(bound, range(6), device)
    x = torch.zeros(20, 64, device=device)
    experts.remove(5)
    experts.begin(h.to(device), ids.to(device))
    experts.compute([4, 0])
    experts.remove(4)
    experts.compute([])
    experts.compute([2, 1])
    experts.place(5, 5)
    experts.compute([3, 5])
    experts.place(0, 4)
    experts.finish(shares.to(device), x)
    assert same_bits(x.cpu(), together)


@on_device
@each_format
@not_finite
@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_experts_of_no_finite_number_spoil_their_token_alone(
    device: str, weights: WeightFormat, number: float
) -> None:
    experts = in_slots(expert_weights(weights, 3, 64, 32), range(3), device)
    ids, shares = random_routes(9, 3, 2, seed=1)
    h = random(9, 64)
    before = added(experts, h, ids, shares, device)
    h[7, 40] = number
    after = added(experts, h, ids, shares, device)
    others = torch.arange(9) != 7
    assert not after[7].isfinite().any()
    assert same_bits(after[others], before[others])


def test_a_slab_that_does_not_fit_is_refused() -> None:
    layout = expert_layout(64, 32, WeightFormat.INT8)
    blobs, scales = torch.empty(2, layout.num_bytes, dtype=torch.uint8), torch.empty(2, 3)
    ExpertSlab(layout=layout, blobs=blobs, tensor_scales=scales)
    for bad_blobs, bad_scales in (
        (blobs[:, :-64].contiguous(), scales),
        (torch.empty(2, layout.num_bytes + 8, dtype=torch.uint8), scales),
        (blobs[:, ::2], scales),
        (blobs.char(), scales),
        (blobs, scales[:1]),
        (blobs, scales.double()),
    ):
        with pytest.raises(ValueError, match="cannot hold blobs"):
            ExpertSlab(layout=layout, blobs=bad_blobs, tensor_scales=bad_scales)
