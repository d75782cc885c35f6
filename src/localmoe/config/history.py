"""The versions of the configuration that were applied, byte for byte.

A version is a folder of its own with its files and a record. It is written under another name and renamed when it is
complete, so a version is there whole or not at all. Several processes may add versions: numbers are given under a
lock. One that was damaged since is passed over: it must not keep others from being looked at, or added.
"""

import contextlib
import fcntl
import hashlib
import logging
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from localmoe.config.atomic_files import overwrite, storage_error, sync_folder, write_new
from localmoe.core.configuration import ConfigFile, ConfigVersion, SettingChange
from localmoe.core.errors import ConfigError, VersionNotFoundError

logger = logging.getLogger(__name__)

_NUMBER = re.compile(r"\d{8}")
_RECORD = "version.json"
_UNFINISHED = ".new-"
_UNFINISHED_S = 86_400.0
"""A version that is not complete after so long was given up."""
_PATIENCE_S = 10.0
"""For which another process that adds a version is waited for."""
_LOOK_S = 0.02


class PreparedVersion:
    """A version that is on the disk, and gets its number when it is applied."""

    def __init__(self, path: Path, record: ConfigVersion) -> None:
        self.path = path
        self.record = record


class ConfigHistory:
    """Keeps versions.

    Args:
        folder: made when it is needed.
        max_versions: the oldest go when there are more.
    """

    def __init__(self, folder: Path, *, max_versions: int) -> None:
        self._folder = folder
        self.max_versions = max_versions

    def versions(self, limit: int | None = None) -> list[ConfigVersion]:
        """The latest first. Raises StorageError where they cannot be listed."""
        found = (self._readable(number) for number in reversed(self._numbers()[-limit if limit else None :]))
        return [version for version in found if version is not None]

    def version(self, number: int) -> ConfigVersion:
        """One of them.

        Raises:
            VersionNotFoundError: it is not there, or not any more.
            ConfigError: it is damaged.
        """
        try:
            data = (self._path(number) / _RECORD).read_bytes()
        except FileNotFoundError:
            numbers = self._numbers()
            there = f"there are {numbers[0]} to {numbers[-1]}" if numbers else "there are none yet"
            raise VersionNotFoundError(f"the history has no version {number}; {there}") from None
        except OSError as error:
            raise ConfigError(f"{self._path(number)} cannot be read: {error.strerror}") from error
        try:
            return msgspec.json.decode(data, type=ConfigVersion)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{self._path(number) / _RECORD} is damaged: {error}") from error

    def latest(self) -> ConfigVersion | None:
        """The one that was applied last."""
        return next(iter(self.versions(1)), None)

    def contents(self, number: int) -> dict[Path, bytes]:
        """The files of a version. Raises what `version` does."""
        found = {}
        for index, file in enumerate(self.version(number).files):
            path = self._path(number) / f"file-{index}"
            try:
                data = path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
            if hashlib.sha256(data).hexdigest() != file.sha256:
                raise ConfigError(f"{path} is damaged: its checksum is another")
            found[Path(file.path)] = data
        return found

    def prepare(
        self, files: Mapping[Path, bytes], *, author: str, reason: str, changes: Sequence[SettingChange]
    ) -> PreparedVersion:
        """Write a version, to be committed or discarded.

        Raises:
            StorageError: it cannot be written, as where the disk is full; nothing of it is left.
        """
        record = ConfigVersion(
            number=0,
            time="",
            author=author,
            reason=reason,
            changes=tuple(changes),
            files=tuple(
                ConfigFile(path=str(path), sha256=hashlib.sha256(data).hexdigest()) for path, data in files.items()
            ),
        )
        prepared = PreparedVersion(self._folder / f"{_UNFINISHED}{secrets.token_hex(8)}", record)
        try:
            with _failing(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                prepared.path.mkdir(mode=0o700)
                for index, data in enumerate(files.values()):
                    write_new(prepared.path / f"file-{index}", data)
                # Room for the record is taken now; it is written again with its number and time.
                write_new(prepared.path / _RECORD, msgspec.json.encode(record) + b" " * 64)
        except BaseException:
            self.discard(prepared)
            raise
        return prepared

    def discard(self, prepared: PreparedVersion) -> None:
        """Delete it, unless it was committed."""
        shutil.rmtree(prepared.path, ignore_errors=True)

    def commit(self, prepared: PreparedVersion) -> ConfigVersion:
        """Give it the next number. What is as the latest version is that version.

        Raises:
            StorageError: it cannot be written, or another process keeps the lock.
        """
        with _failing(self._folder), self._lock():
            latest = self.latest()
            if latest is not None and latest.files == prepared.record.files:
                self.discard(prepared)
                return latest
            number = max(self._numbers(), default=0) + 1
            record = replace(
                prepared.record, number=number, time=datetime.now(UTC).isoformat(timespec="milliseconds")
            )
            overwrite(prepared.path / _RECORD, msgspec.json.encode(record))
            prepared.path.rename(self._path(number))
            sync_folder(self._folder)
            try:
                self._prune()
            except OSError as error:  # of an older one; this one is kept
                logger.warning("old versions in %s cannot be deleted: %s", self._folder, error.strerror)
        return record

    def _prune(self) -> None:
        for number in self._numbers()[: -self.max_versions]:
            # Out of sight first, so that nobody finds half a version.
            doomed = self._folder / f"{_UNFINISHED}{secrets.token_hex(8)}"
            self._path(number).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        for path in self._folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(FileNotFoundError):  # its own process finished it
                if path.stat().st_mtime < time.time() - _UNFINISHED_S:
                    shutil.rmtree(path, ignore_errors=True)

    def _readable(self, number: int) -> ConfigVersion | None:
        """None: it is damaged, or has gone meanwhile."""
        try:
            return self.version(number)
        except VersionNotFoundError:
            return None
        except ConfigError as error:
            logger.warning("%s; it is passed over", error)
            return None

    def _numbers(self) -> list[int]:
        """Raises StorageError."""
        try:
            found = list(self._folder.iterdir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error(
                error, f"the history in {self._folder} cannot be read: {error.strerror}"
            ) from error
        return sorted(int(path.name) for path in found if _NUMBER.fullmatch(path.name))

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08}"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """Raises BlockingIOError where it is held for too long."""
        end_s = time.monotonic() + _PATIENCE_S
        with (self._folder / "lock").open("wb") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end_s:
                        raise
                time.sleep(_LOOK_S)
            yield


@contextlib.contextmanager
def _failing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"the history in {folder} cannot be written: {error.strerror}; so nothing was changed"
        raise storage_error(error, message) from error
