"""Engine states in, metrics of tiers, links and layers out."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from localmoe.core.events import EngineRestarted, EngineState, EventBus, TierState
from localmoe.observability.metrics import Metrics
from support.inspections import tier_state


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    """By name and the one label beside the model's."""
    found = {}
    for family in text_string_to_metric_families(metrics.render()[0].decode()):
        for sample in family.samples:
            if sample.name.startswith("localmoe_config_"):  # of no model
                continue
            assert sample.labels.pop("model_name") == "m"
            assert sample.labels.pop("engine", "native") == "native"
            assert len(sample.labels) <= 1 or sample.name.endswith("_bucket")
            found[sample.name, next(iter(sample.labels.values()), "")] = sample.value
    return found


def state(tiers: TierState | None, **fields: Any) -> EngineState:
    values = {name: 0 for name in EngineState.__struct_fields__ if name not in ("model", "engine", "tiers")}
    return EngineState(model="m", engine="native", tiers=tiers, **{**values, **fields})


def totals(**fields: Any) -> TierState:
    """Each total another number."""
    values = {name: 10 * index for index, name in enumerate(TierState.__struct_fields__, 1)}
    return tier_state(**{**values, **fields})


EXPECTED = {
    ("localmoe_expert_slots", "ram"): "num_slots",
    ("localmoe_experts_present", "ram"): "num_present",
    ("localmoe_expert_uses_total", "ram"): "hits",
    ("localmoe_expert_uses_total", "disk"): "misses",
    ("localmoe_expert_evictions_total", "ram"): "evictions",
    ("localmoe_expert_prefetches_total", ""): "prefetches",
    ("localmoe_expert_prefetch_outcomes_total", "useful"): "prefetches_useful",
    ("localmoe_expert_prefetch_outcomes_total", "late"): "prefetches_late",
    ("localmoe_expert_prefetch_outcomes_total", "wasted"): "prefetches_wasted",
    ("localmoe_link_transfers_total", "disk_ram"): "disk_reads",
    ("localmoe_link_bytes_total", "disk_ram"): "disk_bytes",
    ("localmoe_link_busy_seconds_total", "disk_ram"): "disk_busy_s",
    ("localmoe_link_stall_seconds_total", "disk_ram"): "stall_s",
    ("localmoe_link_errors_total", "disk_ram"): "disk_errors",
    ("localmoe_expert_slots", "device"): "device_slots",
    ("localmoe_experts_present", "device"): "num_on_device",
    ("localmoe_expert_uses_total", "device"): "device_hits",
    ("localmoe_expert_evictions_total", "device"): "device_evictions",
    ("localmoe_expert_fetches_total", ""): "device_fetches",
    ("localmoe_link_busy_seconds_total", "ram_device"): "copies_busy_s",
}


def test_every_total_has_its_metric() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(state(tier_state(hits=1, disk_bytes=1)))
    tiers = totals()
    bus.publish(state(tiers, num_layer_runs=64, layers_s=0.5))
    found = samples(metrics)
    assert {key: found[key] for key in EXPECTED} == {key: getattr(tiers, name) for key, name in EXPECTED.items()}
    assert found["localmoe_experts_present_bytes", "ram"] == tiers.num_present * tiers.slot_bytes
    num_copies = tiers.copies_in + tiers.copies_out
    assert found["localmoe_link_transfers_total", "ram_device"] == num_copies
    assert found["localmoe_link_bytes_total", "ram_device"] == num_copies * tiers.device_slot_bytes
    assert found["localmoe_layers_total", ""] == 64
    assert found["localmoe_layer_seconds_total", ""] == 0.5
    # Shown in products and sums, or by others.
    others = {"num_experts", "slot_bytes", "device_slot_bytes", "copies_in", "copies_out"}
    assert set(EXPECTED.values()) | others == set(TierState.__struct_fields__)


def test_totals_go_on_and_levels_fall_when_an_engine_dies() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(state(totals(hits=100, num_present=5), num_layer_runs=30))
    bus.publish(EngineRestarted(model="m", engine="native", reason="killed"))
    bus.publish(EngineState.empty("m", "native"))
    found = samples(metrics)
    assert found["localmoe_expert_uses_total", "ram"] == 100
    assert found["localmoe_expert_slots", "ram"] == 0
    assert found["localmoe_experts_present", "ram"] == 0
    assert found["localmoe_experts_present_bytes", "ram"] == 0
    bus.publish(state(totals(hits=120, num_present=2), num_layer_runs=3))
    found = samples(metrics)
    assert found["localmoe_expert_uses_total", "ram"] == 220
    assert found["localmoe_experts_present", "ram"] == 2
    assert found["localmoe_layers_total", ""] == 33


def test_without_tiers_only_layers_are_shown() -> None:
    bus = EventBus()
    metrics = Metrics(bus)
    bus.publish(state(None, num_layer_runs=4, layers_s=0.25))
    found = samples(metrics)
    assert found["localmoe_layers_total", ""] == 4
    assert not [name for name, _ in found if "expert" in name or "link" in name]
