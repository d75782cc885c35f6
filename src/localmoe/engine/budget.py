"""How an engine spends its memory."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from localmoe.core.errors import EngineStartError
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.engine.config import EngineConfig, num_weights
from localmoe.engine.layer_stream import NUM_BUFFERS, streamed_entries
from localmoe.formats.store_layout import DenseEntry
from localmoe.kernels.base import Kernels
from localmoe.kernels.triton.sizes import parts_bytes
from localmoe.tiers.host import stride_bytes

logger = logging.getLogger(__name__)

_FEWEST_SLOTS = 2
"""One to compute with while the other is filled."""
_VRAM_RESERVE_BYTES = 512 << 20
"""Left alone of a GPU's free memory: for machine code, and for what torch's allocator cannot use."""
SCORED_ROWS = 64
"""Positions of a prompt whose logits are held at a time, where they are asked for."""
_DRAW_BYTES = 56
"""Of a logit while tokens are drawn on a GPU: itself, as a probability, sorted, and summed up in float64 twice."""


class StoreSizes(Protocol):
    """What of a store a plan needs to know; the store itself need not exist yet."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def weights(self) -> WeightFormat: ...

    @property
    def blob_bytes(self) -> int: ...

    @property
    def total_bytes(self) -> int: ...

    @property
    def dense_entries(self) -> Sequence[DenseEntry]: ...


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Shares of a budget, in bytes; what is left over is less than one expert.

    The budget is of RAM, or of a GPU's memory where that computes: keys and values, workspace and dense weights are
    where they are computed with.
    """

    budget_bytes: int
    """The reserve is already taken off."""
    kv_cache_bytes: int
    workspace_bytes: int
    """What a step computes in."""
    dense_bytes: int
    """Weights that every token uses, as far as they stay in memory, and buffers for those that do not."""
    streamed_layers: tuple[int, ...] = ()
    """Layers whose attention is read for each step, because it does not fit."""
    num_slots: int | None
    """Experts that fit beside all this; None: the whole store does, and is used where it is mapped; or the budget is
    of a GPU's memory."""
    num_device_slots: int | None = None
    """Experts that fit beside all this in the GPU's memory; None: the budget is of RAM."""
    slot_bytes: int

    def __str__(self) -> str:
        num_slots = self.num_slots if self.num_device_slots is None else self.num_device_slots
        experts = "all experts" if num_slots is None else f"{num_slots} experts"
        where = "memory" if self.num_device_slots is None else "the GPU's memory"
        streamed = (
            f" (attention of {len(self.streamed_layers)} layers is streamed)" if self.streamed_layers else ""
        )
        return (
            f"{_mib(self.budget_bytes)} of {where}: keys and values {_mib(self.kv_cache_bytes)}, workspace "
            f"{_mib(self.workspace_bytes)}, dense weights {_mib(self.dense_bytes)}{streamed}, {experts} of "
            f"{_mib(self.slot_bytes)}"
        )


def settle_config(store: StoreSizes, kernels: Kernels, config: EngineConfig, available_bytes: int) -> EngineConfig:
    """Settle the cache's size and type: beside all weights if one sequence fits there, else beside the dense ones.

    Raises:
        EngineStartError: not even then.
    """
    left_bytes = ram_budget_bytes(config, available_bytes)
    left_bytes -= workspace_bytes(store.shape, config.max_num_batched_tokens, config.max_num_seqs)
    stored_bytes = kernels.memory_bytes(store.total_bytes, num_weights(store.shape))
    try:
        return _settle(store, config, left_bytes, stored_bytes)
    except EngineStartError as error:
        reserve, ram = _mib(config.tiers.reserve_bytes), config.tiers.ram_bytes
        raise EngineStartError(
            f"{error} (of {_mib(available_bytes)} that are available here, "
            f"{'all' if ram is None else f'{_mib(ram)} by ram_bytes'} may be used, less reserve_bytes, {reserve}; "
            f"weights that every token uses take {_mib(_dense_bytes(store))})"
        ) from error


def settle_device_config(store: StoreSizes, config: EngineConfig, free_bytes: int) -> EngineConfig:
    """The same in a GPU's memory, of which so much is free.

    Raises:
        EngineStartError: not even then.
    """
    left_bytes = _vram_budget_bytes(config, free_bytes) - device_workspace_bytes(store.shape, config)
    return _settle(store, config, left_bytes, store.total_bytes)


def _settle(store: StoreSizes, config: EngineConfig, left_bytes: int, stored_bytes: int) -> EngineConfig:
    try:
        return config.resolve(store.shape, store.weights, left_bytes - stored_bytes)
    except EngineStartError:
        return config.resolve(store.shape, store.weights, left_bytes - _dense_bytes(store))


def ram_budget_bytes(config: EngineConfig, available_bytes: int) -> int:
    """What the engine may take of the RAM available, the reserve taken off."""
    tiers = config.tiers
    return min(available_bytes, tiers.ram_bytes or available_bytes) - tiers.reserve_bytes


def _vram_budget_bytes(config: EngineConfig, free_bytes: int) -> int:
    left_bytes = free_bytes - _VRAM_RESERVE_BYTES
    return min(left_bytes, config.tiers.vram_bytes or left_bytes)


def _dense_bytes(store: StoreSizes) -> int:
    return sum(entry.num_bytes for entry in store.dense_entries)


def plan_memory(store: StoreSizes, kernels: Kernels, config: EngineConfig, available_bytes: int) -> MemoryPlan:
    """Divide the budget.

    Args:
        config: with its `kv_cache_bytes`.
        available_bytes: beside what the process has already taken.

    Raises:
        EngineStartError: not even one layer's choice of experts fits.
    """
    shape = store.shape
    assert config.kv_cache_bytes is not None, "resolved"
    budget_bytes = ram_budget_bytes(config, available_bytes)
    workspace = workspace_bytes(shape, config.max_num_batched_tokens, config.max_num_seqs)
    dense_bytes = _dense_bytes(store)
    slot_bytes = stride_bytes(store.blob_bytes)
    num_experts = shape.num_layers * shape.num_experts
    left_bytes = budget_bytes - config.kv_cache_bytes - workspace
    num_slots: int | None = None
    streamed: tuple[int, ...] = ()
    if kernels.memory_bytes(store.total_bytes, num_weights(shape)) > left_bytes:
        fewest = fewest_slots(shape)
        if kernels.in_place:
            streamed = _streamed_layers(store, dense_bytes - (left_bytes - fewest * slot_bytes))
        if streamed:
            dense_bytes -= (len(streamed) - NUM_BUFFERS) * _streamed_bytes(store)
        num_slots = min((left_bytes - dense_bytes) // slot_bytes, num_experts)
        if num_slots < fewest:
            raise EngineStartError(
                f"not enough memory: {_mib(budget_bytes)} are to be used; keys and values take "
                f"{_mib(config.kv_cache_bytes)}, workspace {_mib(workspace)}, dense weights at least "
                f"{_mib(dense_bytes)}, and {fewest} experts {_mib(fewest * slot_bytes)}; lower max_context_tokens, "
                f"kv_cache_bytes or max_num_batched_tokens, or choose a smaller format"
            )
    plan = MemoryPlan(
        budget_bytes=budget_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
        workspace_bytes=workspace,
        dense_bytes=dense_bytes,
        streamed_layers=streamed,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
    )
    logger.info("%s", plan)
    return plan


def plan_device_memory(store: StoreSizes, config: EngineConfig, free_bytes: int) -> MemoryPlan:
    """Divide a GPU's memory.

    Args:
        config: with its `kv_cache_bytes`.
        free_bytes: of the GPU's memory, before anything is loaded.

    Raises:
        EngineStartError: what every token needs does not fit, or not even one expert beside it.
    """
    assert config.kv_cache_bytes is not None, "resolved"
    budget_bytes, dense_bytes = _vram_budget_bytes(config, free_bytes), _dense_bytes(store)
    workspace = device_workspace_bytes(store.shape, config)
    left_bytes = budget_bytes - config.kv_cache_bytes - workspace - dense_bytes
    if left_bytes < store.blob_bytes:
        raise EngineStartError(
            f"not enough memory on the GPU: {_mib(budget_bytes)} are to be used; keys and values take "
            f"{_mib(config.kv_cache_bytes)}, workspace {_mib(workspace)}, dense weights {_mib(dense_bytes)}, and "
            f"an expert {_mib(store.blob_bytes)}; lower max_context_tokens, kv_cache_bytes, max_num_seqs or "
            f"max_num_batched_tokens, or set device to cpu"
        )
    plan = MemoryPlan(
        budget_bytes=budget_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
        workspace_bytes=workspace,
        dense_bytes=dense_bytes,
        num_slots=None,
        num_device_slots=min(left_bytes // store.blob_bytes, store.shape.num_layers * store.shape.num_experts),
        slot_bytes=store.blob_bytes,
    )
    logger.info("%s", plan)
    return plan


def plan_host_slots(store: StoreSizes, kernels: Kernels, config: EngineConfig, available_bytes: int) -> int:
    """Experts that RAM holds beside a GPU. They are read, not mapped, since it is from locked memory that copies run
    beside everything else.

    Args:
        kernels: of the CPU.
        available_bytes: of RAM, beside what the process has already taken.

    Raises:
        EngineStartError: not even two.
    """
    shape = store.shape
    left_bytes = ram_budget_bytes(config, available_bytes)
    left_bytes -= workspace_bytes(shape, config.max_num_batched_tokens, config.max_num_seqs)
    num_experts = shape.num_layers * shape.num_experts
    slot_bytes = max(stride_bytes(store.blob_bytes), kernels.memory_bytes(0, num_weights(shape) // num_experts))
    if left_bytes < _FEWEST_SLOTS * slot_bytes:
        raise EngineStartError(
            f"not enough memory: {_mib(available_bytes)} of RAM hold less than {_FEWEST_SLOTS} experts, which the "
            f"GPU does not hold all; give ram_bytes more, or choose a smaller format"
        )
    num_slots = min(left_bytes // slot_bytes, num_experts)
    logger.info("%d of %d experts in RAM", num_slots, num_experts)
    return num_slots


def fewest_slots(shape: ModelShape) -> int:
    """Slots that a token's experts of a layer take, and at least those that let reading and computing overlap."""
    return min(max(shape.top_k, _FEWEST_SLOTS), shape.num_layers * shape.num_experts)


def _streamed_layers(store: StoreSizes, excess_bytes: int) -> tuple[int, ...]:
    """Layers to stream so that so much of the dense weights need not stay in memory; as many as there are if that
    does not suffice. They are spread over the model, so that the disk has time for each."""
    if excess_bytes <= 0:
        return ()
    count = -(-excess_bytes // _streamed_bytes(store)) + NUM_BUFFERS  # their buffers take memory, too
    num_layers = store.shape.num_layers
    count = min(-(-count // NUM_BUFFERS) * NUM_BUFFERS, num_layers // NUM_BUFFERS * NUM_BUFFERS)
    if count <= NUM_BUFFERS:
        return ()  # the buffers would take what the layers do
    return tuple(turn * num_layers // count for turn in range(count))


def _streamed_bytes(store: StoreSizes) -> int:
    return sum(entry.num_bytes for entry in streamed_entries(store.dense_entries, 0))


def workspace_bytes(shape: ModelShape, num_tokens: int, num_seqs: int) -> int:
    """What the largest step computes in: activations of so many tokens, and logits of so many sequences."""
    D, F, K = shape.hidden_size, shape.expert_size, shape.top_k
    projected = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    # Inputs in int8 and float32; of each chosen expert inputs, hidden and outputs; queries, keys, values, attended.
    per_token = 4 * (4 * D + K * (D // 2 + 2 * F + D) + projected) + 4 * shape.num_experts
    # Each sequence's logits twice, since scores are of those before penalties; a prompt's, and a row being scored.
    num_logits = 2 * num_seqs + min(SCORED_ROWS, num_tokens) + 1
    return num_tokens * per_token + 4 * num_logits * shape.vocab_size


def device_workspace_bytes(shape: ModelShape, config: EngineConfig) -> int:
    """What the largest step computes in on a GPU, and the largest decode step once more, since captured graphs have
    memory of their own. There, draws take memory, and so does attention in parts."""
    num_tokens, num_seqs = config.max_num_batched_tokens, config.max_num_seqs
    context_tokens = min(config.max_context_tokens or shape.max_context_tokens, shape.max_context_tokens)
    step_bytes = workspace_bytes(shape, num_tokens, num_seqs) + _DRAW_BYTES * num_seqs * shape.vocab_size
    graph_bytes = workspace_bytes(shape, num_seqs, 0)
    return step_bytes + graph_bytes + sum(parts_bytes(shape, n, context_tokens) for n in (num_tokens, num_seqs))


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
