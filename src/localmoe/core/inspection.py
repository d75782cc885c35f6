"""What an engine knows about its experts and its memory, in full; told when asked, not after every step."""

from typing import Literal

import msgspec

from localmoe.core.events import TierState


class MemoryShare(msgspec.Struct, frozen=True, kw_only=True):
    """One use of an engine's memory."""

    name: str
    """`kv_cache`, `workspace` (what a step computes in), `dense_weights` or `experts`."""
    planned_bytes: int
    used_bytes: int | None
    """What holds something now; None: not known."""


class MemoryUse(msgspec.Struct, frozen=True, kw_only=True):
    """RAM, or the memory of the GPU that computes, as planned when the engine started and as it is used now."""

    budget_bytes: int
    """What the engine may take, the reserve taken off."""
    process_bytes: int
    """RAM: what the system counts as the process's, files that it has mapped included."""
    shares: list[MemoryShare]


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """Mean time of each layer of a step, attention and experts together."""

    phase: Literal["decode", "prefill"]
    """`prefill`: steps that compute a part of a prompt, whatever else they compute."""
    num_steps: int
    compute_s: list[float]
    """[layers], without waiting."""
    stall_s: list[float]
    """[layers], in which there was nothing to do but wait for experts."""


class LinkUse(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of what was moved from one tier to another since start."""

    name: str
    """`disk_ram`, or `ram_device` in both directions."""
    num_transfers: int
    num_bytes: int
    busy_s: float
    """Time with a transfer under way; the bytes by it are the link's speed."""
    stall_s: float
    """Time in which there was nothing to do but wait for it."""


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's experts and memory. Heat and times leave out the warm-up."""

    model: str
    engine: str = ""
    """Its name among those of the model; not known to the engine itself."""
    num_layers: int
    num_experts: int
    """Of one layer."""
    top_k: int
    """Experts that a token uses in a layer."""
    expert_bytes: int
    memory: MemoryUse
    tiers: TierState | None
    """None where all experts are in memory."""
    links: list[LinkUse]
    layer_times: list[LayerTimes]
    """Only phases that there have been; none where a GPU has all experts: the host waits for it once a step."""
    heat: list[list[int]]
    """[layers][experts]: tokens that chose the expert so far."""
    placement: list[list[str]]
    """[layers][experts]: the fastest tier that the expert is in: `device` (a GPU's memory), `ram` or `disk`."""


class InspectionList(msgspec.Struct, frozen=True, kw_only=True):
    """Every served model that can be looked into."""

    object: Literal["list"] = "list"
    data: list[Inspection]
