"""Directories of weights on disk, which workers that were killed leave behind."""

import fcntl
import os
from pathlib import Path

import pytest

from localmoe.backends.deepspeed_worker import ranks
from localmoe.backends.deepspeed_worker.ranks import Scratch
from localmoe.core.errors import EngineStartError


def left(folder: Path, name: str, *, has_lock: bool) -> Path:
    """What a worker left that was killed."""
    path = folder / f"localmoe-deepspeed-{name}"
    (path / "zero").mkdir(parents=True)
    (path / "zero" / "weights").write_bytes(b"x")
    if has_lock:
        (path / "lock").touch()
    return path


def age(path: Path) -> None:
    os.utime(path, (0, 0))


def test_what_others_left_is_removed_and_what_they_use_is_not(tmp_path: Path) -> None:
    whole, torn, new, used = (
        left(tmp_path, name, has_lock=name in ("whole", "used")) for name in ("whole", "torn", "new", "used")
    )
    age(torn)  # its lock went before the rest did
    age(used)
    with (used / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        scratch = Scratch(str(tmp_path))
    assert scratch.path is not None
    assert {path.name for path in tmp_path.iterdir()} == {new.name, used.name, Path(scratch.path).name}
    assert not whole.exists()
    assert (used / "zero" / "weights").exists()
    scratch.remove()
    assert not Path(scratch.path).exists()


def test_the_lock_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is killed meanwhile leaves what the next one can tell from what is used."""
    scratch = Scratch(str(tmp_path))
    assert scratch.path is not None
    path = Path(scratch.path)
    (path / "zero").mkdir()
    (path / "plain").touch()
    states: list[list[str]] = []
    remove_tree = ranks.shutil.rmtree

    def watched(folder: Path, **options: bool) -> None:
        states.append(sorted(entry.name for entry in path.iterdir()))
        remove_tree(folder, **options)

    monkeypatch.setattr(ranks.shutil, "rmtree", watched)
    scratch.remove()
    assert all("lock" in names for names in states)
    assert states[-1] == ["lock"]
    assert not path.exists()


def test_where_there_can_be_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError, match="nvme_path"):
        Scratch(str(tmp_path / "nowhere"))
