"""Speed of a model that does not fit in memory, against what the disk and the processor could do."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from localmoe.bench.engine import DECODE_STEPS, PREFILLS, StepBench, Workload, cache_blocks, check_context
from localmoe.bench.machine import cpu_name, disk_bandwidth_bytes_s
from localmoe.bench.shapes import BenchModel
from localmoe.core.errors import ConfigError
from localmoe.core.events import TierState
from localmoe.core.model import WeightFormat
from localmoe.engine.budget import MemoryPlan, plan_memory
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.load import load_tiered
from localmoe.formats.store import Store
from localmoe.kernels.base import Kernels


class TiersReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; decoding is of one stream."""

    machine: str
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
    num_experts: int
    """Of all layers."""
    prompt_tokens: int
    prefill_tok_s: float
    prefill_disk_gb_s: float
    decode_tok_s: float
    hit_rate: float
    """Uses of an expert that found it kept from an earlier use."""
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
    config: EngineConfig,
    workload: Workload,
    available_bytes: int,
    say: Callable[[str], None],
) -> TiersReport:
    """Measure a store under a memory budget.

    Args:
        config: with the budget and the policy in its `tiers`.
        workload: one stream.
        available_bytes: memory, beside what the process has already taken.
        say: told what is being measured.

    Raises:
        ConfigError: the prompt does not fit the model's context, or the whole model fits in the budget.
        EngineStartError: the budget does not hold even one layer's choice of experts.
        StoreError: the store is damaged.
    """
    check_context(model, workload)
    with Store.open(store_path) as store:
        config = _config_for(workload, config, store)
        plan = plan_memory(store, kernels, config, available_bytes)
        if plan.num_slots is None:
            raise ConfigError(
                f"{model.name} fits in {plan.budget_bytes} bytes of memory; give less with --ram-bytes, or measure "
                f"it with `localmoe bench engine`"
            )
        say(str(plan))
        say("reading the disk")
        before = disk_bandwidth_bytes_s(store_path, store.blob_bytes, config.tiers.disk)
        say("loading the dense weights")
        steps = _steps(store, kernels, plan, config, workload, say)
        say("reading the disk once more")
        disk_bytes_s = max(before, disk_bandwidth_bytes_s(store_path, store.blob_bytes, config.tiers.disk))
        return _report(model, store, kernels, plan, config, steps, disk_bytes_s)


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """What steps took, and what was read meanwhile."""

    prompt_tokens: int
    prefill_s: list[float]
    prefill: tuple[TierState, TierState]
    """Before and after."""
    decode_s: list[float]
    decode: tuple[TierState, TierState]


def _config_for(workload: Workload, config: EngineConfig, store: Store) -> EngineConfig:
    """The same settings with room for the workload and no more."""
    kv_tokens = cache_blocks(workload, config.block_tokens) * config.block_tokens
    return replace(
        config,
        kv_cache_bytes=kv_tokens * kv_bytes_per_token(store.shape, "bf16"),
        kv_cache_dtype="bf16",
        max_num_batched_tokens=workload.prompt_tokens,
        max_num_seqs=1,
    )


def _steps(
    store: Store,
    kernels: Kernels,
    plan: MemoryPlan,
    config: EngineConfig,
    workload: Workload,
    say: Callable[[str], None],
) -> _Steps:
    """Load the model, run it, and let go of it: its memory is all there is."""
    decoder, _ = load_tiered(store, kernels, plan, config.tiers)
    bench = StepBench(decoder, kernels, store.weights, config, workload)

    def state() -> TierState:
        found = decoder.experts.state()
        assert found is not None, "not everything is in memory"
        return found

    say(f"prefill of {workload.prompt_tokens} tokens")
    started = state()
    prefill_s = [bench.step(1, workload.prompt_tokens, 0)[0] for _ in range(PREFILLS)]
    prefilled = state()
    say("decode")
    for position in range(DECODE_STEPS // 2):  # until the experts kept are those of decoding
        bench.step(1, 1, position)
    begun = state()
    decode_s = [bench.step(1, 1, position)[0] for position in range(DECODE_STEPS)]
    return _Steps(
        prompt_tokens=workload.prompt_tokens,
        prefill_s=prefill_s,
        prefill=(started, prefilled),
        decode_s=decode_s,
        decode=(begun, state()),
    )


def _report(
    model: BenchModel,
    store: Store,
    kernels: Kernels,
    plan: MemoryPlan,
    config: EngineConfig,
    steps: _Steps,
    disk_bytes_s: float,
) -> TiersReport:
    assert plan.num_slots is not None
    assert config.num_threads is not None
    num_tokens, step_s = len(steps.decode_s), statistics.mean(steps.decode_s)
    begun, ended = steps.decode
    stall_s = (ended.stall_s - begun.stall_s) / num_tokens
    misses, hits = ended.misses - begun.misses, ended.hits - begun.hits
    missed_bytes = misses * store.blob_bytes / num_tokens
    prefill_bytes = steps.prefill[1].disk_bytes - steps.prefill[0].disk_bytes
    return TiersReport(
        machine=cpu_name(),
        level=kernels.level,
        threads=config.num_threads,
        shape=model.name,
        format=store.weights,
        policy=config.tiers.policy,
        prefetch_layers=config.tiers.prefetch_layers,
        ram_bytes=plan.budget_bytes,
        num_slots=plan.num_slots,
        num_experts=store.shape.num_layers * store.shape.num_experts,
        prompt_tokens=steps.prompt_tokens,
        prefill_tok_s=steps.prompt_tokens / statistics.median(steps.prefill_s),
        prefill_disk_gb_s=prefill_bytes / sum(steps.prefill_s) / 1e9,
        decode_tok_s=1 / step_s,
        hit_rate=hits / (hits + misses),
        missed_bytes_per_token=missed_bytes,
        read_bytes_per_token=(ended.disk_bytes - begun.disk_bytes) / num_tokens,
        disk_gb_s=disk_bytes_s / 1e9,
        compute_ms=1e3 * (step_s - stall_s),
        stall_ms=1e3 * stall_s,
        limit_fraction=max(step_s - stall_s, missed_bytes / disk_bytes_s) / step_s,
    )
