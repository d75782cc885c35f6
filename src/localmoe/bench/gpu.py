"""What a GPU makes of a model that fits in its memory, held against that memory's bandwidth, and the processor; and
both of them together, where it holds a part only.

Whole steps go through the engine's executor as in `bench.engine`; streams go through the engine itself.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import torch

from localmoe.bench.engine import Decoded, StepBench, Workload, check_context
from localmoe.bench.machine import cpu_name, gpu_copy_bytes_s
from localmoe.bench.shapes import BenchModel
from localmoe.bench.streams import StreamDriver, Streams, quantile
from localmoe.core.errors import ConfigError
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_decoder, load_device_engine, make_decoder, warm_up
from localmoe.engine.load_experts import load_hybrid
from localmoe.formats.store import Store
from localmoe.hardware.gpus import watch_utilisation
from localmoe.hardware.memory import available_memory_bytes
from localmoe.kernels.base import Kernels
from localmoe.kernels.select import select_device
from localmoe.residency.split import LayerWork, Split
from localmoe.tiers.device import DeviceArena
from localmoe.tiers.host import HostArena

_READ_BYTES = 4 << 30
"""Far more than a GPU's cache holds."""
_READS = 5
_LAUNCHES = 8
"""One after the other, so that what the host takes to begin does not count."""
_COPIED_BYTES = 512 << 20
"""Of experts, in all."""
_MOST_SEQS_PER_STREAM = 2
"""Room for arrivals that come close together."""
_SAMPLE_S = 0.2
"""Between two looks at the utilisation, which NVML forms over up to a second."""


class LinkReport(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a GPU gets at bytes."""

    read_bandwidth_gb_s: float
    """Of the GPU's memory: best of sums over, and of copies within 4 GiB."""
    pinned_copy_gb_s: float
    """From locked host memory to the GPU, in pieces of 256 MiB."""
    expert_copy_gb_s: float
    """The same, expert by expert."""
    expert_copy_fraction: float


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """Whole steps with all experts on the GPU; figures of decoding are by the number of streams."""

    prompt_tokens: int
    prefill_tok_s: float
    aggregate_tok_s: dict[int, float]
    step_bytes: dict[int, float]
    """What a step must read and write, see `bench.engine.step_bytes`."""
    roof_fraction: dict[int, float]
    """Bytes of a step by its mean time, as a share of the GPU's read bandwidth."""
    cpu_aggregate_tok_s: dict[int, float]
    """The same steps on the processor alone."""


class ServedReport(msgspec.Struct, frozen=True, kw_only=True):
    """Many requests at once, with all experts on the GPU."""

    streams: int
    """Open at a time."""
    prompt_tokens: int
    output_tokens: int
    saturated_tok_s: float
    utilisation: float | None
    """Mean share of time in which the GPU computed, while saturated, as NVML says; None: it does not."""
    arrivals_s: float
    """Poisson, as many a second as the engine finished while saturated."""
    mean_first_token_ms: float
    p95_first_token_ms: float


class GpuReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured."""

    gpu: str
    cpu: str
    shape: str
    format: WeightFormat
    links: LinkReport
    steps: StepReport
    device_share: float
    """Of the experts, that are on the GPU in `hybrid_tok_s`."""
    hybrid_tok_s: dict[int, dict[str, float]]
    """Of the same steps by the number of streams, where the GPU fetches what the split finds (`automatic`), all that
    is in RAM (`fetch_all`), or nothing (`fetch_none`)."""
    served: ServedReport


@dataclass(frozen=True, kw_only=True)
class GpuWorkload:
    """What to measure."""

    steps: Workload
    streams: Streams
    device_share: float
    """Of the experts, that are on the GPU where the processor is to help; others are in RAM."""


class _Always(Split):
    """Fetches all experts in RAM, or none."""

    def __init__(self, fetches: bool) -> None:
        super().__init__()
        self._fetches = fetches

    def choose(self, work: LayerWork) -> int:
        return len(work.ram) if self._fetches else 0


_SPLITS: dict[str, Callable[[], Split]] = {
    "automatic": Split,
    "fetch_all": partial(_Always, True),
    "fetch_none": partial(_Always, False),
}
"""How the GPU and the processor may share the experts that are not on the GPU."""


def require_gpu(setting: str) -> torch.device:
    """The GPU that a setting means; of `cpu` and `auto`, the first.

    Raises:
        EngineStartError: there is none, or it cannot run the kernels.
    """
    return select_device(setting if setting.startswith("cuda") else "cuda")


def measure_gpu(
    model: BenchModel,
    store_path: Path,
    device: torch.device,
    cpu_kernels: Kernels,
    config: EngineConfig,
    workload: GpuWorkload,
    say: Callable[[str], None],
) -> GpuReport:
    """Measure a store.

    Args:
        device: a CUDA device that nobody else uses.
        cpu_kernels: to compare with.
        config: as for serving, with `num_threads`; nothing is speculated, and as many sequences run as are asked for.
        say: told what is being measured.

    Raises:
        ConfigError: the prompts do not fit the model's context.
        EngineStartError: the model does not fit in the GPU's memory.
        StoreError: the store is damaged.
    """
    from localmoe.kernels.gpu import GpuKernels

    steps, streams = workload.steps, workload.streams
    check_context(model, steps)
    if streams.prompt_tokens + streams.output_tokens > model.shape.max_context_tokens:
        raise ConfigError(f"the streams' prompts and answers do not fit the context of {model.name}")
    torch.cuda.set_device(device)
    config = replace(
        config,
        device=str(device),
        speculation=False,
        max_num_seqs=_MOST_SEQS_PER_STREAM * streams.count,
        tiers=replace(config.tiers, stripes=()),  # for other stores
    )
    kernels = GpuKernels(device)
    say("streams on the GPU")
    served = measure_served(model.shape, store_path, kernels, config, streams)
    _release()
    with Store.open(store_path) as store:
        say("reading the GPU's memory, and copying to it; then steps on it, and on the processor")
        links = measure_links(store, device)
        alone = _steps_report(store, kernels, cpu_kernels, config, steps, 1e9 * links.read_bandwidth_gb_s)
        hybrid = {}
        for name, split in _SPLITS.items():
            say(f"steps on both: {name}")
            hybrid[name] = measure_hybrid(store, kernels, cpu_kernels, config, workload, split())
            _release()
    return GpuReport(
        gpu=torch.cuda.get_device_name(device),
        cpu=f"{cpu_name()}: {cpu_kernels.name}",
        shape=model.name,
        format=store.weights,
        links=links,
        steps=alone,
        device_share=workload.device_share,
        hybrid_tok_s={n: {name: rates[n] for name, rates in hybrid.items()} for n in steps.streams},
        served=served,
    )


def _release() -> None:
    """Give the GPU back what nobody uses any more."""
    gc.collect()
    torch.cuda.empty_cache()


def _steps_report(
    store: Store,
    kernels: Kernels,
    cpu_kernels: Kernels,
    config: EngineConfig,
    steps: Workload,
    roof_bytes_s: float,
) -> StepReport:
    prefill_s, decoded = measure_steps(store, kernels, config, steps)
    _release()
    _, cpu_decoded = measure_steps(store, cpu_kernels, config, steps)
    _release()
    return StepReport(
        prompt_tokens=steps.prompt_tokens,
        prefill_tok_s=steps.prompt_tokens / prefill_s,
        aggregate_tok_s={n: n / d.step_s for n, d in decoded.items()},
        step_bytes={n: d.step_bytes for n, d in decoded.items()},
        roof_fraction={n: d.step_bytes / d.step_s / roof_bytes_s for n, d in decoded.items()},
        cpu_aggregate_tok_s={n: n / d.step_s for n, d in cpu_decoded.items()},
    )


def measure_steps(
    store: Store, kernels: Kernels, config: EngineConfig, workload: Workload
) -> tuple[float, dict[int, Decoded]]:
    """Seconds of a prefill, and decoding by the number of streams. Raises StoreError."""
    bench = StepBench(load_decoder(store, kernels), kernels, store.weights, config, workload)
    prefill_s = bench.prefill_s(workload.prompt_tokens)
    decoded = {}
    for num_streams in workload.streams:
        bench.step(num_streams, 1, 0)  # a GPU's kernels are compiled and captured, which no later step pays for
        decoded[num_streams] = bench.decode(num_streams)
    return prefill_s, decoded


def measure_hybrid(
    store: Store, kernels: Kernels, cpu_kernels: Kernels, config: EngineConfig, workload: GpuWorkload, split: Split
) -> dict[int, float]:
    """Tokens a second by the number of streams, with a share of the experts on the GPU.

    Raises:
        EngineStartError: the GPU's memory or RAM does not suffice.
        StoreError: the store is damaged.
    """
    num_slots = max(1, round(workload.device_share * len(store.expert_entries)))
    plan = MemoryPlan(
        budget_bytes=num_slots * store.blob_bytes,
        kv_cache_bytes=0,
        workspace_bytes=0,
        dense_bytes=0,
        num_slots=None,
        num_device_slots=num_slots,
        slot_bytes=store.blob_bytes,
    )
    experts = load_hybrid(store, kernels, cpu_kernels, plan, config, available_memory_bytes(), split)
    decoder = make_decoder(store, store, experts, kernels)
    bench = StepBench(decoder, kernels, store.weights, config, workload.steps)
    rates = {}
    for num_streams in workload.steps.streams:
        bench.decode(num_streams)  # the split learns, kernels are compiled
        rates[num_streams] = num_streams / bench.decode(num_streams).step_s
    return rates


def measure_links(store: Store, device: torch.device) -> LinkReport:
    """What reads and copies reach. Raises EngineStartError: the memory is not to be had."""
    pinned_bytes_s, expert_bytes_s = gpu_copy_bytes_s(), expert_copy_bytes_s(store, device)
    assert pinned_bytes_s is not None, "there is a GPU"
    return LinkReport(
        read_bandwidth_gb_s=device_read_bytes_s(device) / 1e9,
        pinned_copy_gb_s=pinned_bytes_s / 1e9,
        expert_copy_gb_s=expert_bytes_s / 1e9,
        expert_copy_fraction=expert_bytes_s / pinned_bytes_s,
    )


def device_read_bytes_s(device: torch.device) -> float:
    """Of a GPU's memory: best of sums over a buffer, which read it, and of copies, which also write."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    num_bytes = min(_READ_BYTES, free_bytes // 4)
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    sum_s = min(_seconds_on_device(source.sum) for _ in range(_READS))
    copy_s = min(_seconds_on_device(lambda: target.copy_(source)) for _ in range(_READS))
    return max(source.nbytes / sum_s, 2 * source.nbytes / copy_s)


def _seconds_on_device(launch: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    for _ in range(_LAUNCHES):
        launch()
    torch.cuda.synchronize()
    return (time.perf_counter() - started_s) / _LAUNCHES


def expert_copy_bytes_s(store: Store, device: torch.device) -> float:
    """Experts of a store from locked host memory into slots of a slab, one after the other; the best of five rounds.

    Raises:
        EngineStartError: the memory is not to be had.
    """
    shape, blob_bytes = store.shape, store.blob_bytes
    num_slots = max(1, min(shape.num_layers * shape.num_experts, _COPIED_BYTES // blob_bytes))
    host = HostArena(blob_bytes, num_slots, available_memory_bytes=2 * _COPIED_BYTES + blob_bytes, pinned=True)
    try:
        arena = DeviceArena(blob_bytes, num_slots, device)
        has_scales = store.weights is WeightFormat.NVFP4
        scales = (1.0, 1.0, 1.0) if has_scales else None
        rates = []
        for _ in range(5):
            started_s = time.perf_counter()
            copies = [arena.copy_in(slot, host.slot(slot), scales) for slot in range(num_slots)]
            arena.finish(copies[-1])
            rates.append(num_slots * blob_bytes / (time.perf_counter() - started_s))
    finally:
        host.close()
    return max(rates)


def measure_served(
    shape: ModelShape, store_path: Path, kernels: Kernels, config: EngineConfig, streams: Streams
) -> ServedReport:
    """Keep an engine saturated, then let requests arrive as fast as it finished them.

    Raises:
        EngineFaultError: a request failed.
        EngineStartError: the model does not fit in the GPU's memory.
    """
    free_bytes, _ = torch.cuda.mem_get_info(kernels.device)
    engine = load_device_engine("bench", store_path, kernels, config, free_bytes, available_memory_bytes())
    warm_up(engine)
    driver = StreamDriver(engine, shape.vocab_size, streams)
    driver.saturated(lambda: None)  # steps of every size are compiled and captured
    seen: list[float] = []
    uuid = str(torch.cuda.get_device_properties(kernels.device).uuid)
    with watch_utilisation(uuid) as look:
        last_s = time.perf_counter()

        def sample() -> None:
            nonlocal last_s
            if look is not None and time.perf_counter() - last_s >= _SAMPLE_S:
                seen.append(look())
                last_s = time.perf_counter()

        saturated = driver.saturated(sample)
    waits_s = driver.times_to_first_token(saturated.requests_s)
    return ServedReport(
        streams=streams.count,
        prompt_tokens=streams.prompt_tokens,
        output_tokens=streams.output_tokens,
        saturated_tok_s=saturated.tok_s,
        utilisation=statistics.mean(seen) if seen else None,
        arrivals_s=saturated.requests_s,
        mean_first_token_ms=1e3 * statistics.mean(waits_s),
        p95_first_token_ms=1e3 * quantile(waits_s, 0.95),
    )
