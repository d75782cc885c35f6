"""`localmoe bench`: JSON alone on standard output, and errors that say what to do."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localmoe.cli.main import app
from localmoe.core.errors import ConfigError, EngineStartError
from support.bench_models import write_config, write_moe_gguf

pytest.importorskip("localmoe._cpu")


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("localmoe.bench.engine.read_bandwidth_bytes_s", lambda num_threads, num_bytes: 1e10)
    return CliRunner()


def test_engine_prints_one_json_object(runner: CliRunner, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "tiny.json"))
    arguments = [
        "--shape",
        config,
        "--format",
        "nvfp4",
        "--threads",
        "2",
        "--streams",
        "4, 2",
        "--prompt-tokens",
        "20",
    ]
    result = runner.invoke(app, ["bench", "engine", *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["shape"], report["format"], report["threads"]) == ("tiny", "nvfp4", 2)
    assert report["read_bandwidth_gb_s"] == 10
    assert report["prompt_tokens"] == 20
    for field in ("aggregate_tok_s", "distinct_experts", "step_bytes", "read_gb_s", "roof_fraction"):
        assert list(report[field]) == ["1", "2", "4"]
    assert "tiny-nvfp4.store" in result.stderr.replace("\n", "")


def test_engine_prints_a_table(runner: CliRunner, tmp_path: Path) -> None:
    source = str(write_moe_gguf(tmp_path / "m.gguf", "olmoe"))
    arguments = ["--shape", source, "--threads", "1", "--level", "avx2", "--streams", "1", "--prompt-tokens", "8"]
    result = runner.invoke(app, ["bench", "engine", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "m.gguf, mxfp4" in result.stdout
    assert "avx2, 1 threads" in result.stdout


def test_wrong_usage(runner: CliRunner, tmp_path: Path) -> None:
    for arguments in (["--streams", "1,x"], ["--streams", "0"], ["--streams", ""], ["--format", "f32"]):
        result = runner.invoke(app, ["bench", "engine", *arguments])
        assert result.exit_code == 2
        assert arguments[0] in result.output
    gguf = str(write_moe_gguf(tmp_path / "m.gguf", "olmoe"))
    with pytest.raises(ConfigError, match="taken as they are: mxfp4"):
        runner.invoke(app, ["bench", "engine", "--shape", gguf, "--format", "int8"], catch_exceptions=False)
    with pytest.raises(EngineStartError, match="cpu_level is 'sse'"):
        runner.invoke(app, ["bench", "engine", "--level", "sse"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="only the C"):
        runner.invoke(app, ["bench", "kernels", "--level", "reference"], catch_exceptions=False)
