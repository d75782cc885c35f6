from pathlib import Path

import pytest
from pydantic import ValidationError

from localmoe.config.settings import Settings, load_settings
from localmoe.core.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LOCALMOE_{name.upper()}", raising=False)


def test_defaults_serve_this_machine_only() -> None:
    settings = load_settings()
    assert settings.home == Path.home() / ".localmoe"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)


def test_environment_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_PORT", "9001")
    settings = load_settings()
    assert (settings.home, settings.port) == (tmp_path, 9001)


def test_home_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCALMOE_HOME", "state")
    assert load_settings().home == tmp_path / "state"


def test_home_expands_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_HOME", "~/models")
    assert load_settings().home == tmp_path / "models"


def test_a_home_of_nobody_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"~nobody-of-this-name/a\.yaml: the home directory is not known"):
        load_settings(config=Path("~nobody-of-this-name/a.yaml"))
    monkeypatch.setenv("LOCALMOE_HOME", "~nobody-of-this-name")
    with pytest.raises(ConfigError, match="~nobody-of-this-name: the home directory is not known"):
        load_settings()


def test_empty_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_HOME", "")
    assert load_settings().home == Path.home() / ".localmoe"


@pytest.mark.parametrize(("value", "allowed"), [("70000", "less than or equal to 65535"), ("http", "integer")])
def test_bad_value_is_named(monkeypatch: pytest.MonkeyPatch, value: str, allowed: str) -> None:
    monkeypatch.setenv("LOCALMOE_PORT", value)
    with pytest.raises(ConfigError) as raised:
        load_settings()
    message = str(raised.value)
    assert "'port'" in message
    assert repr(value) in message
    assert "LOCALMOE_PORT" in message
    assert allowed in message


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1
