"""API keys: how they are made, and what is kept of them."""

import hashlib
import string

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.identity import RateLimits, Role
from localmoe.gateway.identity.keys import digest_of, is_key, is_of, make_key, rotated


def test_a_key_has_256_random_bits_and_only_its_digest_is_kept() -> None:
    made = [make_key(name="a", role=Role.USER, now_s=1.0) for _ in range(200)]
    secrets = {key.split("-", 2)[2] for key, _ in made}
    assert len(secrets) == len({record.id for _, record in made}) == 200
    assert all(len(secret) == 43 for secret in secrets)  # 256 bits in base64
    for key, record in made:
        assert is_key(key)
        assert key.startswith(f"{record.id}-")
        assert record.digest == hashlib.sha256(key.encode()).digest()
        assert key.split("-", 2)[2].encode() not in msgspec.json.encode(record)


@given(st.text(max_size=80))
def test_nothing_else_looks_like_a_key(text: str) -> None:
    assert not is_key(text)


@pytest.mark.parametrize("change", [" {}", "{}\n", "{}x", "LM{}", "{}'", "{}--", "{}\u0660"])
def test_nor_does_a_key_with_something_more(change: str) -> None:
    key, _ = make_key(name="a", role=Role.USER, now_s=1.0)
    assert not is_key(change.format(key))


def test_a_record_is_of_one_key() -> None:
    key, record = make_key(name="a", role=Role.USER, now_s=1.0)
    assert is_of(key, record)
    for place in (3, 20, len(key) - 1):
        other = next(char for char in string.ascii_lowercase if char != key[place])
        assert not is_of(key[:place] + other + key[place + 1 :], record)


def test_a_rotated_key_is_its_predecessors_in_all_but_the_secret() -> None:
    limits = RateLimits(requests_per_minute=5)
    key, record = make_key(name="a", role=Role.USER, now_s=1.0, expires_s=99.0, models=("m",), limits=limits)
    second_key, second = rotated(record, now_s=2.0)
    third_key, third = rotated(second, now_s=3.0)
    assert len({key, second_key, third_key}) == len({record.id, second.id, third.id}) == 3
    assert record.principal == second.principal == third.principal
    assert third.expires_s == 99.0
    assert third.digest == digest_of(third_key)


def test_when_a_key_is_valid() -> None:
    _, record = make_key(name="a", role=Role.USER, now_s=1.0, expires_s=10.0)
    assert record.is_valid(9.9)
    assert not record.is_valid(10.0)
    revoked = msgspec.structs.replace(record, revoked_s=5.0)
    assert revoked.is_valid(4.9)
    assert not revoked.is_valid(5.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": ""}, "1 to 100 printable characters"),
        ({"name": "a\nb"}, "1 to 100 printable characters"),
        ({"name": "a" * 101}, "1 to 100 printable characters"),
        ({"expires_s": 1.0}, "in the future"),
        ({"role": Role.OPERATOR, "models": ("m",)}, "viewer and user only, not for operator"),
        ({"models": ("m",) * 101}, "at most 100"),
    ],
)
def test_what_no_key_is_made_of(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_key(**{"name": "a", "role": Role.USER, "now_s": 1.0, **arguments})
