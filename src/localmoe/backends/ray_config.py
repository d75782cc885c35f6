"""Settings of serving on a Ray cluster."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where `localmoe serve --ray` serves, and with how many gateways."""

    address: str = "auto"
    """HOST:PORT of the cluster's head, as `ray start` printed it; `auto`: the cluster that this machine is in."""
    num_gateways: int | None = None
    """Processes that parse, tokenize and dispatch; None: one for each node."""

    def __post_init__(self) -> None:
        if not self.address:
            raise ValueError("address is empty; it must be auto, or HOST:PORT")
        if self.address.startswith("ray://"):
            raise ValueError(
                f"address is {self.address!r}; Ray Client is not used: serve from a node of the cluster"
            )
        if self.num_gateways is not None and self.num_gateways < 1:
            raise ValueError(f"num_gateways is {self.num_gateways}; it must be positive")
