"""Settings of the gateway."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Bounds and times. Bounds of single fields are in the request schemas."""

    max_body_bytes: int = 16 * 2**20
    """Largest request body; larger ones get 413 before they are parsed."""
    keepalive_s: float = 15.0
    """A stream that has been silent for this long gets a comment, so that proxies keep it open."""
    max_choices: int = 256
    """Most sequences that one request may ask for: its prompts times `n`."""

    def __post_init__(self) -> None:
        if self.max_body_bytes < 1 or self.keepalive_s <= 0 or self.max_choices < 1:
            raise ValueError(f"every value of GatewayConfig must be positive: {self}")
