"""`localmoe doctor` and `localmoe models estimate`: JSON alone on standard output, tables, and refusals."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localmoe.catalog.demo import upcycle_gguf
from localmoe.cli.main import app
from localmoe.core.errors import ConfigError, EngineStartError
from support.bench_models import write_config, write_moe_gguf
from support.tiny_gguf import write_tiny_gguf

pytest.importorskip("localmoe._cpu")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LOCALMOE_ENGINE__MAX_NUM_BATCHED_TOKENS", "4")
    monkeypatch.setenv("LOCALMOE_ENGINE__MAX_NUM_SEQS", "1")
    monkeypatch.setattr("localmoe.bench.machine._DISK_S", 0.01)
    monkeypatch.setattr("localmoe.bench.doctor._FILE_BYTES", 16 << 20)
    monkeypatch.setattr("localmoe.bench.doctor.READ_BYTES", 1 << 20)
    monkeypatch.setattr("localmoe.bench.speeds.READ_BYTES", 1 << 20)
    monkeypatch.setattr("localmoe.bench.speeds._LIMIT_S", 0.01)
    return CliRunner()


def estimate(runner: CliRunner, *arguments: str) -> str:
    result = runner.invoke(app, ["models", "estimate", *arguments, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_estimate_of_what_fits_and_what_does_not(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMOE_ENGINE__KV_CACHE_BYTES", "32768")  # of one sequence
    config = str(write_config(tmp_path / "tiny.json"))
    whole = json.loads(estimate(runner, config, "--format", "mxfp4", "--streams", "2", "--json"))
    assert (whole["model"], whole["format"], whole["streams"]) == ("tiny", "mxfp4", 2)
    assert whole["num_slots"] == whole["num_experts"] == 32
    assert min(whole["decode_tok_s"], whole["prefill_tok_s"], whole["memory_gb_s"], whole["disk_gb_s"]) > 0
    reserve_bytes = whole["reserve_bytes"]
    beside_bytes = sum(whole[share] for share in ("kv_cache_bytes", "workspace_bytes", "dense_bytes"))
    budget_bytes = beside_bytes + 10 * whole["experts_bytes"] // 32
    budget = ["--ram-bytes", str(reserve_bytes + budget_bytes)]
    part = json.loads(estimate(runner, config, "--format", "mxfp4", *budget, "--json"))
    assert (part["num_slots"], part["hit_rate"]) == (10, 10 / 32)
    assert part["disk_bytes_per_token"] > whole["disk_bytes_per_token"] == 0
    assert part["budget_bytes"] == beside_bytes + part["experts_bytes"] == budget_bytes
    text = " ".join(estimate(runner, config, "--format", "mxfp4", *budget).split())
    assert "10 of 32 experts" in text
    assert "If all are chosen evenly" in text
    with pytest.raises(EngineStartError, match="not enough memory"):
        estimate(runner, config, "--ram-bytes", str(reserve_bytes + 1000))


def test_estimate_of_a_served_model_and_of_a_gguf_file(runner: CliRunner, tmp_path: Path) -> None:
    source = tmp_path / "Tiny"
    source.mkdir()
    upcycle_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), source, lambda *_: None)
    assert runner.invoke(app, ["models", "convert", str(source), "--weights", "bf16"]).exit_code == 0
    report = json.loads(estimate(runner, "tiny", "--format", "bf16", "--json"))
    assert (report["model"], report["format"]) == ("tiny", "bf16")
    gguf = str(write_moe_gguf(tmp_path / "m.gguf", "olmoe"))
    assert json.loads(estimate(runner, gguf, "--format", "mxfp4", "--json"))["model"] == "m.gguf"
    assert "All experts fit in memory" in estimate(runner, gguf, "--format", "mxfp4")


def test_estimate_of_nothing(runner: CliRunner) -> None:
    with pytest.raises(ConfigError, match=r"'nope'.*olmoe-1b-7b"):
        estimate(runner, "nope")


def test_doctor(runner: CliRunner, tmp_path: Path) -> None:
    result = runner.invoke(app, ["doctor", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["estimate"] is None
    assert {"memory", "disk bandwidth", "disk latency", "GPUs"} <= {check["what"] for check in report["checks"]}
    config = str(write_config(tmp_path / "tiny.json"))
    result = runner.invoke(app, ["doctor", "--model", config, "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "What is below, and what to do:" in text
    assert "32 of 32 experts fit in memory" in text


def test_doctor_says_why_a_model_would_not_start(
    runner: CliRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__RAM_BYTES", "1000")
    config = str(write_config(tmp_path / "tiny.json"))
    result = runner.invoke(app, ["doctor", "--model", config], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "The model would not start here: not enough memory" in " ".join(result.stdout.split())
