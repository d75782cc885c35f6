"""Settings from environment variables: single ones, lists, whole blocks, and names that are wrong."""

import os

import pytest

from localmoe.config.settings import load_settings
from localmoe.core.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("LOCALMOE_"):
            monkeypatch.delenv(name)


def problem(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised:
        load_settings()
    return str(raised.value)


def test_lists_are_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__PLACEMENT", '["layers.0.*=ram", "*=25%"]')
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__STRIPES", '["/mnt/a"]')
    tiers = load_settings().engine.tiers
    assert (tiers.placement, tiers.stripes) == (("layers.0.*=ram", "*=25%"), ("/mnt/a",))


@pytest.mark.parametrize(
    ("variable", "block"),
    [
        ("LOCALMOE_ENGINE", '{"max_num_seqs": 3, "tiers": {"ram_bytes": 5, "disk": {"timeout_s": 7}}}'),
        ("LOCALMOE_ENGINE__TIERS", '{"ram_bytes": 5, "disk": {"timeout_s": 7}}'),
        ("LOCALMOE_ENGINE__TIERS__DISK", '{"timeout_s": 7}'),
    ],
)
def test_blocks_are_in_json_at_each_level(monkeypatch: pytest.MonkeyPatch, variable: str, block: str) -> None:
    monkeypatch.setenv(variable, block)
    assert load_settings().engine.tiers.disk.timeout_s == 7
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__DISK__QUEUE_DEPTH", "9")
    disk = load_settings().engine.tiers.disk
    assert (disk.timeout_s, disk.queue_depth) == (7, 9)


def test_a_single_setting_goes_before_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_ENGINE", '{"tiers": {"ram_bytes": 1, "policy": "lru", "prefetch_layers": 1}}')
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS", '{"ram_bytes": 2, "policy": "lfu"}')
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__RAM_BYTES", "3")
    tiers = load_settings().engine.tiers
    assert (tiers.ram_bytes, tiers.policy, tiers.prefetch_layers) == (3, "lfu", 1)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("LOCALMOE_ENGINE", "fast", "environment variable LOCALMOE_ENGINE, a block of settings, is not JSON"),
        ("LOCALMOE_ENGINE__TIERS", "5", "LOCALMOE_ENGINE__TIERS must be a block of settings"),
        ("LOCALMOE_ENGINE__TIERS", '{"ram_bites": 5}', "did you mean 'engine.tiers.ram_bytes'?"),
        ("LOCALMOE_ENGINE__TIERS", '{"ram_bytes": true}', "'engine.tiers.ram_bytes' is True; it must be a number"),
        (
            "LOCALMOE_ENGINE__TIERS",
            '{"ram_bytes": 0}',
            "(environment variable LOCALMOE_ENGINE__TIERS): ram_bytes is 0",
        ),
        ("LOCALMOE_ENGINE", '{"max_num_seqs": ' + "9" * 5001 + "}", "has an integer of too many digits"),
        ("LOCALMOE_ENGINE", "[" * 100_000, "is nested too deeply"),
        ("LOCALMOE_ENGINE__TIERS__PLACEMENT", "*=ram", "LOCALMOE_ENGINE__TIERS__PLACEMENT, a list, is not JSON"),
        ("LOCALMOE_ENGINE__TIERS__PLACEMENT", '"*=ram"', "it is '*=ram': it must be a list"),
        ("LOCALMOE_ENGINE__NUM_THREADS", "100000", "num_threads is 100000; it must be from 1 to 1024"),
        ("LOCALMOE_GATEWAY__KEEPALIVE_S", "nan", "keepalive_s is nan"),
    ],
)
def test_a_bad_value_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    message = problem(monkeypatch, variable, value)
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variable", "said"),
    [
        ("LOCALMOE_PROT", "did you mean LOCALMOE_PORT?"),
        ("LOCALMOE_MAX_NUM_SEQS", "did you mean LOCALMOE_ENGINE__MAX_NUM_SEQS?"),
        ("LOCALMOE_ENGIN__TIERS__RAM_BYTES", "did you mean LOCALMOE_ENGINE__TIERS__RAM_BYTES?"),
        ("LOCALMOE_ENGINE__TIERS__RAM_BITES", "did you mean LOCALMOE_ENGINE__TIERS__RAM_BYTES?"),
        ("LOCALMOE_GATEWAY__ZZZ", "is not a setting; those of its block are max_body_bytes, "),
        ("LOCALMOE_PORT__ZZZ", "is not a setting"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, variable: str, said: str
) -> None:
    message = problem(monkeypatch, variable, "1")
    assert message.startswith(f"{variable} is not a setting; ")
    assert said in message


def test_names_that_are_like_no_setting_may_be_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as those that a cluster sets for a service of our name, and those of our own build."""
    for name in ("DEVELOPER", "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR"):
        monkeypatch.setenv(f"LOCALMOE_{name}", "1")
    monkeypatch.setenv("LOCALMOE_PORT", "tcp://10.0.0.1:8000")
    assert load_settings().port == 8000
