"""From a store on disk to experts that are not all in one memory."""

import logging

from localmoe.core.model import ExpertId
from localmoe.engine.budget import MemoryPlan, plan_host_slots
from localmoe.engine.config import EngineConfig
from localmoe.engine.device_experts import DeviceExperts, HostExperts
from localmoe.engine.experts import HostResidentExperts
from localmoe.engine.hybrid_experts import HybridExperts
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.formats.store_layout import blob_layout
from localmoe.kernels.base import Kernels
from localmoe.residency.device import DeviceResidency, ToldElsewhere
from localmoe.residency.manager import ResidencyManager
from localmoe.residency.placement import with_rules
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
    """
    arena = HostArena(store.blob_bytes, num_slots, available_memory_bytes=available_memory_bytes, pinned=pinned)
    manager = ResidencyManager(
        num_layers=store.shape.num_layers,
        num_experts=store.shape.num_experts,
        num_slots=num_slots,
        most_reads=max(_LEAST_READS, -(-_BYTES_UNDER_WAY // store.blob_bytes)),
        policy=policy,
    )
    reader = DiskReader[ExpertId].open([store.path], config.disk)
    reader.register(arena.memory)
    return TieredExperts(
        store, kernels, reader=reader, arena=arena, manager=manager, prefetch_layers=config.prefetch_layers
    )


def load_policy(store: Store, config: TiersConfig) -> RetentionPolicy:
    """What says which experts are worth keeping. Raises ConfigError for a rule that is none."""
    size = (store.shape.num_layers, store.shape.num_experts)
    for rule in config.placement:
        logger.info("placement rule: %s", rule)
    return with_rules(retention_policy(config.policy, *size), config.placement, *size)


def load_hybrid(
    store: Store,
    kernels: Kernels,
    host_kernels: Kernels,
    plan: MemoryPlan,
    config: EngineConfig,
    available_memory_bytes: int,
) -> HybridExperts:
    """The experts of a store, as many of them on the device as the plan says.

    Args:
        kernels: of the device.
        host_kernels: of the CPU.
        available_memory_bytes: RAM.

    Raises:
        StoreError: a blob is damaged or cannot be read.
        EngineStartError: RAM or the device's memory is not to be had.
    """
    from localmoe.kernels.triton.experts import ExpertSlab, SlotExperts

    assert plan.num_device_slots is not None
    shape, weights = store.shape, store.weights
    num_layers, num_experts = shape.num_layers, shape.num_experts
    policy = load_policy(store, config.tiers)
    num_ram_slots = plan_host_slots(store, host_kernels, config, available_memory_bytes)
    host: HostExperts
    if num_ram_slots is None:
        host = HostResidentExperts(store, host_kernels)
    else:
        host = load_tiered_experts(
            store,
            host_kernels,
            ToldElsewhere(policy),
            config.tiers,
            num_slots=num_ram_slots,
            available_memory_bytes=available_memory_bytes,
            pinned=kernels.device.type == "cuda",
        )
    arena = DeviceArena(store.blob_bytes, plan.num_device_slots, kernels.device)
    slab = ExpertSlab(layout=blob_layout(shape, weights), blobs=arena.blobs, tensor_scales=arena.tensor_scales)
    scales = {
        expert: store.expert_entry(expert).tensor_scales
        for expert in (ExpertId(layer, e) for layer in range(num_layers) for e in range(num_experts))
    }
    residency = DeviceResidency(
        num_layers=num_layers, num_experts=num_experts, num_slots=plan.num_device_slots, policy=policy
    )
    device = DeviceExperts(
        arena=arena,
        layers=[SlotExperts(slab, num_experts) for _ in range(num_layers)],
        host=host,
        residency=residency,
        tensor_scales=scales.__getitem__,
    )
    device.fill()
    return HybridExperts(shape, host=host, device=device, policy=policy, split=Split())
