"""Metrics of engines whose experts are not all in memory, and of layers.

A tier is where an expert was found: `device` (a GPU's memory), `ram`, or `disk` if it had to be read. A link is what
experts pass over, `disk_ram` or, both ways, `ram_device`; its bytes by its busy seconds are its speed, by time how
much it is used.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge

from localmoe.core.events import EngineState, TierState

_DISK, _DEVICE = "disk_ram", "ram_device"


class TierMetrics:
    """Metrics of one registry; totals come from the engines' states."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"localmoe_{name}", documentation, ["model_name", "engine", *labels], registry=registry)

        def gauge(name: str, documentation: str, *labels: str) -> Gauge:
            return Gauge(f"localmoe_{name}", documentation, ["model_name", "engine", *labels], registry=registry)

        self._slots = gauge("expert_slots", "Experts that fit in a tier.", "tier")
        self._present = gauge("experts_present", "Experts that are in a tier now.", "tier")
        self._present_bytes = gauge("experts_present_bytes", "Memory that they take.", "tier")
        self._uses = counter(
            "expert_uses", "Uses of an expert, in a layer and step, by where it was found.", "tier"
        )
        self._fetches = counter("expert_fetches", "Uses of experts in RAM that the device computed with a copy.")
        self._evictions = counter("expert_evictions", "Experts given up for others.", "tier")
        self._prefetches = counter("expert_prefetches", "Experts read ahead.")
        self._outcomes = counter(
            "expert_prefetch_outcomes",
            "What became of them: useful (used, and there in time), late (used, but still being read) or wasted.",
            "outcome",
        )
        self._transfers = counter("link_transfers", "Experts moved.", "link")
        self._bytes = counter("link_bytes", "Bytes moved.", "link")
        self._busy = counter("link_busy_seconds", "Time with something to move.", "link")
        self._stall = counter("link_stall_seconds", "Time with nothing to do but wait for the link.", "link")
        self._errors = counter("link_errors", "Transfers that failed, or brought something damaged.", "link")
        self._layers = counter("layers", "Layers run, a model's for each step.")
        self._layer_seconds = counter("layer_seconds", "Time in which layers ran, waiting for experts included.")

    def on_state(self, state: EngineState, last: EngineState | None) -> None:
        """Take in a state, given the one before."""
        who = (state.model, state.engine)
        increase(self._layers.labels(*who), state.num_layer_runs, last.num_layer_runs if last else 0)
        increase(self._layer_seconds.labels(*who), state.layers_s, last.layers_s if last else 0.0)
        tiers, earlier = state.tiers, last.tiers if last else None
        if tiers is None:
            if earlier is not None:  # the engine is gone
                for level in (self._slots, self._present, self._present_bytes):
                    level.labels(*who, "ram").set(0)
                    if earlier.device_slots:
                        level.labels(*who, "device").set(0)
            return
        self._slots.labels(*who, "ram").set(tiers.num_slots)
        self._present.labels(*who, "ram").set(tiers.num_present)
        self._present_bytes.labels(*who, "ram").set(tiers.num_present * tiers.slot_bytes)
        for counter, field in (
            (self._uses.labels(*who, "ram"), "hits"),
            (self._uses.labels(*who, "disk"), "misses"),
            (self._evictions.labels(*who, "ram"), "evictions"),
            (self._prefetches.labels(*who), "prefetches"),
            (self._outcomes.labels(*who, "useful"), "prefetches_useful"),
            (self._outcomes.labels(*who, "late"), "prefetches_late"),
            (self._outcomes.labels(*who, "wasted"), "prefetches_wasted"),
            (self._transfers.labels(*who, _DISK), "disk_reads"),
            (self._bytes.labels(*who, _DISK), "disk_bytes"),
            (self._busy.labels(*who, _DISK), "disk_busy_s"),
            (self._stall.labels(*who, _DISK), "stall_s"),
            (self._errors.labels(*who, _DISK), "disk_errors"),
        ):
            increase(counter, getattr(tiers, field), getattr(earlier, field, 0))
        if tiers.device_slots:
            self._on_device(who, tiers, earlier)

    def _on_device(self, who: tuple[str, str], tiers: TierState, earlier: TierState | None) -> None:
        self._slots.labels(*who, "device").set(tiers.device_slots)
        self._present.labels(*who, "device").set(tiers.num_on_device)
        self._present_bytes.labels(*who, "device").set(tiers.num_on_device * tiers.device_slot_bytes)
        num_copies = tiers.copies_in + tiers.copies_out
        copies_before = earlier.copies_in + earlier.copies_out if earlier else 0
        size = tiers.device_slot_bytes
        increase(self._transfers.labels(*who, _DEVICE), num_copies, copies_before)
        increase(self._bytes.labels(*who, _DEVICE), num_copies * size, copies_before * size)
        for counter, field in (
            (self._uses.labels(*who, "device"), "device_hits"),
            (self._evictions.labels(*who, "device"), "device_evictions"),
            (self._fetches.labels(*who), "device_fetches"),
            (self._busy.labels(*who, _DEVICE), "copies_busy_s"),
        ):
            increase(counter, getattr(tiers, field), getattr(earlier, field, 0))


def increase(counter: Counter, total: float, before: float) -> None:
    """Count what a total has grown by; totals begin anew with a new engine process."""
    counter.inc(total - before if total >= before else total)
