"""`localmoe bench`: JSON alone on standard output, and errors that say what to do."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localmoe.cli.main import app
from localmoe.core.errors import ConfigError, EngineStartError
from localmoe.core.model import ModelShape
from localmoe.kernels.base import Kernels
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


def test_kernels_measures_those_that_are_named(runner: CliRunner, tmp_path: Path) -> None:
    from localmoe.bench.kernels import KernelReport

    asked: dict[str, object] = {}

    def measure(
        shape: ModelShape, kernels: Kernels, num_threads: int, say: object, *, only: object
    ) -> KernelReport:
        asked.update(shape=shape.num_experts, level=kernels.level, num_threads=num_threads, only=only)
        return KernelReport(machine="m", level="avx2", threads=3, read_bandwidth_gb_s=1.0, kernels=[])

    arguments = [
        "--kernels",
        "moe, head",
        "--shape",
        "qwen3-30b-a3b",
        "--threads",
        "3",
        "--level",
        "avx2",
        "--json",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("localmoe.bench.kernels.measure_kernels", measure)
        result = runner.invoke(app, ["bench", "kernels", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert asked == {"shape": 128, "level": "avx2", "num_threads": 3, "only": {"moe", "head"}}
    assert json.loads(result.stdout)["threads"] == 3


def test_wrong_usage(runner: CliRunner, tmp_path: Path) -> None:
    for arguments in (["--streams", "1,x"], ["--streams", "0"], ["--streams", ""], ["--format", "f32"]):
        result = runner.invoke(app, ["bench", "engine", *arguments])
        assert result.exit_code == 2
        assert arguments[0] in result.output
    result = runner.invoke(app, ["bench", "kernels", "--kernels", "moe,mo"])
    assert (result.exit_code, "'mo' is none of" in result.output) == (2, True)
    gguf = str(write_moe_gguf(tmp_path / "m.gguf", "olmoe"))
    with pytest.raises(ConfigError, match="taken as they are, mxfp4"):
        runner.invoke(
            app,
            ["bench", "engine", "--shape", gguf, "--format", "int8", "--prompt-tokens", "8"],
            catch_exceptions=False,
        )
    with pytest.raises(EngineStartError, match="cpu_level is 'sse'"):
        runner.invoke(app, ["bench", "engine", "--level", "sse"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="only the C"):
        runner.invoke(app, ["bench", "kernels", "--level", "reference"], catch_exceptions=False)


@pytest.mark.parametrize(
    "wrong",
    [["--ram-bytes", "inf"], ["--ram-bytes", "nan"], ["--ram-bytes", "1e300"], ["--gpu-bytes", "-1"]],
)
def test_tiers_of_no_size_are_wrong_usage(runner: CliRunner, wrong: list[str]) -> None:
    result = runner.invoke(app, ["bench", "tiers", *wrong])
    assert result.exit_code == 2
    assert wrong[0] in result.stderr
