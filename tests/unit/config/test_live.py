"""Which settings are live, and who is told of changes."""

from pathlib import Path

import pytest

from localmoe.config.live import (
    EFFECTS,
    ONLY_IN_FILES,
    Subscriptions,
    changed_paths,
    restart_paths,
    running_settings,
    setting_paths,
)
from localmoe.config.settings import Settings, load_settings
from localmoe.gateway.config import GatewayConfig

ROOT = Path(__file__).parents[3]


def settings_of(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    return load_settings(config=file).model_copy(update={"config": None})


def test_the_table_covers_every_setting_and_nothing_else() -> None:
    paths = setting_paths()
    prefixes = [{".".join(path[:depth]) for depth in range(1, len(path) + 1)} for path in paths]
    assert [path for path, keys in zip(paths, prefixes, strict=True) if not keys & EFFECTS.keys()] == []
    for key in (*EFFECTS, *ONLY_IN_FILES):
        assert any(".".join(path) == key or ".".join(path).startswith(f"{key}.") for path in paths), key


def test_of_the_gateway_every_setting_is_listed_by_itself() -> None:
    """A new one must be thought about: whoever takes it at start only does not see it change."""
    assert "gateway" not in EFFECTS


def test_the_documentation_has_the_table() -> None:
    """If not: see what the assertion shows."""
    words = {"live": "at once", "models": "with the models", "restart": "at the next start"}
    rows = [f"| `{key}` | {words[kind]} | {note} |" for key, (kind, note) in EFFECTS.items()]
    text = (ROOT / "docs/settings.md").read_text()
    assert [row for row in rows if row not in text] == []
    assert [key for key in ONLY_IN_FILES if f"`{key}`" not in text] == []


def test_what_needs_a_restart_stays_as_it_is(tmp_path: Path) -> None:
    before = settings_of(tmp_path, "port: 1\ngateway: {max_choices: 5}")
    wanted = settings_of(tmp_path, "port: 2\ngateway: {max_choices: 6}\nengine: {max_num_seqs: 3}")
    running = running_settings(before, wanted)
    assert (running.port, running.gateway.max_choices, running.engine.max_num_seqs) == (1, 6, 3)
    assert restart_paths(running, wanted) == ("port",)
    assert changed_paths(before, running) == [("engine", "max_num_seqs"), ("gateway", "max_choices")]
    assert running_settings(running, before) == before


def test_settings_that_need_each_other_stay_together(tmp_path: Path) -> None:
    """Each of them alone would be refused."""
    tokens = "{jwks_url: 'https://a/keys', issuer: a, audience: b}"
    with_tokens = settings_of(tmp_path, f"gateway: {{max_choices: 5, identity: {{tokens: {tokens}}}}}")
    without = settings_of(tmp_path, "gateway: {max_choices: 6}")
    for before, wanted in ((with_tokens, without), (without, with_tokens)):
        running = running_settings(before, wanted)
        assert running.gateway.identity == before.gateway.identity
        assert running.gateway.max_choices == wanted.gateway.max_choices


def test_those_whom_it_concerns_are_told(tmp_path: Path) -> None:
    before = settings_of(tmp_path, "gateway: {max_choices: 5}")
    after = settings_of(tmp_path, "gateway: {max_choices: 6}")
    told: list[object] = []
    subscriptions = Subscriptions()
    subscriptions.subscribe(lambda settings: settings.gateway, told.append)
    subscriptions.subscribe(lambda settings: settings.dispatch, told.append)
    subscriptions.subscribe(lambda settings: settings.gateway.max_choices, told.append)
    subscriptions.announce(before, after)
    assert told == [after.gateway, 6]
    subscriptions.announce(after, after)
    assert len(told) == 2


def test_if_one_cannot_all_keep_what_they_had(tmp_path: Path) -> None:
    before = settings_of(tmp_path, "gateway: {max_choices: 5}")
    after = settings_of(tmp_path, "gateway: {max_choices: 6}")
    told: list[int] = []

    def refuse(gateway: GatewayConfig) -> None:
        told.append(-gateway.max_choices)
        if gateway.max_choices == 6:
            raise RuntimeError("no")

    subscriptions = Subscriptions()
    subscriptions.subscribe(lambda settings: settings.gateway.max_choices, told.append)
    subscriptions.subscribe(lambda settings: settings.gateway, refuse)
    subscriptions.subscribe(lambda settings: settings.gateway.max_choices, lambda _: told.append(0))
    with pytest.raises(RuntimeError, match="no"):
        subscriptions.announce(before, after)
    assert told == [6, -6, -5, 5]
