"""`localmoe keys`: made, shown once, replaced, taken back."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from localmoe.cli.identity import Doors, open_keys, refuse_if_nobody_could_enter, with_identity_decided
from localmoe.cli.main import app
from localmoe.config.settings import Settings, load_settings
from localmoe.core.current import Current
from localmoe.core.errors import AuthenticationError, ConfigError, PermissionDeniedError
from localmoe.core.identity import Principal, RateLimits, Role
from localmoe.core.keys import KeyRecord
from localmoe.gateway.identity.authenticator import Authenticator
from localmoe.gateway.identity.open import OpenToAll, OpenToOwnPages
from localmoe.state.keys import SqlKeyStore
from support.identity import MemoryKeyStore


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def keys(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=False)


def listed() -> list[dict]:
    return json.loads(keys("list", "--json").stdout)


def identify(key: str) -> Principal:
    async def ask() -> Principal:
        async with open_keys(load_settings()) as store:
            authenticator = Authenticator(store, None)
            principal = await authenticator.identify([(b"x-api-key", key.encode())])
            await authenticator.aclose()
            return principal

    return asyncio.run(ask())


def test_a_key_from_its_making_to_its_end(home: Path) -> None:
    made = keys("create", "alice", "--role", "operator", "--days", "2", "--requests-per-minute", "5")
    key = made.stdout.strip()
    assert key not in made.stderr
    assert "not shown again" in made.stderr
    (row,) = listed()
    assert key.startswith(row["id"] + "-")
    assert (row["name"], row["role"], row["state"], row["limits"]) == (
        "alice",
        "operator",
        "valid",
        {"requests_per_minute": 5},
    )
    assert identify(key) == Principal(
        id=row["id"], name="alice", role=Role.OPERATOR, limits=RateLimits(requests_per_minute=5)
    )
    assert listed()[0]["last_used"] is not None
    assert row["id"] in keys("list").stdout
    assert keys("revoke", row["id"]).exit_code == 0
    assert listed()[0]["state"] == "revoked"
    with pytest.raises(AuthenticationError, match="was revoked"):
        identify(key)


def test_the_key_is_nowhere_on_disk(home: Path) -> None:
    secret = keys("create", "alice").stdout.strip().split("-", 2)[2].encode()
    for file in home.iterdir():
        assert secret not in file.read_bytes()
        assert file.stat().st_mode & 0o077 == 0


def test_a_rotated_key_owns_what_the_old_one_did(home: Path) -> None:
    old = keys("create", "alice", "--model", "m", "--model", "n").stdout.strip()
    (row,) = listed()
    new = keys("rotate", row["id"], "--grace-hours", "1").stdout.strip()
    assert identify(new) == identify(old)
    assert [row["state"] for row in listed()] == ["being replaced", "valid"]
    keys("rotate", listed()[1]["id"])
    with pytest.raises(AuthenticationError, match="was revoked"):
        identify(new)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("create", ""), "name is ''"),
        (("create", "a", "--role", "admin", "--model", "m"), "viewer and user only"),
        (("create", "a", "--model", ""), "--model is empty"),
        (("create", "a", "--days", "0"), "in the future"),
        (("revoke", "lm-nothing"), "there is no key 'lm-nothing'"),
        (("revoke", "' OR 1=1 --"), "there is no key"),
        (("rotate", "lm-nothing"), "there is no key 'lm-nothing'"),
    ],
)
def test_what_cannot_be(home: Path, arguments: tuple[str, ...], words: str) -> None:
    keys("create", "alice")
    with pytest.raises(ConfigError, match=words):
        keys(*arguments)
    assert [row["state"] for row in listed()] == ["valid"]


def test_a_revoked_key_is_not_rotated(home: Path) -> None:
    keys("create", "alice")
    (row,) = listed()
    keys("revoke", row["id"])
    with pytest.raises(ConfigError, match="expired or revoked already"):
        keys("rotate", row["id"])


@pytest.mark.parametrize("after_s", [-1000.0, 0.0, 1000.0])
def test_a_key_that_is_revoked_meanwhile_is_not_rotated(
    home: Path, monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    keys("create", "alice")
    (row,) = listed()
    everything = SqlKeyStore.all

    async def revoke_then(store: SqlKeyStore) -> Sequence[KeyRecord]:
        found = await everything(store)
        await store.revoke(row["id"], at_s=time.time() + after_s)
        return found

    with monkeypatch.context() as patches:
        patches.setattr(SqlKeyStore, "all", revoke_then)
        with pytest.raises(ConfigError, match="expired or revoked already"):
            keys("rotate", row["id"])
    assert [row["id"] for row in listed()] == [row["id"]]


def test_a_whole_key_in_place_of_its_id_is_not_printed(home: Path) -> None:
    key = keys("create", "alice").stdout.strip()
    assert key not in keys("revoke", key).output
    assert listed()[0]["state"] == "revoked"


def test_metacharacters_in_names_are_text(home: Path) -> None:
    name = "'; DROP TABLE api_keys; --"
    keys("create", name)
    assert [row["name"] for row in listed()] == [name]
    with sqlite3.connect(home / "state.db") as database:
        assert database.execute("SELECT name FROM api_keys").fetchall() == [(name,)]
    database.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("create", "a", "--days", "nan"),
        ("create", "a", "--days", "inf"),
        ("create", "a", "--requests-per-minute", str(2**60)),
        ("rotate", "lm-abc", "--grace-hours", "nan"),
    ],
)
def test_numbers_that_are_none(home: Path, arguments: tuple[str, ...]) -> None:
    assert keys(*arguments).exit_code == 2
    assert listed() == []


def test_names_are_shown_as_they_are(home: Path) -> None:
    keys("create", "[/a] [b]")
    assert "[/a]" in keys("list").stdout


TOKENS = {"tokens": {"secret": "s" * 32}}


def asks_everybody(settings: Settings) -> bool:
    return with_identity_decided(settings).gateway.identity.mode == "required"


@pytest.mark.parametrize(
    ("host", "identity", "has_key", "asks"),
    [
        ("127.0.0.1", {}, False, False),
        ("127.0.0.1", {}, True, True),
        ("::1", {}, False, False),
        ("localhost", {}, False, False),
        ("127.0.0.1", TOKENS, False, True),
        ("127.0.0.1", {"mode": "required"}, True, True),
        ("127.0.0.1", {"mode": "open"}, True, False),
        ("0.0.0.0", {}, True, True),
        ("0.0.0.0", TOKENS, False, True),
        ("0.0.0.0", {"mode": "open"}, False, False),
        ("0.0.0.0", {}, False, None),
        ("::", {}, False, None),
        ("192.0.2.1", {}, False, None),
        ("example.com", {}, False, None),
        ("127.0.0.1", {"mode": "required"}, False, None),
    ],
)
def test_who_is_asked(home: Path, host: str, identity: dict, has_key: bool, asks: bool | None) -> None:
    settings = Settings(home=home, host=host, gateway={"identity": identity})
    if has_key:
        keys("create", "alice")
    if asks is None:  # everybody would be, and nobody could answer
        with pytest.raises(ConfigError, match=r"localmoe keys create NAME --role admin.*mode to open"):
            refuse_if_nobody_could_enter(settings)
    else:
        refuse_if_nobody_could_enter(settings)
        assert asks_everybody(settings) == asks


def test_an_expired_key_lets_nobody_in(home: Path) -> None:
    keys("create", "alice", "--days", "0.00001")
    deadline_s = time.monotonic() + 10
    while listed()[0]["state"] == "valid":
        assert time.monotonic() < deadline_s
    with pytest.raises(ConfigError, match="there is none"):
        refuse_if_nobody_could_enter(Settings(home=home, host="0.0.0.0"))


def test_where_keys_cannot_be_read_everybody_is_asked(home: Path) -> None:
    home.mkdir()
    (home / "state.db").write_bytes(b"this is no database" * 100)
    assert asks_everybody(Settings(home=home))


@pytest.mark.parametrize(
    ("host", "hosts", "asks", "expected"),
    [
        ("127.0.0.1", [], False, OpenToOwnPages),
        ("::1", [], False, OpenToOwnPages),
        ("localhost", [], False, OpenToOwnPages),
        ("0.0.0.0", [], False, OpenToAll),
        ("0.0.0.0", ["gpu1"], False, OpenToOwnPages),
        ("127.0.0.1", [], True, Authenticator),
        ("0.0.0.0", ["gpu1"], True, Authenticator),
    ],
)
async def test_who_stands_at_the_door(home: Path, host: str, hosts: list[str], asks: bool, expected: type) -> None:
    settings = Settings(home=home, host=host, gateway={"identity": {"hosts": hosts}, "request_log": False})
    doors = Doors(settings, Current(settings.gateway), MemoryKeyStore(), asks=asks)
    assert type(doors.guard.identity) is expected
    assert (doors.guard.limiter is not None) == asks
    await doors.aclose()


async def test_what_the_settings_say_is_at_the_door(home: Path) -> None:
    settings = Settings(home=home, gateway={"identity": {"hosts": ["gpu1"]}, "cors": {"origins": ["https://a"]}})
    doors = Doors(settings, Current(settings.gateway), MemoryKeyStore(), asks=False)
    await doors.guard.identity.identify([(b"host", b"gpu1"), (b"origin", b"https://a")])
    for headers in ([(b"host", b"gpu2")], [(b"host", b"gpu1"), (b"origin", b"https://b")]):
        with pytest.raises(PermissionDeniedError):
            await doors.guard.identity.identify(headers)
    await doors.aclose()
