"""From a store on disk to an engine that can step."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from localmoe.core.errors import EngineStartError
from localmoe.core.model import ExpertId
from localmoe.core.protocols import ExpertExecutor
from localmoe.core.request import Request, RequestFailed, SamplingParams
from localmoe.engine.budget import MemoryPlan, plan_memory, settle_config
from localmoe.engine.config import EngineConfig
from localmoe.engine.dense import LoadedDense
from localmoe.engine.engine import Engine
from localmoe.engine.expert_threshold import with_threshold
from localmoe.engine.experts import ResidentExperts
from localmoe.engine.insight import Insight
from localmoe.engine.layer_stream import LayerStream
from localmoe.engine.observed_experts import ObservedExperts
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.kernels.base import DenseWeights, Kernels
from localmoe.kernels.select import select_kernels
from localmoe.models import architecture
from localmoe.models.decoder import Decoder
from localmoe.residency.manager import ResidencyManager
from localmoe.residency.placement import with_rules
from localmoe.residency.policy import retention_policy
from localmoe.tiers.config import TiersConfig
from localmoe.tiers.disk import DiskReader
from localmoe.tiers.host import HostArena

logger = logging.getLogger(__name__)

_BYTES_UNDER_WAY = 32 << 20
"""Reads of so much keep any disk busy while a few experts are computed."""
_LEAST_READS = 8


def load_engine(model: str, store_path: Path, config: EngineConfig, available_memory_bytes: int) -> Engine:
    """Map a store, check it, and set the engine up on the kernels that the configuration says.

    Args:
        model: the name it is served under.
        config: with `num_threads`; the rest is settled here against the model's shape.
        available_memory_bytes: before anything is loaded.

    Raises:
        StoreError: the store is damaged.
        EngineStartError: the configuration or the memory does not fit the model.
    """
    num_threads = config.num_threads
    assert num_threads is not None, "settled by whoever starts the engine"
    # What torch still does is small; its threads would only be in the way of the kernels' own.
    torch.set_num_threads(1)
    kernels = select_kernels(config.cpu_level, num_threads, pin=config.pin_threads)
    with Store.open(store_path) as store:
        config = settle_config(store, kernels, config, available_memory_bytes)
        plan = plan_memory(store, kernels, config, available_memory_bytes)
        if plan.num_slots is None:
            store.check(num_threads)
            decoder = load_decoder(store, kernels)
        else:
            decoder = load_tiered(store, kernels, plan, config.tiers)
        experts = decoder.experts
        decoder.experts = with_threshold(experts, config, store.shape)
        insight = _watch(decoder, experts, plan, store.blob_bytes)
    logger.info("%s computes with %s", model, kernels.name)
    return Engine(model, decoder, kernels, config, insight)


def load_decoder(store: Store, kernels: Kernels) -> Decoder:
    """The model of a store, used where its file is mapped. Raises StoreError."""
    return _decoder(store, store, ResidentExperts.mapped(store, kernels), kernels)


def load_tiered(store: Store, kernels: Kernels, plan: MemoryPlan, config: TiersConfig) -> Decoder:
    """The model of a store, its dense weights in memory and as many experts as the plan says; nothing is mapped.

    Raises:
        StoreError: the dense weights are damaged or cannot be read.
        EngineStartError: the memory is not to be had.
    """
    assert plan.num_slots is not None
    stream = None
    if plan.streamed_layers:
        layer_reader = DiskReader[int].open([store.path], config.disk)
        stream = LayerStream(store, plan.streamed_layers, layer_reader, plan.budget_bytes)
    with DiskReader[str].open([store.path], config.disk) as dense_reader:
        dense = LoadedDense(store, dense_reader, stream.matrices() if stream else {}, plan.budget_bytes)
    arena = HostArena(store.blob_bytes, plan.num_slots, available_memory_bytes=plan.budget_bytes)
    size = (store.shape.num_layers, store.shape.num_experts)
    for rule in config.placement:
        logger.info("placement rule: %s", rule)
    manager = ResidencyManager(
        num_layers=store.shape.num_layers,
        num_experts=store.shape.num_experts,
        num_slots=plan.num_slots,
        most_reads=max(_LEAST_READS, -(-_BYTES_UNDER_WAY // store.blob_bytes)),
        policy=with_rules(retention_policy(config.policy, *size), config.placement, *size),
    )
    reader = DiskReader[ExpertId].open([store.path], config.disk)
    reader.register(arena.memory)
    experts = TieredExperts(
        store,
        kernels,
        reader=reader,
        arena=arena,
        manager=manager,
        prefetch_layers=config.prefetch_layers,
    )
    decoder = _decoder(store, dense, experts, kernels)
    for index in plan.streamed_layers:
        assert stream is not None
        layer = decoder.layers[index]
        layer.attention = stream.attention(index, layer.attention)
    return decoder


def _decoder(store: Store, dense: DenseWeights, experts: ExpertExecutor[Tensor], kernels: Kernels) -> Decoder:
    return architecture({"model_type": store.shape.model_type})(store.shape, dense, experts, kernels)


def _watch(decoder: Decoder, experts: ExpertExecutor[Tensor], plan: MemoryPlan, expert_bytes: int) -> Insight:
    """Put a watch on a decoder's experts.

    Args:
        experts: the part of the decoder's that knows where they are.
    """
    shape = decoder.shape
    if isinstance(experts, TieredExperts):
        watched = ObservedExperts(decoder.experts, shape, stall_s=lambda: experts.stall_s, present=experts.present)
    else:
        everywhere = np.ones((shape.num_layers, shape.num_experts), np.bool_)
        watched = ObservedExperts(decoder.experts, shape, stall_s=lambda: 0.0, present=lambda: everywhere)
    decoder.experts = watched
    return Insight(shape, plan, expert_bytes, watched)


def warm_up(engine: Engine) -> None:
    """Run one short request, so that the first client does not pay for lazy initialisation.

    Raises:
        EngineStartError: the model cannot compute even that.
    """
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    engine.add(Request(id="warm-up", model="", prompt_ids=[0, 0], sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestFailed):
                raise EngineStartError(f"the model cannot compute: {output.message}")
    engine.forget()
