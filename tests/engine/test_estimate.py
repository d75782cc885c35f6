"""Predictions: sizes are those of real stores, times those of the model of a step worked out by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localmoe.bench.shapes import find_model
from localmoe.bench.weights import ensure_store
from localmoe.core.errors import EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.engine.budget import MemoryPlan, plan_memory
from localmoe.engine.config import EngineConfig
from localmoe.engine.estimate import (
    Estimate,
    MachineSpeeds,
    PlannedStore,
    StepTimes,
    distinct_experts,
    estimate,
)
from localmoe.formats.store import Store
from localmoe.kernels.reference import ReferenceKernels
from localmoe.tiers.config import TiersConfig
from support.bench_models import write_config

OLMOE = find_model("olmoe-1b-7b").shape
STORE = PlannedStore.of(OLMOE, WeightFormat.MXFP4)
SPEEDS = MachineSpeeds(
    memory_bytes_s=30e9,
    disk_bytes_s=2e9,
    decode=StepTimes(num_tokens=1, layer_s=2e-3, rest_s=4e-3, miss_s=0.5e-3, wait_s=0.0),
    prompt=StepTimes(num_tokens=512, layer_s=50e-3, rest_s=10e-3, miss_s=0.5e-3, wait_s=0.0),
)
READ_S = STORE.blob_bytes / SPEEDS.disk_bytes_s


class NoCopy(ReferenceKernels):
    """Takes what is mapped, as the C++ kernels do."""

    def memory_bytes(self, stored_bytes: int, num_weights: int) -> int:
        return stored_bytes


def plan(num_slots: int | None, streamed_layers: tuple[int, ...] = ()) -> MemoryPlan:
    return MemoryPlan(
        budget_bytes=10**10,
        kv_cache_bytes=1,
        workspace_bytes=2,
        dense_bytes=3,
        streamed_layers=streamed_layers,
        num_slots=num_slots,
        slot_bytes=STORE.blob_bytes,
    )


def predict(num_slots: int | None, speeds: MachineSpeeds = SPEEDS, prefetch_layers: int = 1) -> Estimate:
    return estimate("m", STORE, plan(num_slots), speeds, prefetch_layers=prefetch_layers, reserve_bytes=4)


@pytest.mark.parametrize("weights", ["mxfp4", "nvfp4", "int8", "bf16"])
def test_sizes_are_those_of_a_store(tmp_path: Path, weights: WeightFormat) -> None:
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    planned = PlannedStore.of(model.shape, WeightFormat(weights))
    with Store.open(ensure_store(model, WeightFormat(weights), tmp_path, lambda *_: None)) as store:
        assert (planned.shape, planned.blob_bytes) == (store.shape, store.blob_bytes)
        # The header names where weights came from, which moves them by a few pages at most.
        assert abs(planned.total_bytes - store.total_bytes) <= 2 * 4096
        tiers = TiersConfig(ram_bytes=200_000, reserve_bytes=0)
        config = EngineConfig(kv_cache_bytes=10_000, max_num_batched_tokens=4, max_num_seqs=1, tiers=tiers)
        kernels = NoCopy(1)
        assert plan_memory(planned, kernels, config, 10**9) == plan_memory(store, kernels, config, 10**9)
    layers = model.shape.num_layers * planned.layer_dense_bytes
    assert layers + planned.head_bytes < sum(entry.num_bytes for entry in planned.dense_entries)


def test_what_fits_takes_what_its_layers_take() -> None:
    report = predict(None)
    assert report.decode_tok_s == pytest.approx(1 / (4e-3 + 16 * 2e-3))
    assert report.prefill_tok_s == pytest.approx(512 / (10e-3 + 16 * 50e-3))
    assert (report.num_slots, report.num_experts, report.hit_rate) == (1024, 1024, 1)
    assert (report.disk_bytes_per_token, report.disk_gb_s_to_keep_up) == (0, 0)
    assert (report.decode_limit, report.prefill_limit) == ("compute", "compute")
    # The shape's own arithmetic: 428 MB of experts, 285 of attention, 109 of head.
    assert report.ram_bytes_per_token == pytest.approx(822e6, rel=0.01)
    assert report.prefill_gop_s == pytest.approx(2 * 512 * (4 * 2048**2 + 8 * 3 * 2048 * 1024) / 50e-3 / 1e9)


def test_a_slow_disk_is_waited_for() -> None:
    report = predict(256)
    # Three quarters of eight experts are read; what is read in vain, where the processor has the time for it, too.
    misses = 6
    compute_s = 2e-3 + misses * SPEEDS.decode.miss_s
    following_s = misses * READ_S + 0.15 * min(misses * READ_S, compute_s)
    assert report.decode_limit == "disk"
    dense_s = 2e-3 * STORE.layer_dense_bytes / (STORE.layer_dense_bytes + 8 * STORE.blob_bytes)
    first_s = dense_s + misses * READ_S
    assert report.decode_tok_s == pytest.approx(1 / (4e-3 + first_s + 15 * following_s))
    assert report.disk_bytes_per_token == pytest.approx(16 * misses * STORE.blob_bytes)
    keeps_up = replace(SPEEDS, disk_bytes_s=1.01e9 * report.disk_gb_s_to_keep_up)
    assert predict(256, keeps_up).decode_limit == "compute"
    too_slow = replace(SPEEDS, disk_bytes_s=0.99e9 * report.disk_gb_s_to_keep_up)
    assert predict(256, too_slow).decode_limit == "disk"


def test_a_fast_disk_still_costs_the_processor_something() -> None:
    fast = replace(SPEEDS, disk_bytes_s=1e15)
    report = predict(512, fast)
    assert report.decode_limit == "compute"
    assert report.decode_tok_s == pytest.approx(1 / (4e-3 + 16 * (2e-3 + 4 * SPEEDS.decode.miss_s)))


def test_more_memory_and_reading_ahead_help() -> None:
    speeds = [predict(num_slots).decode_tok_s for num_slots in (8, 100, 400, 800, 1024)]
    assert speeds == sorted(speeds)
    assert predict(1024).decode_tok_s == predict(None).decode_tok_s
    balanced = replace(SPEEDS, disk_bytes_s=4e9)
    assert predict(512, balanced, prefetch_layers=0).decode_tok_s < predict(512, balanced).decode_tok_s


def test_streamed_attention_is_read_for_each_step() -> None:
    report = estimate("m", STORE, plan(256, (0, 8)), SPEEDS, prefetch_layers=1, reserve_bytes=0)
    attention_bytes = 4 * 2048**2 * 34 / 32  # int8, a float16 scale for each 32
    more_bytes = report.disk_bytes_per_token - predict(256).disk_bytes_per_token
    assert more_bytes == pytest.approx(2 * attention_bytes, rel=1e-3)
    assert report.streamed_layers == 2
    assert report.decode_tok_s < predict(256).decode_tok_s


def test_what_is_left_unexplained_is_added_to_layers_that_read() -> None:
    waits = replace(SPEEDS, decode=replace(SPEEDS.decode, wait_s=1e-3))
    # Six of eight experts in each of 16 layers.
    assert 1 / predict(256, waits).decode_tok_s == pytest.approx(1 / predict(256).decode_tok_s + 96e-3)
    assert predict(None, waits).decode_tok_s == predict(None).decode_tok_s


def test_shares_of_memory_add_up() -> None:
    report = predict(256)
    assert report.experts_bytes == 256 * STORE.blob_bytes
    assert (report.reserve_bytes, report.kv_cache_bytes, report.workspace_bytes, report.dense_bytes) == (
        4,
        1,
        2,
        3,
    )
    assert report.whole_bytes == 4 + 1 + 2 + STORE.total_bytes


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64])
def test_distinct_experts_are_as_many_as_drawn(num_tokens: int) -> None:
    rng = np.random.default_rng(0)
    counts = [
        len(np.unique(rng.permuted(np.tile(np.arange(64), (num_tokens, 1)), axis=1)[:, :8])) for _ in range(300)
    ]
    assert distinct_experts(OLMOE, num_tokens) == pytest.approx(np.mean(counts), rel=0.02)


def test_a_model_that_cannot_run_is_refused_by_its_plan() -> None:
    config = EngineConfig(kv_cache_bytes=1, tiers=TiersConfig(ram_bytes=10**8))
    with pytest.raises(EngineStartError, match="not enough memory"):
        plan_memory(STORE, NoCopy(1), config, 10**10)
