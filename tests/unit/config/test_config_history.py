"""Versions of the configuration: whole or not there, byte for byte, bounded."""

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.config import history as history_module
from localmoe.config.history import ConfigHistory
from localmoe.core.configuration import SettingChange
from localmoe.core.errors import ConfigError, StorageError, StorageFullError, VersionNotFoundError

FILE, OVERLAY = Path("/etc/site.yaml"), Path("/etc/site.production.yaml")


def keep(history: ConfigHistory, data: bytes, *more: bytes) -> int:
    files = dict(zip((OVERLAY, FILE), (*more, data), strict=True)) if more else {FILE: data}
    change = SettingChange(key="port", before=1, after=2)
    prepared = history.prepare(files, author="ann", reason="because", changes=[change])
    return history.commit(prepared).number


@given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_versions_are_kept_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    history = ConfigHistory(tmp_path_factory.mktemp("h") / "history", max_versions=100)
    numbers = [keep(history, data) for data in contents]
    for number, data in zip(numbers, contents, strict=True):
        assert history.contents(number) == {FILE: data}
    different = [data for at, data in enumerate(contents) if at == 0 or contents[at - 1] != data]
    assert len(history.versions()) == len(different)


def test_a_version_says_all_of_itself(tmp_path: Path) -> None:
    history = ConfigHistory(tmp_path / "history", max_versions=100)
    assert (history.versions(), history.latest()) == ([], None)
    number = keep(history, b"port: 1", b"port: 2")
    version = history.version(number)
    assert (version.number, version.author, version.reason) == (1, "ann", "because")
    assert version.changes == (SettingChange(key="port", before=1, after=2),)
    assert [file.path for file in version.files] == [str(OVERLAY), str(FILE)]
    assert history.contents(number) == {OVERLAY: b"port: 2", FILE: b"port: 1"}
    assert version.time.endswith("+00:00")
    with pytest.raises(VersionNotFoundError, match="no version 2; there are 1 to 1"):
        history.version(2)


def test_the_oldest_go_and_numbers_stay(tmp_path: Path) -> None:
    history = ConfigHistory(tmp_path, max_versions=3)
    for at in range(10):
        assert keep(history, b"%d" % at) == at + 1
    assert [version.number for version in history.versions()] == [10, 9, 8]
    assert [version.number for version in history.versions(2)] == [10, 9]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000008", "00000009", "00000010", "lock"]


def test_one_that_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    history = ConfigHistory(tmp_path, max_versions=3)
    prepared = history.prepare({FILE: b"a"}, author="", reason="", changes=())
    assert history.versions() == []
    history.discard(prepared)
    assert list(tmp_path.iterdir()) == []


def test_what_was_given_up_is_swept_away_later(tmp_path: Path) -> None:
    history = ConfigHistory(tmp_path, max_versions=3)
    old = history.prepare({FILE: b"a"}, author="", reason="", changes=()).path
    new = history.prepare({FILE: b"b"}, author="", reason="", changes=()).path
    os.utime(old, (1, 1))
    keep(history, b"c")
    assert (old.exists(), new.exists()) == (False, True)


def test_several_at_once_get_different_numbers(tmp_path: Path) -> None:
    numbers: list[int] = []

    def many(name: int) -> None:
        history = ConfigHistory(tmp_path, max_versions=1000)
        for at in range(20):
            numbers.append(keep(history, b"%d of %d" % (at, name)))  # noqa: PERF401

    threads = [threading.Thread(target=many, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 81))


def test_a_damaged_version_is_named(tmp_path: Path) -> None:
    history = ConfigHistory(tmp_path, max_versions=3)
    number = keep(history, b"a")
    (tmp_path / "00000001/file-0").write_bytes(b"b")
    with pytest.raises(ConfigError, match="file-0 is damaged"):
        history.contents(number)
    (tmp_path / "00000001/version.json").write_text("{")
    with pytest.raises(ConfigError, match=r"version\.json is damaged"):
        history.version(number)


def test_a_damaged_version_is_in_nobodys_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    history = ConfigHistory(tmp_path, max_versions=9)
    keep(history, b"a")
    keep(history, b"b")
    (tmp_path / "00000002/version.json").write_text("{")
    assert [version.number for version in history.versions()] == [1]
    assert "00000002/version.json is damaged" in caplog.text
    assert keep(history, b"b") == 3
    assert [version.number for version in history.versions()] == [3, 1]


def test_a_lock_that_another_process_keeps_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "_PATIENCE_S", 0.05)
    history = ConfigHistory(tmp_path, max_versions=9)
    keep(history, b"a")
    with (tmp_path / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="cannot be written"):
            keep(history, b"b")
    assert keep(history, b"b") == 2


def test_old_versions_that_cannot_go_do_not_undo_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    history = ConfigHistory(tmp_path, max_versions=1)
    keep(history, b"a")

    def refuse() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(history, "_prune", refuse)
    assert keep(history, b"b") == 2
    assert "cannot be deleted: Input/output error" in caplog.text


def test_on_a_full_disk_there_is_a_name_for_it_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = ConfigHistory(tmp_path, max_versions=3)
    keep(history, b"a")

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(history_module, "write_new", full)
    with pytest.raises(StorageFullError, match="cannot be written: No space left on device"):
        keep(history, b"b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "lock"]


def test_others_cannot_read_it(tmp_path: Path) -> None:
    history = ConfigHistory(tmp_path / "history", max_versions=3)
    keep(history, b"a")
    for path in (tmp_path / "history").rglob("*"):
        if path.name != "lock":
            assert path.stat().st_mode & 0o077 == 0, path
