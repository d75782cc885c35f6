"""Settings of dispatch."""

from dataclasses import dataclass
from typing import Literal

_MAX_TIME_S = 1_000_000
"""Clocks take no infinite times."""

PolicyName = Literal["auto", "round_robin", "weighted_round_robin", "least_connections", "resource_aware"]


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    """How requests are shared out among the engines of a model."""

    policy: PolicyName = "auto"
    """`auto`: the engine that is predicted to complete the answer first, by what has been measured;
    `weighted_round_robin`: in turn, in proportion to measured tokens per second; `resource_aware`: the least used
    memory, processor or GPU, and the coolest."""
    prefix_affinity: bool = True
    """Prefer an engine that has computed the beginning of a prompt before, unless it has much more to do."""
    max_queued: int = 1000
    """Requests of one model that may wait for a place; more are refused."""
    request_timeout_s: float = 600.0
    """An answer that is not complete by then ends with an error. A client may ask for less, not for more."""
    stall_timeout_s: float = 60.0
    """An engine that sends nothing of an answer for this long, or for a third of the time that the answer has left,
    is left for another one that can go on; but not before three times what a first token is predicted to take."""
    max_attempts: int = 3
    """Engines that are tried for one answer before its failure is the client's."""
    retry_backoff_s: float = 1.0
    """Pause before an engine that has failed is tried again for the same answer; doubled each time."""
    breaker_failures: int = 5
    """After so many failures in a row an engine gets no requests."""
    breaker_open_s: float = 60.0
    """For this long; then one request tries."""
    max_temperature_c: float = 87.0
    """`resource_aware` leaves out a GPU that is hotter, while another is not."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, str | bool):
                continue
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
            if name.endswith("_s") and value > _MAX_TIME_S:
                raise ValueError(f"{name} is {value}; it must be at most {_MAX_TIME_S}")
