"""Settings of the tiers."""

from dataclasses import dataclass
from typing import Literal

MAX_TIME_S = 1_000_000
"""Longest time that a setting may say; clocks take no infinite ones."""
MAX_QUEUE_DEPTH = 1024
"""More than any disk has."""
MAX_PREFETCH_LAYERS = 256
"""More layers than any model has."""


@dataclass(frozen=True, kw_only=True)
class DiskConfig:
    """How files are read."""

    method: Literal["auto", "io_uring", "threads"] = "auto"
    """`auto`: io_uring, or threads where the kernel or a container refuses it."""
    queue_depth: int | None = None
    """Most pieces with the kernel at a time, of each disk; None: measured on the file itself when it is opened."""
    piece_bytes: int = 4 << 20
    """Reads are cut into pieces of this size; a multiple of 4096. Small pieces cost processor time, and leave
    the disk idle where nobody collects while computing: `queue_depth` pieces are all that it has to do."""
    timeout_s: float = 30.0
    """A disk from which nothing comes for this long is taken for dead."""

    def __post_init__(self) -> None:
        if self.queue_depth is not None and not 1 <= self.queue_depth <= MAX_QUEUE_DEPTH:
            raise ValueError(f"queue_depth is {self.queue_depth}; it must be from 1 to {MAX_QUEUE_DEPTH}")
        if not 4096 <= self.piece_bytes <= 1 << 30 or self.piece_bytes % 4096:
            raise ValueError(f"piece_bytes is {self.piece_bytes}; it must be a multiple of 4096, at most 2^30")
        if not 0 < self.timeout_s <= MAX_TIME_S:
            raise ValueError(f"timeout_s is {self.timeout_s}; it must be positive, at most {MAX_TIME_S}")


@dataclass(frozen=True, kw_only=True)
class TiersConfig:
    """What a model larger than memory may take, and how it is spread."""

    ram_bytes: int | None = None
    """RAM for everything the engine holds; None: what is available to it, within its control group's limit."""
    vram_bytes: int | None = None
    """Of the GPU's memory, where the engine computes on one; None: what is free, less a reserve."""
    reserve_bytes: int = 128 << 20
    """Of what is available, left alone for whatever else the process needs."""
    policy: Literal["adaptive", "lru", "lfu"] = "adaptive"
    """Which experts to keep: what is worth most by all that was seen, or what was used last, or most often."""
    placement: tuple[str, ...] = ()
    """Ordered rules `PATTERN=PLACE` over names such as `layers.3.experts.17`; the first match decides. `ram` is
    kept once read, `disk` goes first once used, `device` leaves a GPU last, `auto` is up to the policy, as with `N%`,
    but those that match hold at most that share of RAM's slots."""
    prefetch_layers: int = 2
    """Read ahead, while the disk is idle, what so many of the following layers are expected to use; 0: nothing."""
    stripes: tuple[str, ...] = ()
    """Files that `localmoe models stripe` wrote on other disks: experts that are there are read from there."""
    disk: DiskConfig = DiskConfig()

    def __post_init__(self) -> None:
        if self.ram_bytes is not None and self.ram_bytes <= 0:
            raise ValueError(f"ram_bytes is {self.ram_bytes}; it must be positive")
        if self.vram_bytes is not None and self.vram_bytes <= 0:
            raise ValueError(f"vram_bytes is {self.vram_bytes}; it must be positive")
        if not 0 <= self.prefetch_layers <= MAX_PREFETCH_LAYERS:
            raise ValueError(
                f"prefetch_layers is {self.prefetch_layers}; it must be from 0 to {MAX_PREFETCH_LAYERS}"
            )
        if self.reserve_bytes < 0:
            raise ValueError(f"reserve_bytes is {self.reserve_bytes}; it must not be negative")
