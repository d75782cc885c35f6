"""What a prediction rests on: a few layers of a model's sizes, on this machine's kernels and disk, for some seconds.

The layers hold random weights in a file that is written for it and removed again, and steps go through the engine's
own executor. Times of one layer and of several tell what a layer takes and what a step takes beside its layers. The
same layers with half of their experts on disk tell what an expert that is read costs the processor, and what of the
wait for the disk a prediction leaves unexplained.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from localmoe.bench.engine import StepBench, Workload
from localmoe.bench.machine import disk_bandwidth_bytes_s, read_bandwidth_bytes_s
from localmoe.bench.shapes import BenchModel
from localmoe.bench.weights import ensure_store
from localmoe.core.errors import EngineStartError, ModelBuildError
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.engine.budget import MemoryPlan
from localmoe.engine.config import EngineConfig
from localmoe.engine.estimate import MachineSpeeds, PlannedStore, Spread, StepTimes, predict_step
from localmoe.engine.load import load_decoder, load_tiered
from localmoe.engine.tiered_experts import TieredExperts
from localmoe.formats.store import Store
from localmoe.hardware.memory import available_memory_bytes
from localmoe.kernels.base import Kernels
from localmoe.models.decoder import Decoder
from localmoe.tiers.host import stride_bytes

READ_BYTES = 512 << 20
"""More than caches hold; less than benchmarks read, for the sake of time and of machines short of memory."""
_LAYERS = 3
_LAYER_BYTES = 512 << 20
"""Most that a layer's experts take; of larger models, layers of fewer experts are measured."""
_WARM_STEPS = 24
_STEPS = 32
_LIMIT_S = 2.0
"""Of the steps of one kind, once two have been measured."""


def measure_speeds(
    shape: ModelShape,
    weights: WeightFormat,
    kernels: Kernels,
    config: EngineConfig,
    workload: Workload,
    home: Path,
    say: Callable[[str], None],
) -> MachineSpeeds:
    """Measure this machine with a model's sizes.

    Args:
        config: with `num_threads`.
        workload: of one number of streams.
        home: where the few layers are written for the time being; on the disk that is measured.
        say: told what is being measured.

    Raises:
        EngineStartError: there are no C++ kernels, or not the memory.
        ModelBuildError: there is not the disk space, or writing failed.
        StoreError: no store can have this shape in this format, or the disk cannot be read.
    """
    assert config.num_threads is not None
    probe = probe_shape(shape, weights)
    planned, available_bytes = PlannedStore.of(probe, weights), available_memory_bytes()
    needed_bytes = 2 * planned.total_bytes  # mapped, and much of it once more
    if needed_bytes > available_bytes:
        raise EngineStartError(
            f"measuring takes {needed_bytes / 1e9:.1f} GB of memory, {available_bytes / 1e9:.1f} GB are available; "
            f"end what takes it"
        )
    say("reading memory")
    memory_bytes_s = read_bandwidth_bytes_s(config.num_threads, READ_BYTES)
    say(f"writing {_LAYERS} layers of the model's sizes ({planned.total_bytes / 1e9:.1f} GB, removed afterwards)")
    with scratch(home) as directory:
        path = ensure_store(BenchModel(name="layers", shape=probe), weights, Path(directory), lambda *_: None)
        with Store.open(path) as store:
            say("reading the disk")
            largest = max(path, find_largest_store(home) or path, key=lambda file: file.stat().st_size)
            disk_bytes_s = disk_bandwidth_bytes_s(largest, store.blob_bytes, config.tiers.disk)
            say("computing")
            bench = _LayersBench(store, kernels, config, workload)
            (num_streams,) = workload.streams
            decode = bench.times(num_streams, 1, disk_bytes_s)
            prompt = bench.times(1, workload.prompt_tokens, disk_bytes_s)
    return MachineSpeeds(memory_bytes_s=memory_bytes_s, disk_bytes_s=disk_bytes_s, decode=decode, prompt=prompt)


def probe_shape(shape: ModelShape, weights: WeightFormat) -> ModelShape:
    """The model cut down to a few layers, and to as many experts as are measured in reasonable time."""
    blob_bytes = PlannedStore.of(structs.replace(shape, num_layers=1), weights).blob_bytes
    num_experts = min(shape.num_experts, max(2 * shape.top_k, _LAYER_BYTES // blob_bytes))
    return structs.replace(shape, num_layers=_LAYERS, num_experts=num_experts)


def find_largest_store(home: Path) -> Path | None:
    """Of those in LocalMoE's directory. The larger and the older a file, the less of it comes from the memory of the
    disk's host, if it has one."""
    stores = [*home.glob("models/*/stores/*.store"), *home.glob("bench/*.store")]
    return max(stores, key=lambda path: path.stat().st_size, default=None)


def scratch(home: Path) -> tempfile.TemporaryDirectory[str]:
    """A directory on the disk that is measured. Raises ModelBuildError."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix="measuring-", dir=home)
    except OSError as error:
        raise ModelBuildError(
            f"{home}: cannot be written: {error.strerror}; set LOCALMOE_HOME to a directory that can"
        ) from error


class _LayersBench:
    """The few layers, once in memory and once with half of their experts on disk."""

    def __init__(self, store: Store, kernels: Kernels, config: EngineConfig, workload: Workload) -> None:
        self._planned = PlannedStore.of(store.shape, store.weights)
        self._prefetch_layers = config.tiers.prefetch_layers
        self._resident, tiered = load_decoder(store, kernels), _half_on_disk(store, kernels, config)
        assert isinstance(tiered.experts, TieredExperts)
        self._experts, self._layers = tiered.experts, list(self._resident.layers)
        self._bench = StepBench(self._resident, kernels, store.weights, config, workload)
        self._tiered_bench = StepBench(tiered, kernels, store.weights, config, workload)

    def times(self, num_streams: int, num_tokens: int, disk_bytes_s: float) -> StepTimes:
        """Of a step in which each stream computes so many tokens."""
        started_s = time.perf_counter()
        for position in range(_WARM_STEPS):  # the slots are empty at first, and caches full of something else
            if not position or time.perf_counter() - started_s < _LIMIT_S / 2:
                self._tiered_bench.step(num_streams, num_tokens, position if num_tokens == 1 else 0)
        one_s: list[float] = []
        all_s: list[float] = []
        tiered_s: list[float] = []
        stalls_s: list[float] = []
        begun, started_s = self._experts.state(), time.perf_counter()
        # Interleaved, so that a moment in which the machine does something else falls on all alike.
        while len(all_s) < _STEPS and (len(all_s) < 2 or time.perf_counter() - started_s < _LIMIT_S):
            position = len(all_s) if num_tokens == 1 else 0
            self._resident.layers = self._layers[:1]
            one_s.append(self._bench.step(num_streams, num_tokens, position)[0])
            self._resident.layers = self._layers
            all_s.append(self._bench.step(num_streams, num_tokens, position)[0])
            stalled_s = self._experts.state().stall_s
            tiered_s.append(self._tiered_bench.step(num_streams, num_tokens, position)[0])
            stalls_s.append(self._experts.state().stall_s - stalled_s)
        ended = self._experts.state()
        misses, hits = ended.misses - begun.misses, ended.hits - begun.hits
        num_misses = misses / len(all_s)
        times = split_step(num_streams * num_tokens, _usual(one_s), _usual(all_s))
        if not misses:
            return times
        computed_s = _usual([total_s - stall_s for total_s, stall_s in zip(tiered_s, stalls_s, strict=True)])
        times = replace(times, miss_s=max(computed_s - _usual(all_s), 0.0) / num_misses)
        spread = Spread(hit_rate=hits / (hits + misses), streamed_bytes=0, prefetch_layers=self._prefetch_layers)
        explained_s, _ = predict_step(self._planned, times, disk_bytes_s, spread)
        return replace(times, wait_s=max(_usual(tiered_s) - explained_s, 0.0) / num_misses)


def _usual(times_s: list[float]) -> float:
    """The lower quartile: noise only ever adds."""
    return statistics.quantiles(times_s, n=4, method="inclusive")[0]


def split_step(num_tokens: int, one_s: float, all_s: float) -> StepTimes:
    """Times of a step whose weights are in memory, from a step of one layer, and one of all of them."""
    # Noise may turn the rest of a small step negative; a layer takes no more than all of them do on average.
    layer_s = min(max(all_s - one_s, 0.0) / (_LAYERS - 1), all_s / _LAYERS) or all_s / _LAYERS
    return StepTimes(
        num_tokens=num_tokens, layer_s=layer_s, rest_s=all_s - _LAYERS * layer_s, miss_s=0.0, wait_s=0.0
    )


def _half_on_disk(store: Store, kernels: Kernels, config: EngineConfig) -> Decoder:
    num_slots = max(_LAYERS * store.shape.num_experts // 2, 1)
    slot_bytes = stride_bytes(store.blob_bytes)
    dense_bytes = sum(entry.num_bytes for entry in store.dense_entries)
    plan = MemoryPlan(
        budget_bytes=dense_bytes + num_slots * slot_bytes,
        kv_cache_bytes=0,
        workspace_bytes=0,
        dense_bytes=dense_bytes,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
    )
    # Stripes and placement rules are for other stores.
    decoder, _ = load_tiered(store, kernels, plan, replace(config.tiers, stripes=(), placement=()))
    return decoder
