"""What gateways that share their jobs call themselves."""

import shutil
from pathlib import Path

import pytest

from localmoe.gateway.jobs import runner_name as runner_name_module
from localmoe.gateway.jobs.runner_name import RunnerName


def name_of(path: Path) -> str:
    name = RunnerName(path)
    name.release()
    return name.name


def test_it_stays_the_same_over_restarts(tmp_path: Path) -> None:
    assert name_of(tmp_path / "runner") == name_of(tmp_path / "runner")


def test_no_two_processes_have_it_at_once(tmp_path: Path) -> None:
    first, second = RunnerName(tmp_path / "runner"), RunnerName(tmp_path / "runner")
    assert first.name != second.name
    first.release()
    assert name_of(tmp_path / "runner") == first.name


def test_a_copy_of_the_home_directory_has_another(tmp_path: Path) -> None:
    first = name_of(tmp_path / "runner")
    shutil.copy2(tmp_path / "runner", tmp_path / "copy")
    assert name_of(tmp_path / "copy") != first


@pytest.mark.parametrize("what", ["boot", "host"])
def test_a_clone_of_the_machine_has_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    first = name_of(tmp_path / "runner")
    if what == "boot":
        (tmp_path / "boot_id").write_text("another")
        monkeypatch.setattr(runner_name_module, "_BOOT_ID", tmp_path / "boot_id")
    else:
        monkeypatch.setattr("platform.node", lambda: "another")
    assert name_of(tmp_path / "runner") != first
