"""The maths of upcycling: experts compute the dense block, routers separate clusters and share the load."""

import pytest
import torch
from torch.nn.functional import linear, silu

from localmoe.catalog.upcycle import expert_share, fit_router, permute_expert


def block(x_TD: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return linear(silu(linear(x_TD, gate)) * linear(x_TD, up), down)


def test_permuted_expert_is_the_same_function_in_other_bytes() -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 48, 16, generator=generator, dtype=torch.float64)
    down = torch.randn(16, 48, generator=generator, dtype=torch.float64)
    x_TD = torch.randn(10, 16, generator=generator, dtype=torch.float64)
    first, second, again = (permute_expert(gate, up, down, seed=seed) for seed in (1, 2, 1))
    for expert in (first, second):
        torch.testing.assert_close(block(x_TD, *expert), block(x_TD, gate, up, down), rtol=1e-12, atol=1e-12)
        assert all(matrix.is_contiguous() for matrix in expert)
    for a, b, c in zip(first, second, again, strict=True):
        assert not torch.equal(a, b)
        assert torch.equal(a, c)


def clustered(num_tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [T, D] around 4 centres of very different sizes, far from the origin, and each one's centre."""
    centres = torch.randn(4, 32, generator=torch.Generator().manual_seed(7)) + 2.0
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.4, 0.3, 0.2, 0.1])
    labels = torch.multinomial(sizes, num_tokens, replacement=True, generator=generator)
    return centres[labels] + 0.3 * torch.randn(num_tokens, 32, generator=generator), labels


def test_router_balances_load_on_unseen_tokens() -> None:
    x_TD, _ = clustered(4000, seed=1)
    router_ED = fit_router(x_TD, num_experts=4, top_k=2, seed=0)
    assert router_ED.dtype == torch.bfloat16
    held_out_TD, _ = clustered(4000, seed=2)
    share_E = expert_share(router_ED, held_out_TD, 2)
    assert share_E.sum() == pytest.approx(1)
    assert share_E.min() > 0.2
    assert share_E.max() < 0.3


def test_router_separates_clusters() -> None:
    x_TD, labels_T = clustered(4000, seed=1)
    router_ED = fit_router(x_TD, num_experts=4, top_k=2, seed=0)
    held_out_TD, labels_T = clustered(4000, seed=2)
    chosen_TK = (held_out_TD @ router_ED.float().T).topk(2).indices
    # What a token's cluster says about its experts, against a router that does not look: mutual information.
    pairs = (chosen_TK.sort(-1).values * torch.tensor([4, 1])).sum(-1)
    joint = torch.zeros(4, 16).index_put_((labels_T, pairs), torch.ones(4000), accumulate=True) / 4000
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information_nats = (joint * (joint / independent).clamp_min(1e-12).log()).nansum()
    assert information_nats > 0.6


def test_first_choice_outweighs_the_second_but_not_all() -> None:
    x_TD, _ = clustered(4000, seed=1)
    router_ED = fit_router(x_TD, num_experts=4, top_k=2, seed=0).float()
    first_T = (x_TD @ router_ED.T).topk(2).values.softmax(-1)[:, 0]
    assert 0.6 < first_T.mean() < 0.8


def test_fitting_is_reproducible() -> None:
    x_TD, _ = clustered(1000, seed=1)
    first, second, other = (fit_router(x_TD, num_experts=4, top_k=2, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
