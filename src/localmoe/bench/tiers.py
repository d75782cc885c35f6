"""Speed of a model that does not fit in memory, against what the disk and the processor could do."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from localmoe.bench.engine import DECODE_STEPS, PREFILLS, StepBench, Workload, cache_blocks, check_context
from localmoe.bench.machine import cpu_name, disk_bandwidth_bytes_s
from localmoe.bench.shapes import BenchModel
from localmoe.core.errors import ConfigError
from localmoe.core.events import TierState
from localmoe.core.model import WeightFormat
from localmoe.engine.budget import MemoryPlan, plan_device_memory, plan_memory, ram_budget_bytes
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.hybrid_experts import HybridExperts
from localmoe.engine.load import load_tiered, make_decoder
from localmoe.engine.load_experts import load_hybrid
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.kernels.base import Kernels
from localmoe.models.decoder import Decoder
from localmoe.residency.split import Split


class TiersReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; decoding is of one stream."""

    machine: str
    gpu: str | None
    """None: everything was computed on the processor."""
    level: str
    threads: int
    shape: str
    format: WeightFormat
    policy: str
    prefetch_layers: int
    ram_bytes: int
    """The budget, the reserve taken off."""
    num_slots: int
    """Experts that fit in it."""
    gpu_bytes: int
    """The budget of the GPU's memory; 0: there is none."""
    num_device_slots: int
    """Experts that fit in that."""
    num_experts: int
    """Of all layers."""
    prompt_tokens: int
    prefill_tok_s: float
    prefill_disk_gb_s: float
    decode_tok_s: float
    hit_rate: float
    """Uses of an expert that found it kept from an earlier use, in RAM or on the GPU."""
    missed_bytes_per_token: float
    """Of experts that a token used and that were not kept."""
    read_bytes_per_token: float
    """With what was read ahead in vain."""
    disk_gb_s: float
    """Best of random reads of one expert's size, before and after."""
    compute_ms: float
    """Of a step, without the time that it only waited for the disk."""
    stall_ms: float
    """Waiting for the disk."""
    limit_fraction: float
    """The longer of computing and reading what was missed at the disk's speed, as a share of the step."""


def measure_tiers(
    model: BenchModel,
    store_path: Path,
    kernels: Kernels,
    gpu_kernels: Kernels | None,
    config: EngineConfig,
    workload: Workload,
    available_bytes: int,
    say: Callable[[str], None],
) -> TiersReport:
    """Measure a store under a memory budget.

    Args:
        kernels: of the processor.
        gpu_kernels: of the GPU that computes what fits there; None: the processor computes everything.
        config: with the budgets and the policy in its `tiers`.
        workload: one stream.
        available_bytes: RAM, beside what the process has already taken.
        say: told what is being measured.

    Raises:
        ConfigError: the prompt does not fit the model's context, or the whole model fits in the budget.
        EngineStartError: the budget does not hold even one layer's choice of experts.
        StoreError: the store is damaged.
    """
    check_context(model, workload)
    with Store.open(store_path) as store:
        config = _config_for(workload, config, store)
        plan = _plan(model, store, kernels, gpu_kernels, config, available_bytes)
        say(str(plan))
        say("reading the disk")
        before = disk_bandwidth_bytes_s(store_path, store.blob_bytes, config.tiers.disk)
        say("loading the dense weights")
        load = partial(_load, store, kernels, gpu_kernels, plan, config, available_bytes)
        steps = _steps(load, gpu_kernels or kernels, store.weights, config, workload, say)
        say("reading the disk once more")
        disk_bytes_s = max(before, disk_bandwidth_bytes_s(store_path, store.blob_bytes, config.tiers.disk))
    assert config.num_threads is not None
    return TiersReport(
        machine=cpu_name(),
        gpu=None if gpu_kernels is None else gpu_kernels.name,
        level=kernels.level,
        threads=config.num_threads,
        shape=model.name,
        format=store.weights,
        policy=config.tiers.policy,
        prefetch_layers=config.tiers.prefetch_layers,
        ram_bytes=ram_budget_bytes(config, available_bytes),
        gpu_bytes=0 if gpu_kernels is None else plan.budget_bytes,
        num_slots=steps.ended.num_slots,
        num_device_slots=steps.ended.device_slots,
        num_experts=steps.ended.num_experts,
        prompt_tokens=workload.prompt_tokens,
        prefill_tok_s=workload.prompt_tokens / statistics.median(steps.prefill_s),
        prefill_disk_gb_s=(steps.prefilled.disk_bytes - steps.loaded.disk_bytes) / sum(steps.prefill_s) / 1e9,
        disk_gb_s=disk_bytes_s / 1e9,
        **steps.decoded(store.blob_bytes, disk_bytes_s),
    )


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """What steps took, and totals in between."""

    loaded: TierState
    prefill_s: list[float]
    prefilled: TierState
    begun: TierState
    """Decoding, after some tokens that do not count."""
    decode_s: list[float]
    ended: TierState

    def decoded(self, blob_bytes: int, disk_bytes_s: float) -> dict[str, float]:
        """What the report says of a decoded token."""
        begun, ended = self.begun, self.ended
        num_tokens, step_s = len(self.decode_s), statistics.mean(self.decode_s)
        compute_s = step_s - (ended.stall_s - begun.stall_s) / num_tokens
        misses = ended.misses - begun.misses
        hits = ended.hits + ended.device_hits - begun.hits - begun.device_hits
        missed_bytes = misses * blob_bytes / num_tokens
        return {
            "decode_tok_s": 1 / step_s,
            "hit_rate": hits / (hits + misses),
            "missed_bytes_per_token": missed_bytes,
            "read_bytes_per_token": (ended.disk_bytes - begun.disk_bytes) / num_tokens,
            "compute_ms": 1e3 * compute_s,
            "stall_ms": 1e3 * (step_s - compute_s),
            "limit_fraction": max(compute_s, missed_bytes / disk_bytes_s) / step_s,
        }


def _config_for(workload: Workload, config: EngineConfig, store: Store) -> EngineConfig:
    """The same settings with room for the workload and no more; stripes are for other stores."""
    kv_tokens = cache_blocks(workload, config.block_tokens) * config.block_tokens
    return replace(
        config,
        kv_cache_bytes=kv_tokens * kv_bytes_per_token(store.shape, "bf16"),
        kv_cache_dtype="bf16",
        max_num_batched_tokens=workload.prompt_tokens,
        max_num_seqs=1,
        tiers=replace(config.tiers, stripes=()),
    )


def _plan(
    model: BenchModel,
    store: Store,
    kernels: Kernels,
    gpu_kernels: Kernels | None,
    config: EngineConfig,
    available_bytes: int,
) -> MemoryPlan:
    """Of the GPU's memory where that computes, else of RAM. Raises ConfigError: not everything is to fit there."""
    if gpu_kernels is None:
        plan = plan_memory(store, kernels, config, available_bytes)
        is_whole, option, command = plan.num_slots is None, "--ram-bytes", "engine"
    else:
        free_bytes, _ = torch.cuda.mem_get_info(gpu_kernels.device)
        plan = plan_device_memory(store, config, free_bytes)
        is_whole, option, command = plan.num_device_slots == len(store.expert_entries), "--gpu-bytes", "gpu"
    if is_whole:
        raise ConfigError(
            f"{model.name} fits in {plan.budget_bytes} bytes of memory; give less with {option}, or measure it with "
            f"`localmoe bench {command}`"
        )
    return plan


def _load(
    store: Store,
    kernels: Kernels,
    gpu_kernels: Kernels | None,
    plan: MemoryPlan,
    config: EngineConfig,
    available_bytes: int,
) -> tuple[Decoder, TieredExperts | HybridExperts]:
    if gpu_kernels is None:
        return load_tiered(store, kernels, plan, config.tiers)
    experts = load_hybrid(store, gpu_kernels, kernels, plan, config, available_bytes, Split())
    return make_decoder(store, store, experts, gpu_kernels), experts


def _steps(
    load: Callable[[], tuple[Decoder, TieredExperts | HybridExperts]],
    kernels: Kernels,
    weights: WeightFormat,
    config: EngineConfig,
    workload: Workload,
    say: Callable[[str], None],
) -> _Steps:
    """Load a model, run it, and let go of it: its memory is all there is."""
    decoder, experts = load()
    bench = StepBench(decoder, kernels, weights, config, workload)
    say(f"prefill of {workload.prompt_tokens} tokens")
    bench.step(1, workload.prompt_tokens, 0)  # a GPU's kernels are compiled
    loaded = experts.state()
    prefill_s = [bench.step(1, workload.prompt_tokens, 0)[0] for _ in range(PREFILLS)]
    prefilled = experts.state()
    say("decode")
    for position in range(DECODE_STEPS // 2):  # until the experts kept are those of decoding
        bench.step(1, 1, position)
    begun = experts.state()
    decode_s = [bench.step(1, 1, position)[0] for position in range(DECODE_STEPS)]
    return _Steps(
        loaded=loaded,
        prefill_s=prefill_s,
        prefilled=prefilled,
        begun=begun,
        decode_s=decode_s,
        ended=experts.state(),
    )
