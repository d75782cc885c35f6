"""Settings of the gateway."""

from dataclasses import asdict, dataclass

_MAX_TIME_S = 1_000_000
"""Clocks take no infinite times."""


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Bounds and times. Bounds of single fields are in the request schemas."""

    max_body_bytes: int = 16 * 2**20
    """Largest request body; larger ones get 413 before they are parsed."""
    keepalive_s: float = 15.0
    """A stream that has been silent for this long gets a comment, so that proxies keep it open."""
    max_choices: int = 256
    """Most sequences that one request may ask for: its prompts times `n`."""

    max_logprobs: int = 1_000_000
    """Most log-probabilities that one request may ask for: tokens scored, of answers and of echoed prompts, times
    the alternatives plus one. Each takes some hundred bytes until the answer is sent."""
    body_timeout_s: float = 60.0
    """A request whose body has not come whole by then gets 408."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
            if name.endswith("_s") and value > _MAX_TIME_S:
                raise ValueError(f"{name} is {value}; it must be at most {_MAX_TIME_S}")
