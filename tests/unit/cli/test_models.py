"""`localmoe models`: tables, JSON, questions before deletion, and progress where there is no terminal."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from localmoe.catalog.demo import upcycle_gguf
from localmoe.cli.models import app
from localmoe.core.errors import ModelNotFoundError
from support.tiny_gguf import write_tiny_gguf


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-Mixtral"
    path.mkdir()
    upcycle_gguf(write_tiny_gguf(tmp_path / "tiny.gguf"), path, lambda *_: None)
    return path


def test_empty(home: Path) -> None:
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    assert "localmoe models build-demo" in result.stdout
    assert json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout) == []


def test_convert_list_verify_rm(home: Path, source: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(source), "--weights", "bf16"])
    assert result.exit_code == 0, result.output
    assert "localmoe serve tiny-mixtral" in result.stdout
    assert result.stderr == "writing bf16.store\n"

    assert "tiny-mixtral" in CliRunner().invoke(app, ["list"]).stdout
    (entry,) = json.loads(CliRunner().invoke(app, ["list", "--json"]).stdout)
    path = home / "models" / "tiny-mixtral"
    assert (entry["name"], entry["weights"], entry["path"]) == ("tiny-mixtral", ["bf16"], str(path))

    assert "bf16.store" in CliRunner().invoke(app, ["verify", "tiny-mixtral"]).stdout

    assert CliRunner().invoke(app, ["rm", "tiny-mixtral"], input="n\n").exit_code == 1
    assert path.exists()
    assert CliRunner().invoke(app, ["rm", "tiny-mixtral", "--yes"]).exit_code == 0
    assert not path.exists()


@pytest.mark.parametrize("command", [["verify"], ["rm", "--yes"]])
def test_unknown_model(command: list[str], home: Path) -> None:
    result = CliRunner().invoke(app, [*command, "nope"])
    assert isinstance(result.exception, ModelNotFoundError)


def test_unknown_format_names_the_known(home: Path, source: Path) -> None:
    result = CliRunner().invoke(app, ["convert", str(source), "--weights", "int3"])
    assert result.exit_code == 2
    assert "nvfp4" in result.stderr


@pytest.mark.parametrize("size", ["inf", "nan", "-inf", "1e300"])
def test_an_estimate_for_no_size_is_wrong_usage(home: Path, size: str) -> None:
    result = CliRunner().invoke(app, ["estimate", "olmoe-1b-7b", "--ram-bytes", size])
    assert result.exit_code == 2
    assert "--ram-bytes" in result.stderr
