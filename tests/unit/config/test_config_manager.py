"""Reloads, changes and rollbacks: all or nothing, whatever happens to files and disks meanwhile."""

import asyncio
import errno
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from watchfiles import awatch

from localmoe.config import atomic_files, watch
from localmoe.config import manager as manager_module
from localmoe.config.checks import Finding
from localmoe.config.editing import edited
from localmoe.config.history import ConfigHistory
from localmoe.config.manager import ConfigManager
from localmoe.config.settings import ConfigSource, Settings, read_settings
from localmoe.core.errors import (
    ConfigError,
    ConflictError,
    EngineStartError,
    PreconditionError,
    SettingNotFoundError,
    StorageFullError,
    VersionNotFoundError,
)
from localmoe.core.events import ConfigReloaded, Event, EventBus

TEXT = "# ours\nport: 1\ngateway:\n  max_choices: 5  # few\nmodels: [{model: a}]\n"
BY = {"author": "ann", "reason": "because"}


class Site:
    """A configuration file, and a manager of it."""

    def __init__(
        self, folder: Path, text: str = TEXT, *, poll_interval_s: float | None = None, env: str | None = None
    ) -> None:
        self.file = folder / "site.yaml"
        if not self.file.is_symlink():
            self.file.write_text(text)
        self.events: list[Event] = []
        self.asked: list[tuple[Settings, Settings]] = []
        self.failure: Exception | None = None
        self.findings = [Finding(kind="advice", model=None, message="think again")]
        bus = EventBus()
        bus.subscribe(self.events.append)
        flags: dict[tuple[str, ...], Any] = {}
        if poll_interval_s is not None:
            flags["configuration", "poll_interval_s"] = poll_interval_s
        source = ConfigSource(config=self.file, env=env, flags=flags)
        self.history = ConfigHistory(folder / "home" / "config-history", max_versions=1000)
        self.manager = ConfigManager(
            read_settings(source),
            history=self.history,
            change_models=self._change_models,
            examine=lambda settings: self.findings,
            bus=bus,
        )

    async def _change_models(self, before: Settings, after: Settings) -> None:
        self.asked.append((before, after))
        if self.failure is not None and before.models != after.models:
            raise self.failure

    @property
    def max_choices(self) -> int:
        return self.manager.running.gateway.max_choices

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what others do."""
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110 - it happens in threads
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.manager.watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


def nested_lists(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def everything_in(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


async def test_a_reload_applies_what_differs(site: Site) -> None:
    seen: list[int] = []
    site.manager.subscriptions.subscribe(lambda settings: settings.gateway.max_choices, seen.append)
    await site.manager.keep_first("ann", "start")
    site.file.write_text("port: 2\ngateway: {max_choices: 7}\nmodels: [{model: a}]\n")
    outcome = await site.manager.reload(**BY)
    assert (outcome.version, outcome.restart) == (2, ("port",))
    assert [(change.key, change.before, change.after) for change in outcome.changes] == [
        ("port", 1, 2),
        ("gateway.max_choices", 5, 7),
    ]
    assert (seen, site.manager.running.port) == ([7], 1)
    assert site.manager.state().restart == ("port",)
    (version, first) = await site.manager.versions(10)
    assert (version.number, version.author, version.reason, version.changes) == (
        2,
        "ann",
        "because",
        outcome.changes,
    )
    assert (first.reason, site.history.contents(1)) == ("start", {site.file: TEXT.encode()})
    assert site.events == [ConfigReloaded(is_applied=True, version=2)]


async def test_nothing_new_is_no_version_and_a_comment_is_one(site: Site) -> None:
    await site.manager.keep_first("ann", "start")
    assert (await site.manager.reload(**BY)).version == 1
    site.file.write_text(TEXT + "# another comment\n")
    outcome = await site.manager.reload(**BY)
    assert (outcome.version, outcome.changes) == (2, ())
    assert len(site.asked) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port: [", "is not YAML"),
        ("prot: 1", "'prot' is not a setting"),
        ("port: 99999", "less than or equal to 65535"),
        ("", "is empty, and taken for half written"),
        (None, "No such file"),
        (
            "models: [{model: a, engines: [{engine: vllm, settings: {dtype: x}}]}]",
            "'models.0.engines.0.settings.dtype'",
        ),
    ],
)
async def test_what_is_wrong_is_named_and_all_stays(site: Site, text: str | None, said: str) -> None:
    await site.manager.keep_first("ann", "start")
    running = site.manager.running
    site.file.unlink()
    if text is not None:
        site.file.write_text(text)
    with pytest.raises(ConfigError, match=said.replace("[", r"\[")):
        await site.manager.reload(**BY)
    assert site.manager.running is running
    assert site.events == [ConfigReloaded(is_applied=False, version=1)]
    assert len(site.history.versions()) == 1
    site.file.write_text(TEXT)
    assert (await site.manager.reload(**BY)).changes == ()


async def test_a_file_that_is_being_written_is_not_changed(site: Site) -> None:
    await site.manager.keep_first("ann", "start")
    site.file.write_text("")
    with pytest.raises(ConfigError, match="half written"):
        await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    assert site.file.read_text() == ""
    assert len(site.history.versions()) == 1


async def test_models_that_cannot_be_changed_leave_all_as_it_was(site: Site) -> None:
    seen: list[int] = []
    site.manager.subscriptions.subscribe(lambda settings: settings.gateway.max_choices, seen.append)
    site.failure = EngineStartError("no memory")
    site.file.write_text("gateway: {max_choices: 7}\nmodels: [{model: b}]\n")
    with pytest.raises(EngineStartError):
        await site.manager.reload(**BY)
    assert (seen, site.max_choices, site.history.versions()) == ([], 5, [])
    assert list((site.file.parent / "home/config-history").iterdir()) == []


async def test_a_component_that_cannot_take_it_has_models_changed_back(site: Site) -> None:
    def refuse(_: int) -> None:
        raise RuntimeError("a fault")

    site.manager.subscriptions.subscribe(lambda settings: settings.gateway.max_choices, lambda _: None)
    site.manager.subscriptions.subscribe(lambda settings: settings.models, lambda _: None)
    site.file.write_text("models: [{model: b}]\ngateway: {max_choices: 5}\n")
    await site.manager.reload(**BY)
    calls: list[int] = []

    def once(value: int) -> None:
        calls.append(value)
        if value == 9:
            refuse(value)

    site.manager.subscriptions.subscribe(lambda settings: settings.gateway.max_choices, once)
    site.file.write_text("models: [{model: c}]\ngateway: {max_choices: 9}\n")
    with pytest.raises(RuntimeError, match="a fault"):
        await site.manager.reload(**BY)
    assert calls == [9, 5]
    assert [after.models[0].model for _, after in site.asked] == ["b", "c", "b"]
    assert site.max_choices == 5


async def test_a_change_keeps_comments_and_is_applied(site: Site) -> None:
    before = site.manager.setting("gateway.max_choices")
    outcome, made = await site.manager.set("gateway.max_choices", 8, if_match=before.etag, **BY)
    assert (site.max_choices, made.value, outcome.version) == (8, 8, 1)
    assert site.file.read_text() == TEXT.replace("max_choices: 5", "max_choices: 8")
    assert made.origins == {"gateway.max_choices": f"file {site.file}"}
    assert made.effects == {"gateway.max_choices": "live"}
    with pytest.raises(PreconditionError, match="not what it was any more"):
        await site.manager.set("gateway.max_choices", 9, if_match=before.etag, **BY)
    assert site.max_choices == 8
    await site.manager.set("gateway.max_choices", 9, if_match="*", **BY)
    await site.manager.set("gateway", {"max_choices": 10, "keepalive_s": 3}, if_match=None, **BY)
    assert (site.max_choices, site.manager.running.gateway.keepalive_s) == (10, 3)
    assert "# few" in site.file.read_text()


async def test_a_change_that_is_wrong_leaves_the_file_as_it_is(site: Site) -> None:
    for key, value, said in (
        ("gateway.max_choices", 0, "must be positive"),
        ("gateway.max_choices", "many", "valid integer"),
        ("gateway", {"max_choice": 3}, "did you mean"),
        ("gateway", 3, "is a block of settings"),
        ("gateway", {}, "is a block of settings"),
        ("gateway", {"max_choices": 3, "limits": None}, r"gateway\.limits is a block of settings"),
        ("host", "\udc80", "text in it that is not Unicode"),
        ("gateway.max_choices", 2**63, "an integer of more than 64 bits"),
        ("models", nested_lists(5000), "is nested too deeply"),
        ("models", [{"model": "a", "engines": [{"engine": [], "settings": {}}]}], "engines of kind"),
        ("config", "other.yaml", "is not set in one"),
    ):
        with pytest.raises(ConfigError, match=said):
            await site.manager.set(key, value, if_match=None, **BY)
    with pytest.raises(SettingNotFoundError, match=r"did you mean 'gateway\.max_choices'"):
        site.manager.setting("gateway.max_choice")
    site.failure = EngineStartError("no memory")
    with pytest.raises(EngineStartError):
        await site.manager.set("models", [{"model": "b"}], if_match=None, **BY)
    assert site.file.read_text() == TEXT
    assert site.history.versions() == []


async def test_a_change_that_would_have_no_effect_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_GATEWAY__MAX_CHOICES", "3")
    with pytest.raises(
        ConflictError, match="is set by environment variable LOCALMOE_GATEWAY__MAX_CHOICES, which goes"
    ):
        await site.manager.set("gateway.max_choices", 4, if_match=None, **BY)
    assert site.file.read_text() == TEXT


async def test_a_change_goes_into_the_overlay_that_sets_it(tmp_path: Path) -> None:
    overlay = tmp_path / "site.production.yaml"
    overlay.write_text("gateway: {max_choices: 6}\n")
    site = Site(tmp_path, env="production")
    await site.manager.set("gateway.max_choices", 7, if_match=None, **BY)
    await site.manager.set("gateway.keepalive_s", 4, if_match=None, **BY)
    assert overlay.read_text() == "gateway: {max_choices: 7}\n"
    assert "keepalive_s: 4" in site.file.read_text()
    await site.manager.rollback(1, **BY)
    assert site.manager.running.gateway.keepalive_s == 15
    assert site.file.read_text() == TEXT


async def test_two_changes_at_once_are_both_made_or_one_is_refused(site: Site) -> None:
    tag = site.manager.setting("gateway.max_choices").etag
    both = await asyncio.gather(
        site.manager.set("gateway.max_choices", 11, if_match=tag, **BY),
        site.manager.set("gateway.max_choices", 12, if_match=tag, **BY),
        site.manager.set("gateway.keepalive_s", 5, if_match=None, **BY),
        return_exceptions=True,
    )
    assert [type(one) for one in both[:2]].count(PreconditionError) == 1
    assert site.max_choices in (11, 12)
    assert site.manager.running.gateway.keepalive_s == 5
    assert read_settings(ConfigSource(config=site.file)).settings.gateway.max_choices == site.max_choices
    assert len(site.history.versions()) == 2


async def test_of_two_processes_changes_none_is_lost(tmp_path: Path) -> None:
    """Both have read the file before either writes it."""
    first, second = Site(tmp_path), Site(tmp_path)
    both = await asyncio.gather(
        first.manager.change("gateway.max_choices", 11, **BY),
        second.manager.change("gateway.keepalive_s", 5, **BY),
        return_exceptions=True,
    )
    now = read_settings(ConfigSource(config=first.file)).settings.gateway
    made = [not isinstance(one, BaseException) for one in both]
    assert made == [now.max_choices == 11, now.keepalive_s == 5]
    assert any(made)


async def test_what_rules_the_machine_is_in_files_only(site: Site) -> None:
    for key, value in (
        ("home", "/tmp"),
        ("engine.routing_trace", "/etc/passwd"),
        ("engine", {"routing_trace": "/etc/passwd"}),
        ("vllm.trust_remote_code", True),
        ("engine.tiers", {"stripes": ["/etc"]}),
        ("state.database_url", "sqlite:////etc/new"),
        ("ray.address", "elsewhere:6379"),
        ("models", [{"model": "a", "engines": [{"settings": {"tiers": {"stripes": ["/etc"]}}}]}]),
        ("models", [{"model": "a", "chat_template": "/etc/passwd"}]),
        ("models", [{"model": "a", "adapters": {"b": "/etc"}}]),
        ("other_engines", {"mine": {"run": "rm"}}),
        ("models", [{"model": "a", "engines": [{"engine": "vllm", "settings": {"trust_remote_code": True}}]}]),
        ("models", [{"model": "a", "engines": [{"engine": "mine"}]}]),
    ):
        with pytest.raises(ConfigError, match="in the configuration file only"):
            await site.manager.set(key, value, if_match=None, **BY)
    remote = {"engine": "remote", "settings": {"url": "http://a/v1", "api_key": "file:/etc/shadow"}}
    with pytest.raises(ConfigError, match="refers to a secret that models does not have yet"):
        await site.manager.set("models", [{"model": "a", "engines": [remote]}], if_match=None, **BY)
    with pytest.raises(ConfigError, match="refers to a secret"):
        await site.manager.set("vllm", {"url": "file:/etc/hostname"}, if_match=None, **BY)
    assert site.file.read_text() == TEXT


async def test_references_that_are_there_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cr3t")
    remote = {"engine": "remote", "settings": {"url": "http://a/v1", "api_key": "env:SOME_KEY"}}
    site = Site(
        tmp_path,
        "models:\n- model: a\n  engines:\n"
        "  - {engine: remote, settings: {url: 'http://a/v1', api_key: 'env:SOME_KEY'}}\n",
    )
    shown = site.manager.setting("models").value
    assert "s3cr3t" not in str(shown)
    outcome, _ = await site.manager.set("models", [{"model": "b", "engines": [remote]}], if_match=None, **BY)
    assert "s3cr3t" not in str(outcome)
    assert "s3cr3t" not in everything_in(tmp_path)
    assert site.manager.running.models[0].engines[0].settings["api_key"] == "s3cr3t"


KEYS = """\
vllm: {url: 'http://mine:1', api_key: 'env:SOME_KEY'}
gateway: {identity: {tokens: {secret: 'env:TOKEN_SECRET'}}}
models:
- {model: a, engines: [{engine: vllm}]}
- {model: b, engines: [{engine: remote, settings: {url: 'http://yours/v1', api_key: 'env:OTHER_KEY'}}]}
"""


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("vllm.url", "http://evil:1", "would be sent to http://evil:1"),
        ("vllm.url", "env:TOKEN_SECRET", r"refers to a secret that vllm\.url does not have"),
        ("vllm.api_key", "env:OTHER_KEY", r"refers to a secret that vllm\.api_key does not have"),
        (
            "models",
            [{"model": "a", "engines": [{"engine": "vllm", "settings": {"url": "http://evil:1"}}]}],
            "would be sent to http://evil:1",
        ),
        (
            "models",
            [
                {
                    "model": "b",
                    "engines": [
                        {"engine": "remote", "settings": {"url": "http://evil/v1", "api_key": "env:OTHER_KEY"}}
                    ],
                }
            ],
            "would be sent to http://evil/v1",
        ),
        (
            "models",
            [{"model": "a", "engines": [{"engine": "vllm", "settings": {"api_key": "env:TOKEN_SECRET"}}]}],
            "refers to a secret that models does not have",
        ),
    ],
)
async def test_a_client_of_the_api_cannot_have_a_secret_sent_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, said: str
) -> None:
    for name in ("SOME_KEY", "OTHER_KEY", "TOKEN_SECRET"):
        monkeypatch.setenv(name, f"s3cr3t-{name}-of-32-bytes-or-more")
    site = Site(tmp_path, KEYS)
    with pytest.raises(ConfigError, match=said) as raised:
        await site.manager.set(key, value, if_match=None, **BY)
    assert "s3cr3t" not in str(raised.value)
    assert site.file.read_text() == KEYS
    await site.manager.set("vllm.max_num_seqs", 3, if_match=None, **BY)  # all else may change


async def test_nor_by_an_engine_that_may_be_loaded_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cr3t")
    site = Site(tmp_path, "vllm: {url: 'http://mine:1', api_key: 'env:SOME_KEY'}\n")
    with pytest.raises(ConfigError, match="would be sent to http://evil:1"):
        await site.manager.set("vllm.url", "http://evil:1", if_match=None, **BY)


async def test_what_somebody_writes_meanwhile_is_not_lost(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = TEXT + "# theirs\n"

    def slow(data: bytes, path: Path, changes: Any) -> bytes:
        site.file.write_text(theirs)
        return edited(data, path, changes)

    monkeypatch.setattr(manager_module, "edited", slow)
    with pytest.raises(ConflictError, match="was changed meanwhile; try again"):
        await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    assert (site.file.read_text(), site.max_choices) == (theirs, 5)
    monkeypatch.undo()
    theirs += "# and more\n"

    async def slow_to_fail(before: Settings, after: Settings) -> None:
        site.file.write_text(theirs)
        raise EngineStartError("no memory")

    monkeypatch.setattr(site.manager, "_change_models", slow_to_fail)
    with pytest.raises(EngineStartError):
        await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    assert (site.file.read_text(), site.max_choices) == (theirs, 5)


async def test_an_outcome_says_what_somebody_should_know(site: Site) -> None:
    outcome, _ = await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    assert outcome.findings == ("advice: think again",)
    assert (await site.manager.reload(**BY)).findings == ()


async def test_one_of_several_tags_is_enough(site: Site) -> None:
    tag = site.manager.setting("gateway.max_choices").etag
    await site.manager.set("gateway.max_choices", 8, if_match=f'"other", {tag}', **BY)
    with pytest.raises(PreconditionError):
        await site.manager.set("gateway.max_choices", 9, if_match=f'"other", {tag}', **BY)


async def test_a_block_of_names_is_replaced_as_a_whole(tmp_path: Path) -> None:
    site = Site(tmp_path, "gateway: {identity: {tokens: {roles: {a: user, b: admin}}}}\n")
    await site.manager.set("gateway.identity.tokens.roles", {"c": "viewer"}, if_match=None, **BY)
    assert site.file.read_text() == 'gateway: {identity: {tokens: {roles: {"c": "viewer"}}}}\n'


async def test_why_it_failed_is_in_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.file.write_text("prot: 1")
    with pytest.raises(ConfigError):
        await site.manager.reload(**BY)
    assert "the configuration is kept as it was" in caplog.text
    assert "did you mean 'port'" in caplog.text


async def test_rollback_is_byte_for_byte(site: Site) -> None:
    await site.manager.keep_first("ann", "start")
    texts = [TEXT.encode(), b"port: 1\r\ngateway: {max_choices: 6}\r\n", "# ü\ngateway: {max_choices: 7}".encode()]
    for text in texts[1:]:
        site.file.write_bytes(text)
        await site.manager.reload(**BY)
    for number, text in reversed(list(enumerate(texts, 1))):
        outcome = await site.manager.rollback(number, **BY)
        assert site.file.read_bytes() == text
        assert site.history.contents(outcome.version or 0) == {site.file: text}
    assert site.max_choices == 5
    with pytest.raises(VersionNotFoundError):
        await site.manager.rollback(99, **BY)


async def test_rollback_mends_a_file_that_is_broken_or_gone(site: Site) -> None:
    await site.manager.keep_first("ann", "start")
    site.file.write_text("port: [")
    assert (await site.manager.rollback(1, **BY)).changes == ()
    assert site.file.read_text() == TEXT
    site.file.unlink()
    await site.manager.rollback(1, **BY)
    assert site.file.read_text() == TEXT


async def test_a_version_of_another_file_is_not_put_back(site: Site) -> None:
    prepared = site.history.prepare({Path("/etc/other.yaml"): b"port: 5"}, author="", reason="", changes=())
    site.history.commit(prepared)
    with pytest.raises(ConflictError, match=r"version 1 is of /etc/other\.yaml"):
        await site.manager.rollback(1, **BY)


async def test_on_a_full_disk_nothing_changes(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.manager.keep_first("ann", "start")
    real = atomic_files.write_new

    def full(path: Path, data: bytes) -> None:
        real(path, data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic_files, "write_new", full)
    with pytest.raises(StorageFullError, match="cannot be written: No space left on device; nothing was changed"):
        await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    monkeypatch.setattr("localmoe.config.history.write_new", full)
    with pytest.raises(StorageFullError, match=r"the history in .* cannot be written: No space left"):
        await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    assert (site.max_choices, site.file.read_text(), len(site.history.versions())) == (5, TEXT, 1)
    assert sorted(path.name for path in site.file.parent.iterdir()) == ["home", "site.yaml"]
    site.file.write_text(TEXT.replace("5", "8"))
    with pytest.raises(StorageFullError, match="No space left"):
        await site.manager.reload(**BY)
    assert site.max_choices == 5
    monkeypatch.undo()
    assert (await site.manager.reload(**BY)).version == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounts need root, and are not allowed everywhere")
    yield folder
    subprocess.run(["umount", folder], check=True)


async def test_a_disk_that_fills_up_damages_nothing(small_disk: Path) -> None:
    site = Site(small_disk)
    await site.manager.keep_first("ann", "start")
    written = [TEXT]

    async def fill() -> None:
        for value in range(6, 200):
            await site.manager.set("gateway.max_choices", value, if_match=None, **BY)
            written.append(site.file.read_text())

    with pytest.raises(StorageFullError, match="No space left on device"):
        await fill()
    assert site.file.read_text() == written[-1]
    assert site.max_choices == 4 + len(written)
    versions = site.history.versions()
    assert [version.number for version in versions] == list(range(len(versions), 0, -1))
    assert site.history.contents(len(versions)) == {site.file: written[-1].encode()}
    assert [name for name in os.listdir(small_disk / "home/config-history") if name.startswith(".")] == []


async def test_another_change_is_waited_for_but_not_for_ever(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    release = asyncio.Event()

    async def slow(before: Settings, after: Settings) -> None:
        await release.wait()

    monkeypatch.setattr(site.manager, "_change_models", slow)
    monkeypatch.setattr(manager_module, "_PATIENCE_S", 0.05)
    site.file.write_text("models: [{model: b}]\n")
    first = asyncio.create_task(site.manager.reload(**BY))
    await site.until(site.manager._changing.locked)
    with pytest.raises(ConflictError, match="is being changed"):
        await site.manager.set("gateway.max_choices", 8, if_match=None, **BY)
    first.cancel()  # a client that leaves
    release.set()
    await site.until(lambda: site.manager.running.models[0].model == "b")


@pytest.mark.parametrize("poll_interval_s", [None, 0.05])
async def test_the_watch_sees_changes(tmp_path: Path, poll_interval_s: float | None) -> None:
    site = Site(tmp_path, poll_interval_s=poll_interval_s)
    async with site.watching():
        site.file.write_text(TEXT.replace("5", "6"))
        await site.until(lambda: site.max_choices == 6)
        new = site.file.with_suffix(".new")
        new.write_text(TEXT.replace("5", "7"))
        new.replace(site.file)
        await site.until(lambda: site.max_choices == 7)
        site.file.write_text("port: [")
        await site.until(lambda: site.events[-1:] == [ConfigReloaded(is_applied=False, version=2)])
        site.file.unlink()
        await site.until(lambda: len(site.events) == 4)
        site.file.write_text(TEXT.replace("5", "8"))
        await site.until(lambda: site.max_choices == 8)
    assert [version.author for version in site.history.versions()] == ["file watch"] * 3


async def test_a_file_that_is_written_in_two_halves_is_read_whole(site: Site) -> None:
    """The first half alone would be valid, and would have the models unloaded."""
    text = "gateway: {max_choices: 6}\nmodels: [{model: b}]\n"
    async with site.watching():
        with site.file.open("w") as file:
            file.write(text[:26])
            file.flush()
            await asyncio.sleep(0.1)  # within what a file must be quiet for
            file.write(text[26:])
        await site.until(lambda: site.max_choices == 6)
    assert [after.models[0].model for _, after in site.asked] == ["b"]


async def test_the_watch_goes_on_when_a_link_leads_to_itself(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "_AGAIN_S", 0.05)
    async with site.watching():
        site.file.unlink()
        site.file.symlink_to(site.file.name)
        await site.until(lambda: "cannot be watched: Symlink loop" in caplog.text)
        site.file.unlink()
        site.file.write_text(TEXT.replace("5", "6"))
        await site.until(lambda: site.max_choices == 6)
    assert [version.author for version in site.history.versions()] == ["file watch"]


async def test_the_watch_goes_on_when_it_breaks(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def broken_at_first(*folders: Path, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RuntimeError("of the library")
        return awatch(*folders, **options)

    monkeypatch.setattr(watch, "awatch", broken_at_first)
    monkeypatch.setattr(watch, "_AGAIN_S", 0.01)
    async with site.watching():
        await site.until(lambda: calls > 1)
        site.file.write_text(TEXT.replace("5", "6"))
        await site.until(lambda: site.max_choices == 6)
    assert calls == 2  # it was begun again once


async def test_a_map_of_kubernetes_is_turned(tmp_path: Path) -> None:
    """`site.yaml` leads to `..data/site.yaml`, and `..data` to a folder that is replaced as a whole."""
    for name, text in (("..1", TEXT), ("..2", TEXT.replace("5", "6"))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "site.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "site.yaml").symlink_to("..data/site.yaml")
    site = Site(tmp_path)
    async with site.watching():
        (tmp_path / "..data_tmp").symlink_to("..2")
        (tmp_path / "..data_tmp").replace(tmp_path / "..data")
        await site.until(lambda: site.max_choices == 6)
    assert (tmp_path / "site.yaml").is_symlink()


async def test_without_a_file_there_is_nothing_to_change(tmp_path: Path) -> None:
    async def change_models(before: Settings, after: Settings) -> None:
        pass

    source = ConfigSource()
    manager = ConfigManager(
        read_settings(source),
        history=ConfigHistory(tmp_path / "h", max_versions=5),
        change_models=change_models,
        examine=lambda settings: (),
        bus=EventBus(),
    )
    await manager.keep_first("ann", "start")
    assert manager.state().version is None
    assert (await manager.reload(**BY)).version is None
    with pytest.raises(ConflictError, match="there is no configuration file; name one with --config"):
        await manager.set("gateway.max_choices", 3, if_match=None, **BY)
    assert not (tmp_path / "h").exists()
