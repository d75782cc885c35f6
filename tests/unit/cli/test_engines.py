"""`localmoe engines`."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from localmoe.backends.environments import EngineEnvironments, InstalledEngine
from localmoe.cli import engines
from localmoe.core.errors import EngineInstallError
from support.checkpoints import write_checkpoint


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    return tmp_path


def run(*arguments: str) -> Any:
    return CliRunner().invoke(engines.app, arguments, catch_exceptions=False)


def test_the_list_says_what_is_there_and_what_it_can_serve(home: Path) -> None:
    write_checkpoint(home / "models/tiny", "mixtral")
    (home / "engines/deepspeed").mkdir(parents=True)
    rows = {row["status"]["engine"]: row for row in json.loads(run("list", "--json").stdout)}
    assert [*rows] == ["native", "vllm", "deepspeed"]
    assert [row["status"]["state"] for row in rows.values()] == ["ready", "not installed", "unfinished"]
    assert rows["native"]["status"]["version"]
    assert "AWQ" in rows["vllm"]["serves"]
    assert rows["vllm"]["models"] == ["tiny"]


def test_the_table_says_how_to_install(home: Path) -> None:
    said = run("list").stdout
    assert "localmoe engines install vllm" in said
    assert "localmoe engines install native" not in said


@pytest.mark.parametrize(("gpus", "build"), [([], "cpu"), (["a GPU"], "cuda")])
def test_the_build_is_the_machines(
    home: Path, monkeypatch: pytest.MonkeyPatch, gpus: list[Any], build: str
) -> None:
    asked = []

    def install(self: EngineEnvironments, engine: str, wanted: Any, on_progress: Any) -> InstalledEngine:
        asked.append((engine, wanted))
        on_progress("step 1", 1, 2)
        return InstalledEngine(engine=engine, build=wanted, version="1.2", torch_version="3", pins_sha256="")

    monkeypatch.setattr(engines, "find_gpus", lambda: gpus)
    monkeypatch.setattr(EngineEnvironments, "install", install)
    said = run("install", "vllm").output
    assert asked == [("vllm", build)]
    assert f"vllm 1.2 for {build}, torch 3" in said
    assert "step 1" in said


def test_an_installation_that_fails_is_an_error_of_ours(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*_: Any) -> InstalledEngine:
        raise EngineInstallError("the last lines")

    monkeypatch.setattr(EngineEnvironments, "install", install)
    with pytest.raises(EngineInstallError, match="the last lines"):
        run("install", "vllm")


def test_there_are_no_other_engines() -> None:
    assert run("install", "other").exit_code == 2
