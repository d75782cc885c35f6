"""The issuer's keys: when they are fetched, and what happens when they cannot be."""

import asyncio
import json
import logging
from typing import Any

import jwt
import pytest
from aiohttp import web
from cryptography.hazmat.primitives.asymmetric import rsa

from localmoe.core.errors import IssuerUnavailableError
from localmoe.gateway.identity.jwks import PublicKeys, fetch_document

KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def published(key_id: str, **changes: Any) -> dict[str, Any]:
    return {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(KEY.public_key())), "kid": key_id, **changes}


class Issuer:
    """Publishes keys, or does not."""

    def __init__(self, *key_ids: str) -> None:
        self.keys = [published(key_id) for key_id in key_ids]
        self.num_fetches = 0
        self.now_s = 0.0
        self.is_down = False
        self.document: bytes | None = None

    async def fetch(self, url: str) -> bytes:
        self.num_fetches += 1
        await asyncio.sleep(0)
        if self.is_down:
            raise OSError("nobody there")
        return self.document or json.dumps({"keys": self.keys}).encode()

    def public_keys(self) -> PublicKeys:
        return PublicKeys("https://issuer.example", fetch=self.fetch, clock=lambda: self.now_s)


async def test_keys_are_fetched_once() -> None:
    issuer = Issuer("a", "b")
    keys = issuer.public_keys()
    found = await asyncio.gather(*(keys.find("a") for _ in range(50)), keys.find("b"))
    assert all(found)
    assert issuer.num_fetches == 1


async def test_an_unknown_key_has_them_fetched_again_but_not_often() -> None:
    issuer = Issuer("a")
    keys = issuer.public_keys()
    assert await keys.find("a")
    issuer.keys.append(published("new"))
    issuer.now_s = 11
    assert await keys.find("new")
    assert issuer.num_fetches == 2
    for _ in range(100):  # somebody makes them up
        assert await keys.find("unknown") is None
    assert issuer.num_fetches == 2
    issuer.now_s = 22
    assert await asyncio.gather(*(keys.find(f"unknown{n}") for n in range(100))) == [None] * 100
    assert issuer.num_fetches == 3


async def test_keys_that_are_known_serve_on_while_the_issuer_is_away(caplog: pytest.LogCaptureFixture) -> None:
    issuer = Issuer("a")
    keys = issuer.public_keys()
    assert await keys.find("a")
    issuer.is_down = True
    for hour in range(1, 100):
        issuer.now_s = hour * 3601
        assert await keys.find("a")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    with pytest.raises(IssuerUnavailableError):  # it may be a new one, which nobody can know now
        await keys.find("b")
    assert "nobody there" in caplog.text
    assert issuer.num_fetches > 50
    issuer.is_down = False
    issuer.now_s += 3601
    assert await keys.find("b") is None


async def test_a_key_that_is_published_no_more_is_forgotten() -> None:
    issuer = Issuer("a", "b")
    keys = issuer.public_keys()
    assert await keys.find("a")
    del issuer.keys[0]
    issuer.now_s = 3700
    assert await keys.find("a")  # the fetch has only begun
    await keys.find("unknown")  # waits for it
    assert await keys.find("a") is None


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"keys": []}',
        b'{"keys": [5]}',
        b'{"keys": {"a": 1}}',
        b'{"keys": [{"kty": "RSA", "n": 5, "e": null, "kid": "a"}]}',
        b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "a"}]}',
        json.dumps({"keys": [published("a", use="enc")]}).encode(),
        json.dumps({"keys": [published("a", alg="HS256")]}).encode(),
        json.dumps({"keys": [published("a", alg="none")]}).encode(),
    ],
)
async def test_documents_without_a_key_that_can_be_used(document: bytes, caplog: pytest.LogCaptureFixture) -> None:
    issuer = Issuer()
    issuer.document = document
    keys = issuer.public_keys()
    caplog.set_level(logging.WARNING)
    for key_id in ("a", None):
        with pytest.raises(IssuerUnavailableError, match="cannot be fetched now"):
            await keys.find(key_id)
    assert "cannot fetch the keys" in caplog.text


async def test_keys_of_other_kinds_do_no_harm_to_those_beside_them() -> None:
    issuer = Issuer("a")
    others = [
        5,
        None,
        {},
        {"kty": "oct", "k": "c2VjcmV0"},
        published("none", alg="none"),
        published("enc", use="enc"),
    ]
    issuer.keys = [*others, *issuer.keys, {"kty": "RSA", "n": 5, "e": None, "kid": "broken"}]
    keys = issuer.public_keys()
    assert await keys.find("a")
    for key_id in ("none", "enc", "broken"):
        assert await keys.find(key_id) is None


async def test_a_request_that_is_cancelled_leaves_the_fetch_to_others() -> None:
    issuer = Issuer("a")
    keys = issuer.public_keys()
    first = asyncio.create_task(keys.find("a"))
    second = asyncio.create_task(keys.find("a"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second
    assert issuer.num_fetches == 1


async def test_what_is_being_fetched_is_given_up_at_the_end() -> None:
    async def never(url: str) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    keys = PublicKeys("https://issuer.example", fetch=never)
    asking = asyncio.create_task(keys.find("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await keys.aclose()
    with pytest.raises(asyncio.CancelledError):
        await asking


async def test_documents_from_the_web() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/keys":
                return web.Response(body=b"document")
            case "/moved":
                raise web.HTTPFound("/keys")
            case "/huge":
                response = web.StreamResponse()
                await response.prepare(request)
                try:
                    while True:
                        await response.write(b"x" * 65536)
                except ConnectionError:
                    return response
        raise web.HTTPNotFound

    app = web.Application()
    app.router.add_get("/{path}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        assert await fetch_document(f"{url}/keys") == b"document"
        with pytest.raises(ValueError, match="status is 404"):
            await fetch_document(f"{url}/nothing")
        with pytest.raises(ValueError, match="status is 302"):  # or it might lead anywhere
            await fetch_document(f"{url}/moved")
        with pytest.raises(ValueError, match="larger than 1048576 bytes"):
            await fetch_document(f"{url}/huge")
    finally:
        await runner.cleanup()
    with pytest.raises(OSError, match=r".+"):
        await fetch_document(f"{url}/keys")
