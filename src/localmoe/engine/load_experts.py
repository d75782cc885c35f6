"""From a store on disk to experts that are not all in one memory."""

import logging
from dataclasses import dataclass
from pathlib import Path

from localmoe.core.model import ExpertId
from localmoe.engine.budget import MemoryPlan, plan_host_slots
from localmoe.engine.config import EngineConfig
from localmoe.engine.device_experts import DeviceExperts
from localmoe.engine.hybrid_experts import HybridExperts
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.formats.store_layout import blob_layout
from localmoe.formats.stripes import Stripe
from localmoe.kernels.base import Kernels
from localmoe.residency.device import DeviceResidency, ToldElsewhere
from localmoe.residency.manager import ResidencyManager
from localmoe.residency.placement import quotas, with_rules
from localmoe.residency.policy import RetentionPolicy, retention_policy
from localmoe.residency.split import Split
from localmoe.tiers.config import TiersConfig
from localmoe.tiers.device import DeviceArena
from localmoe.tiers.disk import DiskReader
from localmoe.tiers.host import HostArena

logger = logging.getLogger(__name__)

_BYTES_UNDER_WAY = 32 << 20
"""Reads of so much keep any disk busy while a few experts are computed."""
_LEAST_READS = 8


def load_tiered_experts(
    store: Store,
    kernels: Kernels,
    policy: RetentionPolicy,
    config: TiersConfig,
    *,
    num_slots: int,
    available_memory_bytes: int,
    pinned: bool = False,
) -> TieredExperts:
    """The experts of a store, so many of them in RAM.

    Args:
        pinned: lock their memory for copies to a GPU.

    Raises:
        EngineStartError: the memory is not to be had.
        StripeError: a stripe is not there, or not of this store.
    """
    stripes = [Stripe.open(Path(path).expanduser(), store) for path in config.stripes]
    arena = HostArena(store.blob_bytes, num_slots, available_memory_bytes=available_memory_bytes, pinned=pinned)
    size = (store.shape.num_layers, store.shape.num_experts)
    paths = [store.path, *(stripe.path for stripe in stripes)]
    num_disks = len({path.stat().st_dev for path in paths})
    manager = ResidencyManager(
        num_layers=size[0],
        num_experts=size[1],
        num_slots=num_slots,
        most_reads=num_disks * max(_LEAST_READS, -(-_BYTES_UNDER_WAY // store.blob_bytes)),
        policy=policy,
        quotas=quotas(config.placement, *size),
    )
    reader = DiskReader[ExpertId].open(paths, config.disk)
    reader.register(arena.memory)
    return TieredExperts(
        store,
        kernels,
        reader=reader,
        arena=arena,
        manager=manager,
        prefetch_layers=config.prefetch_layers,
        stripes=stripes,
    )


@dataclass(frozen=True, kw_only=True)
class Policies:
    """What says which experts are worth keeping. All see the same uses, of which `observed` is to be told."""

    observed: RetentionPolicy
    in_ram: RetentionPolicy
    on_device: RetentionPolicy


def load_policies(store: Store, config: TiersConfig) -> Policies:
    """One policy, and the placement rules of each memory. Raises ConfigError for a rule that is none."""
    size = (store.shape.num_layers, store.shape.num_experts)
    for rule in config.placement:
        logger.info("placement rule: %s", rule)
    policy = retention_policy(config.policy, *size)
    in_ram = with_rules(policy, config.placement, *size, memory="ram")
    on_device = with_rules(policy, config.placement, *size, memory="device")
    return Policies(observed=policy, in_ram=in_ram, on_device=on_device)


def load_hybrid(
    store: Store,
    kernels: Kernels,
    host_kernels: Kernels,
    plan: MemoryPlan,
    config: EngineConfig,
    available_memory_bytes: int,
    split: Split,
) -> HybridExperts:
    """The experts of a store, as many of them on the device as the plan says.

    Args:
        kernels: of the device.
        host_kernels: of the CPU.
        available_memory_bytes: RAM.
        split: which of the experts in RAM the device fetches.

    Raises:
        StoreError: a blob is damaged or cannot be read.
        EngineStartError: RAM or the device's memory is not to be had.
    """
    from localmoe.kernels.triton.experts import ExpertSlab, SlotExperts

    assert plan.num_device_slots is not None
    shape, weights = store.shape, store.weights
    num_layers, num_experts = shape.num_layers, shape.num_experts
    policies = load_policies(store, config.tiers)
    host = load_tiered_experts(
        store,
        host_kernels,
        ToldElsewhere(policies.in_ram),
        config.tiers,
        num_slots=plan_host_slots(store, host_kernels, config, available_memory_bytes),
        available_memory_bytes=available_memory_bytes,
        pinned=kernels.device.type == "cuda",
    )
    arena = DeviceArena(store.blob_bytes, plan.num_device_slots, kernels.device)
    slab = ExpertSlab(layout=blob_layout(shape, weights), blobs=arena.blobs, tensor_scales=arena.tensor_scales)
    entries = store.expert_entries
    residency = DeviceResidency(
        num_layers=num_layers, num_experts=num_experts, num_slots=plan.num_device_slots, policy=policies.on_device
    )
    device = DeviceExperts(
        arena=arena,
        layers=[SlotExperts(slab, num_experts) for _ in range(num_layers)],
        host=host,
        residency=residency,
        tensor_scales=lambda expert: entries[expert].tensor_scales,
    )
    device.fill()
    return HybridExperts(shape, host=host, device=device, policy=policies.observed, split=split)
