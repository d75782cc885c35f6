"""`bench engine` end to end on tiny shapes: the figures hang together."""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localmoe.bench.engine import (
    DECODE_STEPS,
    PREFILLS,
    EngineReport,
    RecordingExperts,
    StepBench,
    Workload,
    check_memory,
    measure_engine,
    step_bytes,
)
from localmoe.bench.machine import cpu_name, read_bandwidth_bytes_s
from localmoe.bench.shapes import BenchModel, find_model
from localmoe.bench.weights import ensure_store
from localmoe.core.errors import ConfigError, EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig
from localmoe.kernels.select import select_kernels
from support.bench_models import (
    EXPERT_SIZE,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    TOP_K,
    VOCAB,
    write_config,
    write_moe_gguf,
)
from support.models import FakeExperts, routed_to
from support.tiny_text import write_tiny_text_model

pytest.importorskip("localmoe._cpu")

STREAMS = (1, 4)
BITS = {"mxfp4": (4.25, 8.5), "nvfp4": (4.5, 8.5), "int8": (8.5, 8.5), "bf16": (16.0, 16.0)}
"""Of an expert's and of a dense weight, with scales."""


def measure(model: BenchModel, weights: str, home: Path, *, prompt_tokens: int = 33) -> EngineReport:
    path = ensure_store(model, WeightFormat(weights), home, lambda stage, done, total: None)
    kernels = select_kernels("auto", 2, pin=False)
    workload = Workload(streams=STREAMS, prompt_tokens=prompt_tokens, bandwidth_bytes=1 << 20)
    return measure_engine(model, path, kernels, 2, EngineConfig(), workload, lambda stage: None)


def expected_bytes(weights: str, distinct_experts: float, num_streams: int, context_tokens: float) -> float:
    """Spelled out from the tiny shape's sizes."""
    expert_bytes, dense_bytes = (bits / 8 for bits in BITS[weights])
    q_size, kv_size = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = distinct_experts * 3 * HIDDEN * EXPERT_SIZE * expert_bytes
    layer += 2 * HIDDEN * (q_size + kv_size) * dense_bytes + EXPERTS * HIDDEN * 2
    layer += 4 * (2 * HIDDEN + q_size + kv_size)
    cache = num_streams * context_tokens * LAYERS * 2 * kv_size * 2
    return LAYERS * layer + (VOCAB + num_streams) * HIDDEN * dense_bytes + 4 * HIDDEN + cache


@pytest.mark.parametrize("weights", BITS)
def test_figures_hang_together(tmp_path: Path, weights: str) -> None:
    report = measure(find_model(str(write_config(tmp_path / "tiny.json"))), weights, tmp_path)
    assert (report.shape, report.format, report.threads, report.prompt_tokens) == ("tiny", weights, 2, 33)
    assert report.machine == cpu_name()
    assert report.prefill_tok_s > 0
    assert report.decode_tok_s == report.aggregate_tok_s[1]
    assert report.bytes_per_token == report.step_bytes[1]
    assert 0 < report.overlap < 1
    assert report.distinct_experts[1] == TOP_K < report.distinct_experts[4] <= EXPERTS
    for count in STREAMS:
        step_s = count / report.aggregate_tok_s[count]
        assert report.read_gb_s[count] == pytest.approx(report.step_bytes[count] / step_s / 1e9)
        assert report.roof_fraction[count] == pytest.approx(report.read_gb_s[count] / report.read_bandwidth_gb_s)
        # 48 steps from an empty context, of which the first two are not counted.
        expected = expected_bytes(weights, report.distinct_experts[count], count, (3 + 48) / 2)
        assert report.step_bytes[count] == pytest.approx(expected)


def test_the_same_tokens_every_time(tmp_path: Path) -> None:
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    first, second = (measure(model, "mxfp4", tmp_path) for _ in range(2))
    assert first.overlap == second.overlap
    assert first.distinct_experts == second.distinct_experts


@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe"])
def test_gguf(tmp_path: Path, arch: str) -> None:
    report = measure(find_model(str(write_moe_gguf(tmp_path / "m.gguf", arch))), "mxfp4", tmp_path)
    assert (report.shape, report.format) == ("m.gguf", "mxfp4")
    assert report.distinct_experts[1] == TOP_K


def test_recorder_sees_what_was_computed() -> None:
    computed = []

    recorder = RecordingExperts(FakeExperts(lambda routed, x: computed.append((routed.layer, routed.ids_TK))))
    x_TD, weights_TK = torch.zeros(2, 4), torch.ones(2, 1)
    for step in range(2):
        for layer in range(3):
            ids_TK = torch.full((2, 1), 10 * step + layer, dtype=torch.int32)
            recorder(routed_to(layer, x_TD, ids_TK, weights_TK), x_TD)
        assert recorder.take()[:, :, 0].tolist() == [[10 * step + layer] * 2 for layer in range(3)]
    assert [layer for layer, _ in computed] == [0, 1, 2] * 2


def test_tied_embeddings_are_read_whole_once(tmp_path: Path) -> None:
    untied, tied = (
        find_model(str(write_config(tmp_path / "tiny.json", tie_word_embeddings=tie))).shape
        for tie in (False, True)
    )
    sizes = [step_bytes(shape, WeightFormat.INT8, 6, 2, 10, "bf16") for shape in (untied, tied)]
    assert sizes[0] == sizes[1]


def test_a_prompt_longer_than_the_context(tmp_path: Path) -> None:
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    with pytest.raises(ConfigError, match="--prompt-tokens is 129"):
        measure(model, "mxfp4", tmp_path, prompt_tokens=129)


def test_a_model_larger_than_memory() -> None:
    model, kernels = find_model("olmoe-1b-7b"), select_kernels("auto", 1, pin=False)
    check_memory(model, WeightFormat.MXFP4, kernels, 10**10)
    with pytest.raises(
        EngineStartError, match=r"olmoe-1b-7b in mxfp4 takes 3\.9 GB of memory, 1\.0 GB are available"
    ):
        check_memory(model, WeightFormat.MXFP4, kernels, 10**9)


def test_steps_are_held_against_the_best_read_before_or_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    for rates in ([3e9, 5e9], [5e9, 3e9]):
        monkeypatch.setattr(
            "localmoe.bench.engine.read_bandwidth_bytes_s", lambda *_, left=list(rates): left.pop(0)
        )
        assert measure(model, "mxfp4", tmp_path).read_bandwidth_gb_s == 5


def test_a_step_takes_the_mean_of_those_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, count = StepBench.step, itertools.count()

    def step(self: StepBench, *arguments: Any) -> tuple[float, NDArray[np.int32]]:
        """Decodes first one stream, then four: the first two steps and the last of each take long."""
        _, ids_LTK = original(self, *arguments)
        place = (next(count) - 1 - PREFILLS) % DECODE_STEPS
        return {0: 10.0, 1: 10.0, DECODE_STEPS - 1: 0.1 * (DECODE_STEPS - 2)}.get(place, 1e-9), ids_LTK

    monkeypatch.setattr(StepBench, "step", step)
    monkeypatch.setattr("localmoe.bench.engine._DECODE_LIMIT_S", 100.0)
    report = measure(find_model(str(write_config(tmp_path / "tiny.json"))), "mxfp4", tmp_path)
    assert report.aggregate_tok_s == pytest.approx({1: 10.0, 4: 40.0})


def test_what_a_grammar_costs(tmp_path: Path) -> None:
    without = find_model(str(write_config(tmp_path / "tiny.json")))
    assert measure(without, "mxfp4", tmp_path).grammar_ms == {}
    write_tiny_text_model(tmp_path / "whole")
    model = find_model(str(write_config(tmp_path / "whole/config.json", vocab_size=320)))
    report = measure(model, "mxfp4", tmp_path)
    assert set(report.grammar_ms) == set(STREAMS)
    assert all(abs(added_ms) < 1000 for added_ms in report.grammar_ms.values())


def test_bandwidth_is_a_rate() -> None:
    assert 1e8 < read_bandwidth_bytes_s(2, 1 << 24) < 1e13


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "localmoe._cpu", None)
    monkeypatch.delattr("localmoe._cpu", raising=False)
    with pytest.raises(EngineStartError, match="install a C\\+\\+ compiler"):
        read_bandwidth_bytes_s(1, 1 << 20)


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU: 9000\n\nmodel name\t: Another\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU: 9000"
    (tmp_path / "empty").write_text("")
    assert cpu_name(tmp_path / "empty") == "unknown"


def test_overlap_counts_experts_in_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three experts stay from token to token, in other places of the list."""
    taken = iter([np.full((2, 1, 3), [[0, 1, 2]], np.int32), np.full((2, 1, 3), [[2, 7, 0]], np.int32)] * 200)
    monkeypatch.setattr(RecordingExperts, "take", lambda self: (self._ids.clear(), next(taken))[1])
    monkeypatch.setattr("localmoe.bench.engine.DECODE_STEPS", 8)
    model = find_model(str(write_config(tmp_path / "tiny.json")))
    path = ensure_store(model, WeightFormat.MXFP4, tmp_path, lambda stage, done, total: None)
    workload = Workload(streams=(1,), prompt_tokens=3, bandwidth_bytes=1 << 20)
    kernels = select_kernels("auto", 2, pin=False)
    report = measure_engine(model, path, kernels, 2, EngineConfig(), workload, lambda stage: None)
    assert report.overlap == pytest.approx(2 / 3)
