"""From a store on disk to an engine that can step."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from localmoe.core.errors import EngineStartError
from localmoe.core.protocols import ExpertExecutor
from localmoe.core.request import Request, RequestFailed, SamplingParams
from localmoe.engine.budget import (
    MemoryPlan,
    fewest_slots,
    plan_device_memory,
    plan_memory,
    settle_config,
    settle_device_config,
)
from localmoe.engine.config import EngineConfig
from localmoe.engine.dense import LoadedDense
from localmoe.engine.engine import Engine
from localmoe.engine.expert_threshold import with_threshold
from localmoe.engine.experts import LocatedExperts, ResidentExperts
from localmoe.engine.insight import Insight
from localmoe.engine.layer_stream import LayerStream
from localmoe.engine.load_experts import load_hybrid, load_policies, load_tiered_experts
from localmoe.engine.observed_experts import ObservedExperts
from localmoe.engine.relief import ExpertRelief, nothing_to_give
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.kernels.base import DenseWeights, Kernels
from localmoe.kernels.select import select_device, select_kernels
from localmoe.models import architecture
from localmoe.models.decoder import Decoder
from localmoe.residency.split import Split
from localmoe.tiers.config import TiersConfig
from localmoe.tiers.disk import DiskReader

logger = logging.getLogger(__name__)


def load_engine(model: str, store_path: Path, config: EngineConfig, available_memory_bytes: int) -> Engine:
    """Map a store, check it, and set the engine up on the kernels that the configuration says.

    Args:
        model: the name it is served under.
        config: with `num_threads`; the rest is settled here against the model's shape.
        available_memory_bytes: RAM, before anything is loaded.

    Raises:
        StoreError: the store is damaged.
        EngineStartError: the configuration or the memory does not fit the model.
    """
    num_threads = config.num_threads
    assert num_threads is not None, "settled by whoever starts the engine"
    # What torch still does is small; its threads would only be in the way of the kernels' own.
    torch.set_num_threads(1)
    device = select_device(config.device)
    relieve: Callable[[int], None] = nothing_to_give
    with Store.open(store_path) as store:
        if device.type == "cuda":
            # Kernels are launched on the process's device, which from here on is this one.
            torch.cuda.set_device(device)
            free_bytes, _ = torch.cuda.mem_get_info(device)
            try:
                planned = _plan_device(store, config, free_bytes)
            except EngineStartError as error:
                if config.device != "auto":
                    raise
                logger.warning("computing on the processor: %s", error)
            else:
                from localmoe.kernels.gpu import GpuKernels

                return _load_on_device(model, store, GpuKernels(device), *planned, available_memory_bytes)
        kernels = select_kernels(config.cpu_level, num_threads, pin=config.pin_threads)
        config = settle_config(store, kernels, config, available_memory_bytes)
        plan = plan_memory(store, kernels, config, available_memory_bytes)
        experts: LocatedExperts
        if plan.num_slots is None:
            store.check(num_threads)
            experts = ResidentExperts.mapped(store, kernels)
            decoder = make_decoder(store, store, experts, kernels)
        else:
            decoder, experts = load_tiered(store, kernels, plan, config.tiers)
            relieve = ExpertRelief(experts, config.tiers.reserve_bytes, fewest_slots(store.shape))
        insight = _watch(decoder, experts, plan, store.blob_bytes, config)
    logger.info("%s computes with %s", model, kernels.name)
    return Engine(model, decoder, kernels, config, insight, relieve)


def load_device_engine(
    model: str,
    store_path: Path,
    kernels: Kernels,
    config: EngineConfig,
    free_device_bytes: int,
    available_memory_bytes: int,
) -> Engine:
    """The engine of a store whose weights, keys and values are on a GPU; experts that do not fit there are in RAM, as
    far as they fit, and computed on the CPU or fetched.

    Args:
        kernels: of the GPU.
        config: as for `load_engine`.
        free_device_bytes: of the GPU's memory, before anything is loaded.
        available_memory_bytes: RAM.

    Raises:
        StoreError: the store is damaged.
        EngineStartError: the configuration, the GPU's memory or RAM does not fit the model.
    """
    with Store.open(store_path) as store:
        planned = _plan_device(store, config, free_device_bytes)
        return _load_on_device(model, store, kernels, *planned, available_memory_bytes)


def _plan_device(store: Store, config: EngineConfig, free_bytes: int) -> tuple[EngineConfig, MemoryPlan]:
    config = settle_device_config(store, config, free_bytes)
    return config, plan_device_memory(store, config, free_bytes)


def _load_on_device(
    model: str,
    store: Store,
    kernels: Kernels,
    config: EngineConfig,
    plan: MemoryPlan,
    available_memory_bytes: int,
) -> Engine:
    num_threads = config.num_threads
    assert num_threads is not None, "settled by whoever starts the engine"
    assert plan.num_device_slots is not None, "a plan of a GPU"
    try:
        experts: LocatedExperts
        if plan.num_device_slots == len(store.expert_entries):
            store.check(num_threads)
            experts = ResidentExperts.mapped(store, kernels, on_device=True)
        else:
            host_kernels = select_kernels(config.cpu_level, num_threads, pin=config.pin_threads)
            experts = load_hybrid(store, kernels, host_kernels, plan, config, available_memory_bytes, Split())
        decoder = make_decoder(store, store, experts, kernels)
        insight = _watch(decoder, experts, plan, store.blob_bytes, config)
        engine = Engine(model, decoder, kernels, config, insight, nothing_to_give)
    except torch.OutOfMemoryError as error:
        raise EngineStartError(f"not enough memory on the GPU, which others may use too: {error}") from error
    logger.info("%s computes with %s", model, kernels.name)
    return engine


def load_decoder(store: Store, kernels: Kernels) -> Decoder:
    """The model of a store, used where its file is mapped or copied to the kernels' device. Raises StoreError."""
    return make_decoder(store, store, ResidentExperts.mapped(store, kernels), kernels)


def load_tiered(
    store: Store, kernels: Kernels, plan: MemoryPlan, config: TiersConfig
) -> tuple[Decoder, TieredExperts]:
    """The model of a store, its dense weights in memory and as many experts as the plan says; nothing is mapped.

    Raises:
        StoreError: the dense weights are damaged or cannot be read.
        EngineStartError: the memory is not to be had.
    """
    assert plan.num_slots is not None
    stream = None
    with DiskReader[str].open([store.path], config.disk) as dense_reader:
        config = replace(config, disk=replace(config.disk, queue_depth=dense_reader.queue_depth))  # measured once
        if plan.streamed_layers:
            layer_reader = DiskReader[int].open([store.path], config.disk)
            stream = LayerStream(store, plan.streamed_layers, layer_reader, plan.budget_bytes)
        dense = LoadedDense(store, dense_reader, stream.matrices() if stream else {}, plan.budget_bytes)
    experts = load_tiered_experts(
        store,
        kernels,
        load_policies(store, config).in_ram,
        config,
        num_slots=plan.num_slots,
        available_memory_bytes=plan.budget_bytes,
    )
    decoder = make_decoder(store, dense, experts, kernels)
    for index in plan.streamed_layers:
        assert stream is not None
        layer = decoder.layers[index]
        layer.attention = stream.attention(index, layer.attention)
    return decoder, experts


def make_decoder(store: Store, dense: DenseWeights, experts: ExpertExecutor[Tensor], kernels: Kernels) -> Decoder:
    """The model of a store, of parts that have been loaded."""
    return architecture({"model_type": store.shape.model_type})(store.shape, dense, experts, kernels)


def _watch(
    decoder: Decoder, experts: LocatedExperts, plan: MemoryPlan, expert_bytes: int, config: EngineConfig
) -> Insight:
    """Let a decoder's experts skip what the configuration says, and put a watch on them.

    Args:
        experts: the decoder's.
    """
    shape = decoder.shape
    # A GPU that has all experts is waited for once a step, not once a layer.
    is_timed = decoder.device.type == "cpu" or experts.state() is not None
    watched = ObservedExperts(
        with_threshold(experts, config, shape),
        shape,
        stall_s=lambda: experts.stall_s,
        present=experts.present,
        on_device=experts.on_device,
        is_timed=is_timed,
    )
    decoder.experts = watched
    return Insight(shape, plan, expert_bytes, watched)


def warm_up(engine: Engine) -> None:
    """Run one request, so that the first client does not pay for lazy initialisation and compilation. (Decode steps
    of other sizes than its own are captured when the first of them comes, which takes longer than a step.)

    Raises:
        EngineStartError: the model cannot compute even that.
    """
    sampling = SamplingParams(max_tokens=2, temperature=0.0)
    engine.add(Request(id="warm-up", model="", prompt_ids=[0] * engine.warm_up_tokens, sampling=sampling))
    while engine.has_work:
        for output in engine.step():
            if isinstance(output, RequestFailed):
                raise EngineStartError(f"the model cannot compute: {output.message}")
    engine.forget()
