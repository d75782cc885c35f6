"""Who sends a request, by what its headers show."""

import asyncio
import time

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.errors import AuthenticationError, StorageError
from localmoe.core.identity import ANYBODY, Principal, Role
from localmoe.gateway.identity.authenticator import REMEMBERED_S, Authenticator
from localmoe.gateway.identity.config import TokenConfig
from localmoe.gateway.identity.tokens import TokenVerifier
from support.identity import MemoryKeyStore

SECRET = "s" * 32


class Clock:
    def __init__(self) -> None:
        self.now_s = time.time()

    def __call__(self) -> float:
        return self.now_s


def with_header(name: bytes, value: str | bytes) -> list[tuple[bytes, bytes]]:
    return [(name, value.encode("latin-1") if isinstance(value, str) else value)]


async def ask(authenticator: Authenticator, key: str) -> Principal:
    return await authenticator.identify(with_header(b"authorization", f"Bearer {key}"))


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer %s"),
        (b"authorization", b"bearer  %s "),
        (b"authorization", b"BEARER %s"),
        (b"x-api-key", b"%s"),
        (b"x-api-key", b" %s "),
    ],
)
async def test_ways_to_show_a_key(header: tuple[bytes, bytes]) -> None:
    store = MemoryKeyStore()
    key = store.make(Role.OPERATOR)
    name, value = header
    principal = await Authenticator(store, None).identify([(name, value % key.encode())])
    assert principal.role == Role.OPERATOR
    assert principal.id == next(iter(store.records))


async def test_the_same_key_twice_is_one() -> None:
    store = MemoryKeyStore()
    key = store.make().encode()
    headers = [(b"authorization", b"Bearer " + key), (b"x-api-key", key)]
    await Authenticator(store, None).identify(headers)
    with pytest.raises(AuthenticationError, match="several different credentials"):
        await Authenticator(store, None).identify([*headers, (b"x-api-key", store.make().encode())])


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ([], "did not say who you are"),
        (with_header(b"authorization", "Bearer "), "did not say who you are"),
        (with_header(b"authorization", "Bearer"), "did not say who you are"),
        (with_header(b"authorization", ""), "must be Bearer"),
        (with_header(b"authorization", "Basic YTpi"), "must be Bearer"),
        (with_header(b"x-api-key", ""), "did not say who you are"),
        (with_header(b"x-api-key", "sk-1234"), "not one of this server's"),
        (with_header(b"x-api-key", b"\xff\xfe"), "not one of this server's"),
        (with_header(b"x-api-key", "a" * 20_000), "longer than 16384"),
        (with_header(b"x-api-key", "lm-abcdefghjk-" + "a" * 43), "not known here"),
        (with_header(b"x-api-key", "a.b.c"), "not one of this server's"),
    ],
)
async def test_headers_that_are_refused(headers: list[tuple[bytes, bytes]], words: str) -> None:
    with pytest.raises(AuthenticationError, match=words):
        await Authenticator(MemoryKeyStore(), None).identify(headers)


@given(
    st.lists(
        st.tuples(st.sampled_from([b"authorization", b"x-api-key", b"host"]), st.binary(max_size=60)), max_size=4
    )
)
def test_no_header_breaks_it(headers: list[tuple[bytes, bytes]]) -> None:
    tokens = TokenVerifier(TokenConfig(secret=SECRET), None)
    with pytest.raises(AuthenticationError):
        asyncio.run(Authenticator(MemoryKeyStore(), tokens).identify(headers))


async def test_only_what_looks_like_a_key_reaches_the_store() -> None:
    store = MemoryKeyStore()
    for text in ("' OR 1=1 --", "lm-' OR '1'='1", "lm-abcdefghjk-" + "'" * 43, "lm-%-_", "\x00"):
        with pytest.raises(AuthenticationError):
            await ask(Authenticator(store, None), text)
    assert store.num_finds == 0


async def test_a_revoked_key_opens_nothing_some_seconds_later() -> None:
    store, clock = MemoryKeyStore(), Clock()
    authenticator = Authenticator(store, None, clock=clock)
    key = store.make()
    for _ in range(100):
        await ask(authenticator, key)
    assert store.num_finds == 1
    await store.revoke(next(iter(store.records)), at_s=clock.now_s)
    clock.now_s += REMEMBERED_S
    with pytest.raises(AuthenticationError, match="was revoked"):
        await ask(authenticator, key)


@pytest.mark.parametrize("is_revoked", [False, True])
async def test_a_key_ends_exactly_when_it_is_to(is_revoked: bool) -> None:
    store, clock = MemoryKeyStore(), Clock()
    authenticator = Authenticator(store, None, clock=clock)
    end_s = clock.now_s + 2.0
    key = store.make(expires_s=None if is_revoked else end_s)
    if is_revoked:
        await store.revoke(next(iter(store.records)), at_s=end_s)
    await ask(authenticator, key)
    clock.now_s = end_s - 0.001
    await ask(authenticator, key)
    clock.now_s = end_s
    with pytest.raises(AuthenticationError, match="was revoked" if is_revoked else "has expired"):
        await ask(authenticator, key)


async def test_a_new_key_is_taken_at_once() -> None:
    store = MemoryKeyStore()
    authenticator = Authenticator(store, None)
    key = store.make()
    records, store.records = store.records, {}
    with pytest.raises(AuthenticationError, match="not known here"):
        await ask(authenticator, key)
    store.records = records
    await ask(authenticator, key)


async def test_tokens_with_a_common_beginning_are_not_taken_for_each_other() -> None:
    authenticator = Authenticator(MemoryKeyStore(), TokenVerifier(TokenConfig(secret=SECRET), None))
    claims = {"exp": time.time() + 60, "a": "x" * 4000}  # by far the longest part, and the same
    alice = jwt.encode({**claims, "sub": "alice", "role": "admin"}, SECRET, "HS256")
    mallory = jwt.encode({**claims, "sub": "mallory", "role": "viewer"}, SECRET, "HS256")
    assert alice[:4000] == mallory[:4000]
    for _ in range(2):
        assert (await ask(authenticator, alice)).id == "jwt::alice"
        assert (await ask(authenticator, mallory)).id == "jwt::mallory"
    with pytest.raises(AuthenticationError, match="not valid"):  # the one's claims with the other's signature
        await ask(authenticator, alice.rpartition(".")[0] + "." + mallory.rpartition(".")[2])


async def test_a_token_is_not_remembered_longer_than_it_is_valid() -> None:
    clock = Clock()
    until_s = clock.now_s + 1.0
    num_verified = 0

    class Tokens(TokenVerifier):
        async def verify(self, token: str) -> tuple[Principal, float]:
            nonlocal num_verified
            num_verified += 1
            return ANYBODY, until_s

    authenticator = Authenticator(MemoryKeyStore(), Tokens(TokenConfig(), None), clock=clock)
    for now_s, expected in ((until_s - 1, 1), (until_s - 0.01, 1), (until_s, 2)):
        clock.now_s = now_s
        await ask(authenticator, "a.b.c")
        assert num_verified == expected


async def test_what_is_remembered_is_bounded() -> None:
    store = MemoryKeyStore()
    authenticator = Authenticator(store, None)
    for _ in range(5000):
        store.records.clear()
        await ask(authenticator, store.make())
    assert len(authenticator._remembered) == 4096


async def test_uses_are_written_now_and_then() -> None:
    store, clock = MemoryKeyStore(), Clock()
    authenticator = Authenticator(store, None, clock=clock)
    key = store.make()
    (key_id,) = store.records
    first_s = clock.now_s
    for _ in range(50):
        clock.now_s += 1.0
        await ask(authenticator, key)
        await asyncio.sleep(0)
    assert store.touches == [{key_id: first_s + 1}]
    clock.now_s += 60
    await ask(authenticator, key)
    await authenticator.aclose()
    assert store.touches == [{key_id: first_s + 1}, {key_id: clock.now_s}]


async def test_a_store_that_fails_lets_nobody_in(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(MemoryKeyStore):
        async def find(self, digest: bytes) -> None:
            raise StorageError("the database is away")

        async def touch(self, used_s: object) -> None:
            raise StorageError("the database is away")

    store = Broken()
    key = store.make()
    with pytest.raises(StorageError):
        await ask(Authenticator(store, None), key)
    store.find = super(Broken, store).find  # type: ignore[method-assign]
    authenticator = Authenticator(store, None)
    await ask(authenticator, key)
    await authenticator.aclose()
    assert "cannot record when API keys were used" in caplog.text
