"""Which of several engines that could take a request gets it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from localmoe.core.protocols import ResourceMeter
from localmoe.dispatch.config import DispatchConfig
from localmoe.dispatch.replica import Replica

_AFFINITY_SLACK = 2
"""Answers that an engine may have under way beyond the least, and still be preferred for a prefix."""
_RETRY_WITHIN = 1.2
"""An engine not used for long is tried again where it is predicted to take at most so many times the best."""
_STALE_S = 300.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a policy may know of a request and the engines' load."""

    num_prompt_tokens: int
    expected_tokens: float
    """Of the answer."""
    known_tokens: Mapping[str, int]
    """By engine's name: prompt tokens that it has computed before."""
    num_beside: Mapping[str, int]
    """By engine's name: answers under way in other engines of the model that share its processor."""


class Policy(Protocol):
    """Chooses; called once for each request that is given to an engine."""

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """One of the candidates, of which there is at least one; all have a place free."""
        ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._turns: dict[str, int] = {}

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """See `Policy.choose`: the one whose turn is longest ago."""
        chosen = min(candidates, key=lambda replica: self._turns.get(replica.name, 0))
        self._turns[chosen.name] = max(self._turns.values(), default=0) + 1
        return chosen


class WeightedRoundRobin:
    """Each in turn, in proportion to its measured tokens per second (nginx's smooth weighting)."""

    def __init__(self) -> None:
        self._credit: dict[str, float] = {}

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """See `Policy.choose`."""
        # Measured at one load for all: an engine's rate grows with its load, and would draw ever more to itself.
        num_streams = max(1, round(sum(replica.num_running for replica in candidates) / len(candidates)))
        weights = {replica.name: self._tokens_per_s(replica, num_streams) for replica in candidates}
        known = [weight for weight in weights.values() if weight is not None]
        usual = sum(known) / len(known) if known else 1.0
        total = 0.0
        for replica in candidates:
            weight = weights[replica.name]
            weight = usual if weight is None else weight
            total += weight
            self._credit[replica.name] = self._credit.get(replica.name, 0.0) + weight
        chosen = max(candidates, key=lambda replica: self._credit[replica.name])
        self._credit[chosen.name] -= total
        return chosen

    @staticmethod
    def _tokens_per_s(replica: Replica, num_streams: int) -> float | None:
        """With so many answers under way, as far as it has places."""
        if not replica.speed.is_known:
            return None
        num_streams = min(num_streams, replica.backend.capacity)
        return num_streams / replica.speed.token_s(num_streams - 1, 0)


class LeastConnections:
    """The one with the fewest answers under way for the places it has."""

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """See `Policy.choose`."""
        return min(candidates, key=_fullness)


class ResourceAware:
    """The one whose devices have most left, of memory, computing time and coolness.

    Args:
        meter: says what is used.
        max_temperature_c: hotter GPUs are left out while there are others.
    """

    def __init__(self, meter: ResourceMeter, *, max_temperature_c: float) -> None:
        self._meter = meter
        self._max_temperature_c = max_temperature_c

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """See `Policy.choose`."""
        used = {replica.name: self._meter.resources(replica.devices) for replica in candidates}

        def pressure(replica: Replica) -> tuple[float, float]:
            use = used[replica.name]
            # Of one that is too hot it is more than any share can be.
            heat = (use.temperature_c or 0.0) / self._max_temperature_c
            return max(use.memory_share, use.busy_share, heat), _fullness(replica)

        return min(candidates, key=pressure)


class FirstToComplete:
    """The one that is predicted to complete the answer first; the time that it costs the answers under way counts,
    too, or whoever comes would take the last that a shared processor has from those who are there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """See `Policy.choose`. One of which nothing is known is tried, with one request while others are known."""
        known = [replica for replica in candidates if replica.speed.is_known]
        untried = [replica for replica in candidates if replica not in known and not replica.num_running]
        if untried or not known:
            return min(untried or candidates, key=_fullness)
        return self._first(known, load)

    def _first(self, candidates: Sequence[Replica], load: Load) -> Replica:
        took_s = {
            replica.name: self.completion_s(replica, load) + self._burden_s(replica, candidates, load)
            for replica in candidates
        }
        best = min(candidates, key=lambda replica: took_s[replica.name])
        stale = [
            replica
            for replica in candidates
            if not replica.num_running
            and self._clock() - replica.last_used_s > _STALE_S
            and took_s[replica.name] < _RETRY_WITHIN * took_s[best.name]
        ]
        return min(stale, key=lambda replica: took_s[replica.name]) if stale else best

    @staticmethod
    def _burden_s(chosen: Replica, candidates: Sequence[Replica], load: Load) -> float:
        """Seconds that all answers under way are predicted to take longer, of which half is still to come."""
        burden_s = 0.0
        for replica in candidates:
            running, beside = replica.num_running, load.num_beside[replica.name]
            if running and replica.speed.is_known and replica.processor is chosen.processor:
                here = replica is chosen
                after_s = replica.speed.token_s(running - 1 + here, beside + (not here))
                slower_s = after_s - replica.speed.token_s(running - 1, beside)
                burden_s += running * slower_s * load.expected_tokens / 2
        return burden_s

    @staticmethod
    def completion_s(replica: Replica, load: Load) -> float:
        """Seconds that the whole answer is predicted to take."""
        cached = replica.cache_share * load.known_tokens.get(replica.name, 0)
        running, beside = replica.num_running, load.num_beside[replica.name]
        to_compute = replica.backlog_tokens + int(load.num_prompt_tokens - cached)
        first_s = replica.speed.first_s(to_compute, running, beside)
        return first_s + load.expected_tokens * replica.speed.token_s(running, beside)


class PrefixAffinity:
    """Sends prompts that begin alike to the same engine, unless it has much more to do; else asks another policy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def choose(self, candidates: Sequence[Replica], load: Load) -> Replica:
        """See `Policy.choose`. Half of the prompt at least must be known."""
        least = min(replica.num_running for replica in candidates)
        best = max(candidates, key=lambda replica: (load.known_tokens.get(replica.name, 0), -_fullness(replica)))
        known = load.known_tokens.get(best.name, 0)
        if 2 * known >= load.num_prompt_tokens > 0 and best.num_running <= least + _AFFINITY_SLACK:
            return best
        return self._policy.choose(candidates, load)


def make_policy(config: DispatchConfig, meter: ResourceMeter) -> Policy:
    """The policy that the settings name. The automatic one weighs what is cached by itself."""
    if config.policy == "auto":
        return FirstToComplete()
    policy: Policy
    match config.policy:
        case "round_robin":
            policy = RoundRobin()
        case "weighted_round_robin":
            policy = WeightedRoundRobin()
        case "least_connections":
            policy = LeastConnections()
        case "resource_aware":
            policy = ResourceAware(meter, max_temperature_c=config.max_temperature_c)
    return PrefixAffinity(policy) if config.prefix_affinity else policy


def _fullness(replica: Replica) -> float:
    return replica.num_running / replica.backend.capacity
