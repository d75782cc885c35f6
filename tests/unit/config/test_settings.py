from pathlib import Path

import pytest
from pydantic import ValidationError

from localmoe.backends.remote_config import RemoteConfig
from localmoe.config.settings import Settings, load_settings, with_overrides
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


def test_a_name_is_one_models(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("models: [{model: m}, {model: n, served_model_name: [o, m]}]")
    with pytest.raises(ConfigError, match="models: 2 of them are named 'm'; give all but one another name"):
        load_settings(config=file)


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


def test_instances_of_the_first_documents_are_models(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "models: [{model: a}]\n"
        "vllm_instances:\n"
        "  - model_name: b\n    tensor_parallel_size: 2\n    gpu_devices: [0, 1]\n"
        "  - model_name: c\n    gpu_devices: [2]\n"
    )
    notes: list[str] = []
    settings = load_settings(config=file, on_note=notes.append)
    assert [model.model for model in settings.models] == ["a", "b", "c"]
    (engine,) = settings.models[1].engines
    assert (engine.engine, engine.settings) == ("vllm", {"tensor_parallel_size": 2, "gpu_devices": [0, 1]})
    assert len(notes) == 1
    file.write_text("vllm_instances: [{gpu_devices: [0]}]")
    with pytest.raises(ConfigError, match="that each have a model_name"):
        load_settings(config=file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [{modell: a}]", "did you mean 'models.model'"),
        ("models: [a]", "must be a list of blocks"),
        ("models: [{model: a, engines: []}]", "engines is empty"),
        (
            "config_version: 2\nvllm: {swap_space: 4}",
            "'vllm.swap_space' is not a setting any more: vLLM has none since 0.18",
        ),
        ("vllm: {quantization: squeezellm}", "vLLM has removed it"),
        (
            "config_version: 2\ndeepspeed: {offload_optimizer: {device: cpu}}",
            "is not a setting any more: it is for training",
        ),
        ("dispatch: {policy: fastest}", "dispatch.policy"),
    ],
)
def test_what_is_wrong_with_models_and_engines_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(config=file)
    assert said in str(caught.value)


def test_no_message_shows_a_key(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    for engine in ("{engine: remote, settings: {api_key: s3cret-key}, x: 1}", "{api_key: s3cret-key}"):
        file.write_text(f"models: [{{model: a, engines: [{engine}]}}]")
        with pytest.raises(ConfigError) as caught:
            load_settings(config=file)
        assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        with_overrides(RemoteConfig, None, {"url": "http://a/v1", "model": "m", "api_key": ["s3cret"]}, "remote")
    assert "s3cret" not in str(caught.value)
    assert caught.value.__cause__ is None
