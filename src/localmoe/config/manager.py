"""The configuration of a server that serves: read again, changed, and put back.

Every way of changing it is the same: read all of it, check it, see what differs from what is running, write it into
the history, apply what differs, and count it as applied. If anything fails, all stays as it was. One at a time.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from localmoe.config import watch
from localmoe.config.atomic_files import locked, storage_error, write_atomically
from localmoe.config.changes import (
    assignments,
    check_addressees,
    check_by_api,
    find_setting,
    leaves_under,
    setting_changes,
)
from localmoe.config.checks import Finding
from localmoe.config.editing import edited
from localmoe.config.files import read_config_bytes
from localmoe.config.history import ConfigHistory
from localmoe.config.layers import has, value_at
from localmoe.config.live import Subscriptions, effect, restart_paths, running_settings
from localmoe.config.settings import LoadedSettings, Settings, read_settings
from localmoe.core.configuration import ConfigOutcome, ConfigState, ConfigVersion, Setting, SettingChange
from localmoe.core.errors import ConfigError, ConflictError, LocalMoEError, PreconditionError, StorageError
from localmoe.core.events import ConfigReloaded, EventBus

logger = logging.getLogger(__name__)

T = TypeVar("T")

_PATIENCE_S = 30.0
"""For which a change waits for the one before it."""
_PAUSES_S = (1, 2, 5, 10, 30, 60, 120, 300, 600)
"""Between attempts to apply a changed file beside another change."""
WATCH_AUTHOR = "file watch"

ChangeModels = Callable[[Settings, Settings], Awaitable[None]]
"""(what is running, what is to be): changes which models are served, and by which engines. Raises a `LocalMoEError`
if that fails, with everything as it was."""
Examine = Callable[[Settings], Sequence[Finding]]
"""What somebody should know of settings on this machine. May take a second, and is called in a thread."""


class ConfigManager:
    """See `core.protocols.ConfigOperations`.

    Args:
        loaded: what was read at start, and is running.
        history: keeps what was applied.
        change_models: see `ChangeModels`.
        examine: see `Examine`.
        bus: gets a `ConfigReloaded` for each attempt.
    """

    def __init__(
        self,
        loaded: LoadedSettings,
        *,
        history: ConfigHistory,
        change_models: ChangeModels,
        examine: Examine,
        bus: EventBus,
    ) -> None:
        self.subscriptions = Subscriptions()
        self._source = loaded.source
        self._loaded = loaded
        self._running = loaded.settings
        self._version: int | None = None
        self._history = history
        self._change_models = change_models
        self._examine = examine
        self._bus = bus
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tried: Mapping[Path, bytes | None] = loaded.files
        """What files held when they were read last, whatever came of it."""

    @property
    def running(self) -> Settings:
        """What is in effect."""
        return self._running

    async def keep_first(self, author: str, reason: str) -> None:
        """Write what was read at start into the history. What fails is logged: it is in effect already."""
        if not self._loaded.files:
            return
        try:
            prepared = await asyncio.to_thread(
                self._history.prepare, self._loaded.files, author=author, reason=reason, changes=()
            )
            self._version = (await asyncio.to_thread(self._history.commit, prepared)).number
        except (ConfigError, StorageError) as error:
            logger.error("%s", error)

    def state(self) -> ConfigState:
        """All settings."""
        shown = self._loaded.shown()
        everything = self._setting("", (), shown)
        return ConfigState(
            version=self._version,
            files=tuple(map(str, self._loaded.files)),
            settings=shown,
            origins=everything.origins,
            restart=restart_paths(self._running, self._loaded.settings),
        )

    def setting(self, key: str) -> Setting:
        """One of them, or a block. Raises SettingNotFoundError."""
        return self._setting(key, find_setting(key), self._loaded.shown())

    async def versions(self, limit: int) -> Sequence[ConfigVersion]:
        """What was applied, the latest first. Raises StorageError."""
        return await asyncio.to_thread(self._history.versions, limit)

    async def reload(self, *, author: str, reason: str) -> ConfigOutcome:
        """Read the files again, and apply them."""
        return await self._to_the_end(self._reload(author, reason))

    async def set(
        self, key: str, value: Any, *, if_match: str | None, author: str, reason: str
    ) -> tuple[ConfigOutcome, Setting]:
        """Change a setting, or some of a block, in the configuration file, and apply it. What only files may say is
        refused."""
        path = find_setting(key)

        async def change() -> tuple[ConfigOutcome, Setting]:
            outcome = await self._change(path, value, if_match, author, reason, is_by_api=True)
            return outcome, self.setting(key)

        return await self._to_the_end(change())

    async def change(self, key: str, value: Any, *, author: str, reason: str) -> ConfigOutcome:
        """The same for whoever may write the file anyway."""
        return await self._to_the_end(
            self._change(find_setting(key), value, None, author, reason, is_by_api=False)
        )

    async def rollback(self, number: int, *, author: str, reason: str) -> ConfigOutcome:
        """Put the files of a version back, byte for byte, and apply them."""
        return await self._to_the_end(self._rollback(number, author, reason))

    async def watch(self) -> None:
        """Apply files when they change, until cancelled. What fails is logged; what was is kept."""
        poll_interval_s = self._running.configuration.poll_interval_s
        async with aclosing(
            watch.changes(lambda: list(self._loaded.files), poll_interval_s=poll_interval_s)
        ) as seen:
            async for _ in seen:
                if await asyncio.to_thread(self._read_files) != self._tried:
                    await self._reload_seen()

    async def _reload_seen(self) -> None:
        for pause_s in _PAUSES_S:
            try:
                await self.reload(author=WATCH_AUTHOR, reason="the file changed")
                return
            except ConflictError as error:  # of another change, which may take as long as a model takes to load
                logger.warning("the configuration file is read again in %d s: %s", pause_s, error)
                await asyncio.sleep(pause_s)
            except LocalMoEError:
                return  # said already
            except Exception:
                logger.exception("the configuration is kept as it was")
                return
        logger.error("the configuration file is not read again until it changes once more")

    async def _reload(self, author: str, reason: str) -> ConfigOutcome:
        async with self._change_under_way():
            self._tried = await asyncio.to_thread(self._read_files)
            candidate = await asyncio.to_thread(read_settings, self._source)
            self._check_whole(candidate)
            return await self._adopt(candidate, {}, author, reason, seen={})

    def _check_whole(self, loaded: LoadedSettings) -> None:
        """Refuse what somebody is just writing."""
        for path, data in loaded.files.items():
            if not data.strip() and self._loaded.files.get(path, b"").strip():
                raise ConfigError(f"{path} is empty, and taken for half written; write {{}} to have it empty")

    async def _change(
        self,
        path: tuple[str, ...],
        value: Any,
        if_match: str | None,
        author: str,
        reason: str,
        *,
        is_by_api: bool,
    ) -> ConfigOutcome:
        async with self._change_under_way():
            now = await asyncio.to_thread(read_settings, self._source)
            self._check_whole(now)
            if not now.files:
                raise ConflictError(
                    "there is no configuration file; name one with --config to have settings changed"
                )
            tag = _tag(value_at(now.shown(), path))
            if if_match is not None and not {"*", tag} & {one.strip() for one in if_match.split(",")}:
                raise PreconditionError(
                    f"{'.'.join(path)} is not what it was any more: its tag is {tag}; read it again"
                )
            values = assignments(path, value)
            if is_by_api:
                check_by_api(values, now)
            file = _file_for(values, now)
            data = await asyncio.to_thread(edited, now.files[file], file, values)
            candidate = await asyncio.to_thread(read_settings, self._source, {**now.files, file: data})
            if is_by_api:
                await asyncio.to_thread(check_addressees, now.settings, candidate.settings)
            for name in values:
                if (origin := candidate.origin(name)) != f"file {file}":
                    raise ConflictError(f"{'.'.join(name)} is set by {origin}, which goes before {file}")
            return await self._adopt(candidate, {file: data}, author, reason, seen=now.files)

    async def _rollback(self, number: int, author: str, reason: str) -> ConfigOutcome:
        async with self._change_under_way():
            files = await asyncio.to_thread(self._history.contents, number)
            if list(files) != list(self._loaded.files):
                raise ConflictError(
                    f"version {number} is of {_listed(files)}, and the configuration of {_listed(self._loaded.files)}"
                )
            candidate = await asyncio.to_thread(read_settings, self._source, files)
            return await self._adopt(candidate, files, author, reason, seen={})

    async def _adopt(
        self,
        candidate: LoadedSettings,
        write: Mapping[Path, bytes],
        author: str,
        reason: str,
        *,
        seen: Mapping[Path, bytes],
    ) -> ConfigOutcome:
        """Write files, keep the version, apply it. Raises LocalMoEError, with everything as it was.

        Args:
            seen: what files to be written must still hold.
        """
        changes = setting_changes(self._loaded, candidate)
        running = running_settings(self._running, candidate.settings)
        if not changes and candidate.files == self._loaded.files and not write:
            return self._outcome((), candidate, ())
        findings = await asyncio.to_thread(self._examine, candidate.settings) if changes else ()
        self._history.max_versions = candidate.settings.configuration.max_versions
        prepared = await asyncio.to_thread(
            self._history.prepare, candidate.files, author=author, reason=reason, changes=changes
        )
        before: dict[Path, bytes | None] = {}
        tried, self._tried = self._tried, candidate.files
        try:
            before = await asyncio.to_thread(_write_files, write, seen)
            await self._apply(self._running, running)
            try:
                version = await asyncio.to_thread(self._history.commit, prepared)
            except StorageError:
                await self._apply(running, self._running)
                raise
        except BaseException:
            await asyncio.to_thread(_undo, before, write)
            self._tried = tried if write else candidate.files
            await asyncio.to_thread(self._history.discard, prepared)
            raise
        self._loaded, self._running, self._version = candidate, running, version.number
        for note in candidate.notes:
            logger.info("%s", note)
        logger.info("configuration version %d is in effect (%s): %s", version.number, author, _summary(changes))
        return self._outcome(changes, candidate, findings)

    async def _apply(self, before: Settings, after: Settings) -> None:
        await self._change_models(before, after)
        try:
            self.subscriptions.announce(before, after)
        except Exception:
            await self._change_models(after, before)
            raise

    def _outcome(
        self, changes: Sequence[SettingChange], candidate: LoadedSettings, findings: Sequence[Finding]
    ) -> ConfigOutcome:
        return ConfigOutcome(
            version=self._version,
            changes=tuple(changes),
            restart=restart_paths(self._running, candidate.settings),
            notes=tuple(candidate.notes),
            findings=tuple(map(str, findings)),
        )

    def _setting(self, key: str, path: tuple[str, ...], shown: Mapping[str, Any]) -> Setting:
        value = value_at(shown, path)
        inner = leaves_under(path)
        return Setting(
            key=key,
            value=value,
            origins={".".join(leaf): self._loaded.origin(leaf) for leaf in inner},
            effects={".".join(leaf): effect(leaf) for leaf in inner},
            etag=_tag(value),
        )

    def _read_files(self) -> dict[Path, bytes | None]:
        return {path: _read(path) for path in self._loaded.files}

    @asynccontextmanager
    async def _change_under_way(self) -> AsyncIterator[None]:
        """One at a time; says how each went."""
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._changing.acquire()
        except TimeoutError:
            raise ConflictError("the configuration is being changed; wait until that is done") from None
        try:
            yield
        except PreconditionError:
            raise
        except BaseException as error:
            if isinstance(error, LocalMoEError):  # others are not raised on purpose, and end elsewhere in the log
                logger.error("the configuration is kept as it was: %s", error)
            self._bus.publish(ConfigReloaded(is_applied=False, version=self._version))
            raise
        else:
            self._bus.publish(ConfigReloaded(is_applied=True, version=self._version))
        finally:
            self._changing.release()

    async def _to_the_end(self, change: Coroutine[Any, Any, T]) -> T:
        """A change that has begun is finished, whether or not its client waits for it."""
        task = asyncio.create_task(change)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


def _tag(value: Any) -> str:
    """An entity tag, as HTTP has them."""
    return f'"{hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]}"'


def _file_for(names: Iterable[tuple[str, ...]], loaded: LoadedSettings) -> Path:
    """The file that sets one of these; where none does, the one that the others are laid over."""
    files = [layer for layer in loaded.layers if layer.file is not None]
    found = next((layer.file for layer in files if any(has(layer.values, name) for name in names)), None)
    return found or list(loaded.files)[-1]


def _write_files(files: Mapping[Path, bytes], seen: Mapping[Path, bytes]) -> dict[Path, bytes | None]:
    """What they held before.

    Args:
        seen: what they must still hold, so that nobody's work is lost.

    Raises:
        StorageError: they cannot be written; all is as it was.
        ConflictError: somebody has written one meanwhile; likewise.
    """
    before: dict[Path, bytes | None] = {}
    with locked(path.parent for path in files):
        for path, data in files.items():
            try:
                old = path.read_bytes() if path.exists() else None
                if path in seen and old != seen[path]:
                    raise ConflictError(f"{path} was changed meanwhile; try again")
                write_atomically(path, data)
            except (OSError, ConflictError) as error:
                _put_back(before, files)
                if isinstance(error, ConflictError):
                    raise
                message = f"{path} cannot be written: {error.strerror}; nothing was changed"
                raise storage_error(error, message) from error
            before[path] = old
    return before


def _undo(files: Mapping[Path, bytes | None], written: Mapping[Path, bytes]) -> None:
    with locked(path.parent for path in files):
        _put_back(files, written)


def _put_back(files: Mapping[Path, bytes | None], written: Mapping[Path, bytes]) -> None:
    """Undo what was written, unless somebody has written something else since."""
    for path, data in files.items():
        try:
            if _read(path) != written[path]:
                logger.warning("%s was changed meanwhile, and is left as it is", path)
            elif data is None:
                path.unlink()
            else:
                write_atomically(path, data)
        except OSError as error:
            logger.error("%s cannot be put back as it was: %s", path, error.strerror)


def _read(path: Path) -> bytes | None:
    """None where it cannot be."""
    try:
        return read_config_bytes(path)
    except ConfigError:
        return None


def _listed(files: Iterable[Path]) -> str:
    return " and ".join(map(str, files)) or "no file"


def _summary(changes: Sequence[SettingChange]) -> str:
    return ", ".join(change.key for change in changes) or "no setting differs"
