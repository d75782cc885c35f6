"""Sparse upcycling (Komatsuzaki et al., 2022): a mixture of experts out of a dense feed-forward block.

Every expert is the dense block with its neurons in another order: the same function, other bytes. Since a
token's expert weights sum to one, the mixture computes what the dense block computed, whatever the router says.

Shape suffixes: T tokens, D hidden size, E experts, K experts per token, F expert width.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from localmoe.catalog.threads import one_thread

_CLUSTERING_STEPS = 40
_BALANCING_STEPS = 60
_FIRST_CHOICE_WEIGHT = 0.7
"""Typical share of the first of a token's two experts; trained Mixtral routers are near it."""


def permute_expert(gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, *, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same gated block with its F neurons in a seeded random order."""
    order_F = torch.randperm(len(gate_FD), generator=torch.Generator().manual_seed(seed))
    return gate_FD[order_F], up_FD[order_F], down_DF[:, order_F].contiguous()


@one_thread()
def fit_router(x_TD: Tensor, *, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Router weights [E, D], BF16, that send each of `num_experts` clusters of inputs to its own expert.

    Clusters are those of spherical k-means (Dhillon & Modha, 2001) over centred inputs. Mixtral's router has no
    bias, so each expert's constant is carried by a direction v with x.v close to 1 for all x (ridge regression).
    The constants also balance the load: overloaded experts are lowered until all are chosen alike often, as in
    auxiliary-loss-free balancing (Wang et al., 2024).

    Args:
        x_TD: inputs of the feed-forward block, float32.
    """
    mean_D = x_TD.mean(0)
    centroids_ED = _spherical_clusters(x_TD - mean_D, num_experts, seed)
    constant_D = _constant_direction(x_TD)
    # Scores of the centred inputs first, so that the offsets to find are small; then balance on what the router
    # will really compute, in which x.v is only close to 1.
    router_ED = centroids_ED - (centroids_ED @ mean_D)[:, None] * constant_D
    offsets_E = _balancing_offsets(x_TD @ router_ED.T, x_TD @ constant_D, top_k)
    router_ED += offsets_E[:, None] * constant_D
    first_T, second_T = (x_TD @ router_ED.T).topk(2, dim=-1).values.unbind(-1)
    wanted_gap = math.log(_FIRST_CHOICE_WEIGHT / (1 - _FIRST_CHOICE_WEIGHT))
    return (router_ED * (wanted_gap / (first_T - second_T).mean())).bfloat16()


def expert_share(router_ED: Tensor, x_TD: Tensor, top_k: int) -> Tensor:
    """Each expert's share of all top-k choices, [E], summing to 1."""
    chosen_TK = (x_TD @ router_ED.float().T).topk(top_k, dim=-1).indices
    return torch.bincount(chosen_TK.flatten(), minlength=len(router_ED)) / chosen_TK.numel()


def _spherical_clusters(x_TD: Tensor, num_clusters: int, seed: int) -> Tensor:
    """Unit centroids [E, D] of directions; per-cluster offsets even out the sizes while the centroids settle."""
    directions_TD = normalize(x_TD)
    generator = torch.Generator().manual_seed(seed)
    centroids_ED = directions_TD[torch.randperm(len(x_TD), generator=generator)[:num_clusters]]
    offsets_E = torch.zeros(num_clusters)
    for _ in range(_CLUSTERING_STEPS):
        scores_TE = directions_TD @ centroids_ED.T + offsets_E
        nearest_T = scores_TE.argmax(-1)
        centroids_ED = normalize(torch.zeros_like(centroids_ED).index_add_(0, nearest_T, directions_TD))
        share_E = torch.bincount(nearest_T, minlength=num_clusters) / len(x_TD)
        offsets_E -= scores_TE.std() * (share_E - 1 / num_clusters)
    return centroids_ED


def _constant_direction(x_TD: Tensor) -> Tensor:
    """v minimising |Xv - 1|^2 with a little ridge, so that it also holds for inputs that were not seen; [D]."""
    gram_DD = x_TD.T @ x_TD / len(x_TD)
    ridge = 1e-2 * gram_DD.diagonal().mean()
    regularised_DD = gram_DD + ridge * torch.eye(len(gram_DD))
    direction_D: Tensor = torch.linalg.solve(regularised_DD, x_TD.mean(0))
    return direction_D


def _balancing_offsets(scores_TE: Tensor, ones_T: Tensor, top_k: int) -> Tensor:
    """Offsets [E] such that the top k of `scores + ones * offsets` choose all columns about equally often."""
    num_experts = scores_TE.shape[1]
    offsets_E = torch.zeros(num_experts)
    step_size = scores_TE.std()
    for step in range(_BALANCING_STEPS):
        chosen_TK = (scores_TE + ones_T[:, None] * offsets_E).topk(top_k, dim=-1).indices
        share_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts) / chosen_TK.numel()
        offsets_E -= step_size * (1 - step / _BALANCING_STEPS) * (share_E - 1 / num_experts)
    return offsets_E
