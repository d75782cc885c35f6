"""`bench gpu`: the whole of it on a GPU; without one, on CPU tensors with what only CUDA has left out."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("localmoe._cpu")
pytest.importorskip("triton", reason="Triton is not installed")

from localmoe.bench import gpu
from localmoe.bench.engine import Workload
from localmoe.bench.gpu import (
    GpuReport,
    GpuWorkload,
    LinkReport,
    ServedReport,
    StepReport,
    measure_gpu,
    require_gpu,
)
from localmoe.bench.shapes import find_model
from localmoe.bench.streams import Streams
from localmoe.bench.weights import ensure_store
from localmoe.cli.main import app
from localmoe.core.errors import ConfigError, EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig
from localmoe.kernels.select import select_kernels
from localmoe.tiers.host import HostArena
from support.bench_models import write_config

_CUDA = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(_CUDA, reason="there is a GPU")

WORKLOAD = GpuWorkload(
    steps=Workload(streams=(1, 2), prompt_tokens=4),
    streams=Streams(count=2, prompt_tokens=3, output_tokens=2, seconds=0.5, num_timed=2),
    device_share=0.5,
)


def check(report: GpuReport) -> None:
    assert (report.shape, report.format, report.served.streams) == ("tiny", "mxfp4", 2)
    steps, links, served = report.steps, report.links, report.served
    for by_streams in (steps.aggregate_tok_s, steps.step_bytes, steps.roof_fraction, steps.cpu_aggregate_tok_s):
        assert list(by_streams) == [1, 2]
        assert min(by_streams.values()) > 0
    for count, rate in steps.aggregate_tok_s.items():
        read_gb_s = steps.step_bytes[count] * rate / count / 1e9
        assert steps.roof_fraction[count] == pytest.approx(read_gb_s / links.read_bandwidth_gb_s)
    assert links.expert_copy_fraction == pytest.approx(links.expert_copy_gb_s / links.pinned_copy_gb_s)
    assert served.arrivals_s == pytest.approx(served.saturated_tok_s / 2)
    assert served.mean_first_token_ms > 0
    assert served.utilisation is None or 0 <= served.utilisation <= 1
    assert list(report.hybrid_tok_s) == [1, 2]
    for rates in report.hybrid_tok_s.values():
        assert list(rates) == ["automatic", "fetch_all", "fetch_none"]
        assert min(rates.values()) > 0


def measure(home: Path, device: torch.device, workload: GpuWorkload = WORKLOAD) -> GpuReport:
    model = find_model(str(write_config(home / "tiny.json")))
    path = ensure_store(model, WeightFormat.MXFP4, home, lambda *_: None)
    kernels = select_kernels("auto", 2, pin=False)
    return measure_gpu(model, path, device, kernels, EngineConfig(num_threads=2), workload, lambda _: None)


@pytest.mark.gpu
@pytest.mark.skipif(not _CUDA, reason="no CUDA device")
def test_on_a_gpu(tmp_path: Path) -> None:
    check(measure(tmp_path, require_gpu("auto")))


@pytest.mark.slow
@without_gpu
def test_figures_hang_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="12-34")
    for name, value in {
        "set_device": None,
        "empty_cache": None,
        "mem_get_info": (2 << 30, 2 << 30),
        "get_device_name": "a GPU",
        "get_device_properties": properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(gpu, "device_read_bytes_s", lambda device: 1e11)
    monkeypatch.setattr(gpu, "gpu_copy_bytes_s", lambda: 1e10)
    monkeypatch.setattr(gpu, "HostArena", lambda *sizes, pinned, **kw: partial(HostArena, **kw)(*sizes))
    monkeypatch.setattr("localmoe.bench.engine.DECODE_STEPS", 3)
    shared, measure_hybrid = [], gpu.measure_hybrid

    def once(*arguments: Any) -> dict[int, float]:
        if not shared:
            shared.append(measure_hybrid(*arguments))
        return shared[0]

    monkeypatch.setattr(gpu, "measure_hybrid", once)
    check(measure(tmp_path, torch.device("cpu")))


def test_prompts_must_fit_the_context(tmp_path: Path) -> None:
    long = replace(WORKLOAD, streams=Streams(count=2, prompt_tokens=100, output_tokens=29))
    with pytest.raises(ConfigError, match="context of tiny"):
        measure(tmp_path, torch.device("cpu"), long)


@without_gpu
@pytest.mark.parametrize("arguments", [[], ["--device", "cuda:0"]])
def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    with pytest.raises(EngineStartError, match="finds 0 CUDA devices here"):
        CliRunner().invoke(app, ["bench", "gpu", *arguments], catch_exceptions=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    report = GpuReport(
        gpu="a GPU",
        cpu="a processor",
        shape="tiny",
        format=WeightFormat.MXFP4,
        links=LinkReport(
            read_bandwidth_gb_s=100.0, pinned_copy_gb_s=20.0, expert_copy_gb_s=18.0, expert_copy_fraction=0.9
        ),
        steps=StepReport(
            prompt_tokens=4,
            prefill_tok_s=1000.0,
            aggregate_tok_s={1: 100.0},
            step_bytes={1: 5e8},
            roof_fraction={1: 0.5},
            cpu_aggregate_tok_s={1: 10.0},
        ),
        device_share=0.5,
        hybrid_tok_s={1: {"automatic": 45.0, "fetch_all": 30.0, "fetch_none": 40.0}},
        served=ServedReport(
            streams=2,
            prompt_tokens=3,
            output_tokens=2,
            saturated_tok_s=50.0,
            utilisation=None,
            arrivals_s=25.0,
            mean_first_token_ms=7.0,
            p95_first_token_ms=11.0,
        ),
    )
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu, "require_gpu", lambda setting: torch.device("cpu"))
    monkeypatch.setattr(gpu, "measure_gpu", lambda *_: report)
    arguments = ["--shape", str(write_config(tmp_path / "tiny.json")), *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, ["bench", "gpu", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if as_json:
        assert json.loads(result.stdout)["steps"]["roof_fraction"] == {"1": 0.5}
    else:
        text = " ".join(result.stdout.split())
        assert "on a GPU, which reads 100 GB/s" in text
        assert "1 │ 45.0 │ 30.0 │ 40.0 │ 1.12" in text
        assert "NVML does not say how busy; at 25.0 arrivals a second" in text
