"""Who has computed the beginning of a prompt."""

import pytest

from localmoe.dispatch import prefixes
from localmoe.dispatch.prefixes import PrefixMap


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + index * 31) % 50_000 for index in range(num_tokens)]


def test_whole_blocks_are_known() -> None:
    known = PrefixMap()
    assert known.known_tokens(prompt(1000)) == {}
    known.record(prompt(200), "a")
    assert known.known_tokens(prompt(200)) == {"a": 192}
    assert known.known_tokens(prompt(1000)) == {"a": 192}
    assert known.known_tokens(prompt(130)) == {"a": 128}
    assert known.known_tokens(prompt(63)) == {}
    assert known.known_tokens([]) == {}


def test_a_block_is_known_only_after_what_came_before_it() -> None:
    known = PrefixMap()
    known.record(prompt(256), "a")
    other = [9, *prompt(256)[1:]]
    assert known.known_tokens(other) == {}
    changed = prompt(256)
    changed[100] += 1
    assert known.known_tokens(changed) == {"a": 64}
    assert known.known_tokens(prompt(256)[64:]) == {}


def test_scopes_are_told_apart() -> None:
    known = PrefixMap()
    known.record(prompt(256), "a", scope="x")
    assert known.known_tokens(prompt(256), scope="y") == known.known_tokens(prompt(256)) == {}
    assert known.known_tokens(prompt(256), scope="x") == {"a": 256}


def test_engines_are_told_apart() -> None:
    known = PrefixMap()
    known.record(prompt(256), "a")
    known.record(prompt(128) + prompt(128, seed=1), "b")
    assert known.known_tokens(prompt(256)) == {"a": 256, "b": 128}
    known.forget("a")
    assert known.known_tokens(prompt(256)) == {"b": 128}
    known.record(prompt(256), "a")
    assert known.known_tokens(prompt(256)) == {"a": 256, "b": 128}


def test_what_was_not_seen_for_long_is_forgotten_from_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_MAX_BLOCKS", 10)
    known = PrefixMap()
    known.record(prompt(6 * 64), "a")
    known.record(prompt(6 * 64, seed=1), "a")
    assert known.known_tokens(prompt(6 * 64, seed=1)) == {"a": 6 * 64}
    assert known.known_tokens(prompt(6 * 64)) == {"a": 4 * 64}
    known.record(prompt(2 * 64), "a")  # seen again
    known.record(prompt(6 * 64, seed=2), "a")
    assert known.known_tokens(prompt(6 * 64)) == {"a": 2 * 64}
    assert known.known_tokens(prompt(6 * 64, seed=1)) == {"a": 2 * 64}
