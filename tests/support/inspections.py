"""What an engine says when it is looked into, made up."""

from typing import Any

from localmoe.core.events import TierState
from localmoe.core.inspection import Inspection, LayerTimes, LinkUse, MemoryShare, MemoryUse


def tier_state(**fields: Any) -> TierState:
    """A state whose totals are all 0 but for those given."""
    return TierState(**{**dict.fromkeys(TierState.__struct_fields__, 0), **fields})


def make_inspection(**fields: Any) -> Inspection:
    """Two layers of four experts, five of which are in memory."""
    values: dict[str, Any] = {
        "model": "tiny",
        "num_layers": 2,
        "num_experts": 4,
        "top_k": 2,
        "expert_bytes": 3_000_000,
        "memory": MemoryUse(
            budget_bytes=50_000_000,
            process_bytes=70_000_000,
            shares=[
                MemoryShare(name="kv_cache", planned_bytes=10_000_000, used_bytes=2_500_000),
                MemoryShare(name="workspace", planned_bytes=4_000_000, used_bytes=None),
            ],
        ),
        "tiers": tier_state(
            num_experts=8,
            num_slots=6,
            num_present=5,
            slot_bytes=3_000_000,
            hits=30,
            misses=10,
            prefetches=9,
            prefetches_useful=5,
            prefetches_late=1,
            prefetches_wasted=3,
            evictions=7,
        ),
        "links": [
            LinkUse(name="disk_ram", num_transfers=12, num_bytes=36_000_000, busy_s=0.018, stall_s=0.004),
        ],
        "layer_times": [
            LayerTimes(phase="decode", num_steps=20, compute_s=[0.001, 0.002], stall_s=[0.003, 0.0]),
        ],
        "heat": [[8, 0, 4, 4], [1, 1, 1, 13]],
        "placement": [["ram", "disk", "ram", "ram"], ["disk", "disk", "ram", "ram"]],
    }
    return Inspection(**{**values, **fields})
