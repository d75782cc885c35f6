"""Answers what an engine's experts and memory are doing."""

import os
from pathlib import Path

from localmoe.core.events import EngineState, TierState
from localmoe.core.inspection import Inspection, LinkUse, MemoryShare, MemoryUse
from localmoe.core.model import ModelShape
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.observed_experts import ObservedExperts
from localmoe.engine.routing_trace import RoutingRecorder


class Insight:
    """Puts together what the parts of one engine know.

    Args:
        plan: how memory was divided at start.
        expert_bytes: one expert's, in the store.
        experts: those of the engine's decoder.
    """

    def __init__(self, shape: ModelShape, plan: MemoryPlan, expert_bytes: int, experts: ObservedExperts) -> None:
        self.experts = experts
        self._shape = shape
        self._plan = plan
        self._expert_bytes = expert_bytes

    def record_routing(self, model: str, path: Path) -> None:
        """From now on write down in a file which experts are chosen."""
        self.experts.record(RoutingRecorder(path, model, self._shape, self._expert_bytes))

    def inspect(self, state: EngineState) -> Inspection:
        """Everything as of now, between two steps.

        Args:
            state: the engine's, just taken.
        """
        shape, experts = self._shape, self.experts
        return Inspection(
            model=state.model,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            expert_bytes=self._expert_bytes,
            memory=MemoryUse(
                budget_bytes=self._plan.budget_bytes,
                process_bytes=_process_bytes(),
                shares=self._shares(state),
            ),
            tiers=state.tiers,
            links=[] if state.tiers is None else _links(state.tiers),
            layer_times=experts.layer_times(),
            heat=experts.heat(),
            placement=experts.placement(),
        )

    def _shares(self, state: EngineState) -> list[MemoryShare]:
        plan, tiers = self._plan, state.tiers
        if tiers is None:
            planned_bytes = used_bytes = self._shape.num_layers * self._shape.num_experts * self._expert_bytes
        elif tiers.device_slots:
            planned_bytes = tiers.device_slots * tiers.device_slot_bytes
            used_bytes = tiers.num_on_device * tiers.device_slot_bytes
        else:
            planned_bytes = tiers.num_slots * tiers.slot_bytes
            used_bytes = tiers.num_present * tiers.slot_bytes
        kv_bytes = plan.kv_cache_bytes * state.kv_blocks_used // max(1, state.kv_blocks_total)
        return [
            MemoryShare(name="kv_cache", planned_bytes=plan.kv_cache_bytes, used_bytes=kv_bytes),
            MemoryShare(name="workspace", planned_bytes=plan.workspace_bytes, used_bytes=None),
            MemoryShare(name="dense_weights", planned_bytes=plan.dense_bytes, used_bytes=plan.dense_bytes),
            MemoryShare(name="experts", planned_bytes=planned_bytes, used_bytes=used_bytes),
        ]


def _links(tiers: TierState) -> list[LinkUse]:
    links = [
        LinkUse(
            name="disk_ram",
            num_transfers=tiers.disk_reads,
            num_bytes=tiers.disk_bytes,
            busy_s=tiers.disk_busy_s,
            stall_s=tiers.stall_s,
        )
    ]
    if tiers.device_slots:
        num_copies = tiers.copies_in + tiers.copies_out
        links.append(
            LinkUse(
                name="ram_device",
                num_transfers=num_copies,
                num_bytes=num_copies * tiers.device_slot_bytes,
                busy_s=tiers.copies_busy_s,
                stall_s=0.0,  # the processor computes meanwhile, and what is at home on the device
            )
        )
    return links


def _process_bytes() -> int:
    """What is resident of this process."""
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE")
