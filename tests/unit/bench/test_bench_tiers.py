"""`bench tiers`: on the processor, and beside a GPU, for which CPU tensors stand in where there is none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("localmoe._cpu")

from localmoe.bench import tiers
from localmoe.bench.engine import Workload
from localmoe.bench.shapes import find_model
from localmoe.bench.tiers import TiersReport, measure_tiers
from localmoe.bench.weights import ensure_store
from localmoe.cli.main import app
from localmoe.core.errors import ConfigError, EngineStartError
from localmoe.core.model import WeightFormat
from localmoe.engine.config import EngineConfig
from localmoe.kernels.base import Kernels
from localmoe.kernels.select import select_kernels
from localmoe.tiers.config import TiersConfig
from support.bench_models import write_config

WORKLOAD = Workload(streams=(1,), prompt_tokens=4)
VRAM_BYTES = 195_000
TIERS = TiersConfig(ram_bytes=200_000, reserve_bytes=0)


def measure(home: Path, config: TiersConfig, gpu_kernels: Kernels | None = None) -> TiersReport:
    model = find_model(str(write_config(home / "tiny.json")))
    path = ensure_store(model, WeightFormat.MXFP4, home, lambda *_: None)
    kernels = select_kernels("auto", 1, pin=False)
    engine = EngineConfig(num_threads=1, tiers=config)
    return measure_tiers(model, path, kernels, gpu_kernels, engine, WORKLOAD, 1 << 30, lambda _: None)


def check(report: TiersReport) -> None:
    assert (report.shape, report.format, report.num_experts) == ("tiny", "mxfp4", 32)
    assert 3 <= report.num_slots < 32
    assert 0 < report.hit_rate < 1
    assert report.decode_tok_s == pytest.approx(1e3 / (report.compute_ms + report.stall_ms))
    missed_ms = report.missed_bytes_per_token / report.disk_gb_s / 1e6
    limit = max(report.compute_ms, missed_ms) * report.decode_tok_s / 1e3
    assert report.limit_fraction == pytest.approx(limit)
    assert report.read_bytes_per_token >= report.missed_bytes_per_token > 0


def test_figures_hang_together(tmp_path: Path) -> None:
    report = measure(tmp_path, TIERS)
    check(report)
    assert (report.gpu, report.gpu_bytes, report.num_device_slots) == (None, 0, 0)
    assert report.ram_bytes == 200_000


@pytest.mark.slow
def test_beside_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from localmoe.kernels.gpu import GpuKernels

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2 << 30, 2 << 30))
    kernels = GpuKernels(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    monkeypatch.setattr(tiers, "DECODE_STEPS", 8)
    report = measure(tmp_path, replace(TIERS, ram_bytes=90_000, vram_bytes=VRAM_BYTES), kernels)
    check(report)
    assert (report.gpu, report.gpu_bytes) == (kernels.name, VRAM_BYTES)
    assert 0 < report.num_device_slots < 16
    with pytest.raises(ConfigError, match="less with --gpu-bytes, or measure it with `localmoe bench gpu`"):
        measure(tmp_path, replace(TIERS, vram_bytes=1 << 30), kernels)


def test_a_model_that_fits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="less with --ram-bytes, or measure it with `localmoe bench engine`"):
        measure(tmp_path, TiersConfig(reserve_bytes=0))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__RESERVE_BYTES", "0")
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__STRIPES", '["/of/another/store.1-of-2.stripe"]')
    arguments = ["--shape", str(write_config(tmp_path / "tiny.json")), "--prompt-tokens", "4"]
    arguments += ["--gpu-bytes", "0", "--ram-bytes", "200000", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, ["bench", "tiers", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    if as_json:
        assert json.loads(result.stdout)["ram_bytes"] == 200_000
    else:
        assert "experts in memory, policy adaptive" in " ".join(result.stdout.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    with pytest.raises(EngineStartError, match="finds 0 CUDA devices here"):
        CliRunner().invoke(app, ["bench", "tiers", "--gpu-bytes", "1e9"], catch_exceptions=False)
