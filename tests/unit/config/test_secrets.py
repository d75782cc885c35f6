"""References to secrets, and that secrets are shown nowhere."""

from pathlib import Path

import pytest

from localmoe.config.secrets import is_secret, masked, plain_secrets, references
from localmoe.config.settings import ConfigSource, load_settings, read_settings
from localmoe.core.errors import ConfigError

KEY = "s3cr3t-key"


def file_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return path


def test_secrets_are_known_by_their_names() -> None:
    assert all(
        map(
            is_secret,
            ("api_key", "jwt_secret", "redis_password", "bearer_token", "secrets", "secret_key", "apikey"),
        )
    )
    assert not any(
        map(is_secret, ("block_tokens", "max_num_batched_tokens", "tokens_per_minute", "key", "keys_file"))
    )


def test_references_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "key"
    secret.write_text(f"{KEY}\n")
    file = file_of(tmp_path, f"vllm: {{url: 'http://a:1', api_key: 'file:{secret}'}}")
    assert load_settings(config=file).vllm.api_key == KEY
    monkeypatch.setenv("SOME_KEY", "other")
    file = file_of(
        tmp_path,
        "models: [{model: m, engines: [{engine: remote, settings: {url: 'http://a/v1', api_key: 'env:SOME_KEY'}}]}]",
    )
    (engine,) = load_settings(config=file).models[0].engines
    assert engine.settings["api_key"] == "other"
    monkeypatch.setenv("LOCALMOE_VLLM__URL", "http://a:1")
    monkeypatch.setenv("LOCALMOE_VLLM__API_KEY", KEY)
    assert load_settings().vllm.api_key == KEY


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("env:NOT_SET", "the environment variable NOT_SET is not set"),
        ("file:/nothing/here", "the file cannot be read: No such file"),
        ("file:{folder}", "the file cannot be read: Is a directory"),
        ("file:{folder}/empty", "the file is empty"),
        ("file:{folder}/large", "the file is larger than"),
        ("file:{folder}/binary", "the file is not UTF-8"),
    ],
)
def test_a_reference_to_nothing_is_named(tmp_path: Path, reference: str, said: str) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "large").write_text("x" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    reference = reference.format(folder=tmp_path)
    with pytest.raises(ConfigError) as raised:
        load_settings(config=file_of(tmp_path, f"vllm: {{url: 'http://a:1', api_key: '{reference}'}}"))
    assert str(raised.value).startswith(f"setting 'vllm.api_key' is {reference}: {said}")


@pytest.mark.parametrize(
    "text",
    [
        f"vllm: {{url: 'http://a:1', api_key: {KEY}}}",
        f"models: [{{model: m, engines: [{{engine: remote, settings: {{url: 'http://a/v1', api_key: {KEY}}}}}]}}]",
        f"vllm: {{url: 'http://me:{KEY}@a:1'}}",
        f"other_engines: {{mine: {{redis_url: 'redis://:{KEY}@host:6379'}}}}",
        f"other_engines: {{mine: {{passwords: [{KEY}]}}}}",
        "vllm: {url: 'http://a:1', api_key: '***'}",
    ],
)
def test_a_secret_in_a_file_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_settings(config=file_of(tmp_path, text))
    assert "is a secret and must not stand in a file; write env:NAME or file:/path" in str(raised.value)
    assert KEY not in str(raised.value)


def test_what_is_shown_has_references_and_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", KEY)
    monkeypatch.setenv(
        "LOCALMOE_OTHER_ENGINES", f'{{"mine": {{"password": "{KEY}", "a_url": "http://x:{KEY}@y/"}}}}'
    )
    file = file_of(
        tmp_path,
        "vllm: {url: 'http://a:1', api_key: 'env:SOME_KEY'}\n"
        "models: [{model: m, engines: [{engine: remote, settings: {url: 'http://a/v1', api_key: 'env:SOME_KEY'}}]}]",
    )
    loaded = read_settings(ConfigSource(config=file))
    assert loaded.settings.vllm.api_key == KEY
    shown = loaded.shown()
    assert KEY not in str(shown)
    assert KEY not in repr(loaded)
    assert shown["vllm"]["api_key"] == "env:SOME_KEY"
    assert shown["models"][0]["engines"][0]["settings"]["api_key"] == "env:SOME_KEY"
    assert shown["other_engines"]["mine"] == {"password": "***", "a_url": "http://***@y/"}


def test_no_message_of_a_bad_value_shows_a_resolved_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", f"{KEY} with a space")
    remote = "{engine: remote, settings: {url: 'http://a/v1', api_key: 'env:SOME_KEY'}}"
    text = f"models: [{{model: m, engines: [{remote}]}}]"
    with pytest.raises(ConfigError, match="api_key is empty, or has characters") as raised:
        load_settings(config=file_of(tmp_path, text))
    assert KEY not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize(
    "text",
    [
        "vllm: {url: 'env:SOME_KEY'}",
        "gateway: {identity: {tokens: {jwks_url: 'env:SOME_KEY', issuer: a, audience: b}}}",
        "models: [{model: m, engines: [{engine: remote, settings: {url: 'env:SOME_KEY'}}]}]",
    ],
)
def test_what_a_component_says_of_a_url_shows_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setenv("SOME_KEY", f"{KEY}'\\\u00fc")
    with pytest.raises(ConfigError) as raised:
        load_settings(config=file_of(tmp_path, text))
    assert KEY not in str(raised.value)
    assert "env:SOME_KEY" in str(raised.value)


def test_nothing_is_masked_that_is_none() -> None:
    values = {"api_key": None, "tokens": 5, "url": "http://a"}
    assert masked(values, {}) == values
    assert plain_secrets(values) == []
    assert references({"a": [{"api_key": "env:A"}, {"url": "file:/b"}, {"name": "env:C"}]}) == {
        ("api_key", "env:A"),
        ("url", "file:/b"),
    }


@pytest.mark.parametrize(
    ("url", "shown", "is_secret_itself"),
    [
        (f"postgresql://me:{KEY}@host/name", "postgresql://***@host/name", True),
        (f"postgresql://me:{KEY}/a@b@host/name", "postgresql://***@host/name", True),
        (f"postgresql://host/name?user=me&password={KEY}", "postgresql://host/name?user=me&password=***", True),
        (f"redis://:{KEY}@host:6379/0", "redis://***@host:6379/0", True),
        ("postgresql://me@host/name", "postgresql://***@host/name", False),
        ("http://host:8000/a@b", "http://***@b", False),
        ("http://host:8000/v1", "http://host:8000/v1", False),
        ("sqlite:////srv/state.db", "sqlite:////srv/state.db", False),
    ],
)
def test_passwords_in_urls_are_found(url: str, shown: str, is_secret_itself: bool) -> None:
    assert masked({"database_url": url}, {}) == {"database_url": shown}
    assert plain_secrets({"database_url": url}) == (["database_url"] if is_secret_itself else [])
