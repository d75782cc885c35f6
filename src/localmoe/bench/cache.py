"""Hit rates of expert caches on a recorded routing trace, between plain LRU and the offline optimum.

The model of a cache is the same for all: a number of slots shared by all layers, empty at first. A layer of a step
asks for all its experts at once; those not kept are read into a transit place beside the slots, whatever their
number. After the layer each of its experts is kept or dropped, and so is each that was kept before. Nothing else is
ever read. LRU keeps what was used last. Prompts pass through the cache like everything, but only uses by decoded
tokens are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localmoe.core.errors import ConfigError
from localmoe.residency.policy import PolicyName, RetentionPolicy, retention_policy
from localmoe.residency.trace import LayerUse, RoutingTrace


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Hit rates are shares of the decoded tokens' uses."""

    model: str
    budget_fraction: float
    """Of all experts of the model."""
    num_slots: int
    """Experts that the budget holds."""
    num_uses: int
    """By decoded tokens."""
    lru: float
    lfu: float
    ours: float
    belady: float
    """Of the cache that knows the future: no cache of this size has more hits."""
    gap_closed: float | None
    """(ours - lru) / (belady - lru); none where LRU is already optimal."""


def measure_cache(trace: RoutingTrace, budget_fraction: float) -> CacheReport:
    """Replay a trace through a cache that holds this share of the model's experts.

    Raises:
        ConfigError: the budget holds no expert.
    """
    num_slots = int(budget_fraction * trace.num_layers * trace.num_experts)
    if num_slots < 1:
        raise ConfigError(f"--budget-fraction {budget_fraction} holds none of the experts of {trace.model}")

    def rate(name: PolicyName) -> float:
        policy = retention_policy(name, trace.num_layers, trace.num_experts)
        return policy_hits(trace, policy, num_slots) / num_uses

    num_uses = sum(use.experts.size for use in trace.uses if not use.is_prompt)
    lru, ours, belady = rate("lru"), rate("adaptive"), belady_hits(trace, num_slots) / num_uses
    return CacheReport(
        model=trace.model,
        budget_fraction=budget_fraction,
        num_slots=num_slots,
        num_uses=num_uses,
        lru=lru,
        lfu=rate("lfu"),
        ours=ours,
        belady=belady,
        gap_closed=(ours - lru) / (belady - lru) if belady > lru else None,
    )


def policy_hits(trace: RoutingTrace, policy: RetentionPolicy, num_slots: int) -> int:
    """Hits of decoded tokens in a cache that keeps what the policy finds most worth keeping."""
    kept = np.zeros(trace.num_layers * trace.num_experts, np.bool_)
    num_hits = 0
    for use, indices in _accesses(trace):
        if not use.is_prompt:
            num_hits += int(np.count_nonzero(kept[indices]))
        policy.observe(use.layer, use.experts, prefill=use.is_prompt)
        kept[indices] = True
        _keep_best(kept, policy.values().ravel(), num_slots)
    return num_hits


def belady_hits(trace: RoutingTrace, num_slots: int) -> int:
    """The most hits of decoded tokens that any cache can have: it keeps what is decoded with next.

    L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966, for a cache that need not
    keep what it has just read. An expert whose next use is by a prompt is not kept for it: that hit is not counted,
    and it can be kept from then on.
    """
    kept = np.zeros(trace.num_layers * trace.num_experts, np.bool_)
    # The sooner an expert is decoded with, the larger its value; minus infinity where that is not its next use.
    values = np.full(len(kept), -np.inf)
    num_hits = 0
    for (use, indices), next_uses in zip(_accesses(trace), _next_decoded_uses(trace), strict=True):
        if not use.is_prompt:
            num_hits += int(np.count_nonzero(kept[indices]))
        values[indices] = -next_uses
        kept[indices] = True
        _keep_best(kept, values, num_slots)
    return num_hits


def _next_decoded_uses(trace: RoutingTrace) -> list[NDArray[np.float64]]:
    """For each access and expert the access that uses it next, infinity where that is a prompt's or there is none."""
    following = np.full(trace.num_layers * trace.num_experts, np.inf)
    next_uses = []
    for number, (use, indices) in reversed(list(enumerate(_accesses(trace)))):
        next_uses.append(following[indices])
        following[indices] = np.inf if use.is_prompt else number
    return next_uses[::-1]


def _accesses(trace: RoutingTrace) -> Iterator[tuple[LayerUse, NDArray[np.intp]]]:
    """Each use, and the distinct experts of it among those of all layers."""
    for use in trace.uses:
        yield use, np.unique(use.experts).astype(np.intp) + use.layer * trace.num_experts


def _keep_best(kept: NDArray[np.bool_], values: NDArray[np.float64], num_slots: int) -> None:
    indices = np.flatnonzero(kept)
    num_over = len(indices) - num_slots
    if num_over > 0:
        kept[indices[np.argpartition(values[indices], num_over - 1)[:num_over]]] = False
