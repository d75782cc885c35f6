"""Servers that ask nobody: whom they let in nevertheless."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.core.errors import PermissionDeniedError
from localmoe.core.identity import ANYBODY
from localmoe.gateway.identity.config import IdentityConfig
from localmoe.gateway.identity.open import OpenToAll, OpenToOwnPages


def lets_in(host: str | None, origin: str | None = None, *, origins: tuple[str, ...] = ()) -> bool:
    headers = [(b"content-type", b"application/json")]
    for name, value in ((b"host", host), (b"origin", origin)):
        if value is not None:
            headers.append((name, value.encode("latin-1")))
    identity = OpenToOwnPages(hosts=("gpu1", "Models.Example.com"), origins=origins)
    refusal = ""
    try:
        assert asyncio.run(identity.identify(headers)) == ANYBODY
    except PermissionDeniedError as error:
        refusal = str(error)
    # What would let it in is said.
    assert not refusal or ("gateway.identity.hosts" in refusal) != ("gateway.cors.origins" in refusal)
    assert len(refusal) < 400
    return not refusal


@pytest.mark.parametrize(
    "host",
    [
        None,  # no browser leaves it out
        "localhost",
        "localhost:8000",
        "LocalHost:8000",
        "localhost.",
        "app.localhost:8000",
        "127.0.0.1:8000",
        "127.0.0.2",
        "192.168.1.5:8000",
        "[::1]:8000",
        "[::ffff:127.0.0.1]",
        "gpu1:8000",
        "GPU1",
        "models.example.com",
        "models.example.com.:8000",
    ],
)
def test_names_by_which_no_other_page_goes(host: str | None) -> None:
    assert lets_in(host)


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io:8000",
        "evil-localhost",
        "evil.example/localhost",
        "evil.example#localhost",
        "localhost@evil.example",
        "evil.example:80:localhost",
        "localhost:8000:evil",
        "[evil.example]",
        "[::1].evil.example",
        "x.gpu1",
        "127.1",
        "0x7f000001",
        "",
        " ",
        "localhost evil",
        "localhost\\.evil.example",
        "loc\u00e4lhost",
        "a" * 10_000,
    ],
)
def test_names_that_may_be_another_pages(host: str) -> None:
    assert not lets_in(host)


def test_every_host_header_counts() -> None:
    for hosts in ((b"localhost", b"evil.example"), (b"evil.example", b"localhost")):
        with pytest.raises(PermissionDeniedError, match=r"'evil\.example'"):
            asyncio.run(OpenToOwnPages(hosts=(), origins=()).identify([(b"host", host) for host in hosts]))


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("localhost:8000", "http://localhost:8000", True),
        ("localhost:8000", "HTTP://LOCALHOST:8000", True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("gpu1", "https://gpu1", True),
        ("localhost:8000", "http://localhost:3000", False),
        ("localhost:8000", "http://localhost", False),
        ("localhost:8000", "https://evil.example", False),
        ("localhost:8000", "https://evil.example/localhost:8000", False),
        ("localhost:8000", "https://localhost:8000.evil.example", False),
        ("localhost:8000", "null", False),
        (None, "http://localhost:8000", False),
        ("localhost:8000", "chrome-extension://abcdefgh", True),
        ("localhost:8000", "vscode-webview://abcdefgh", True),
        ("localhost:8000", "app://obsidian.md", True),
    ],
)
def test_pages_and_programs(host: str | None, origin: str, expected: bool) -> None:
    assert lets_in(host, origin) == expected


def test_pages_that_are_named() -> None:
    named = ("https://chat.example",)
    assert lets_in("localhost:8000", "https://chat.example", origins=named)
    assert not lets_in("localhost:8000", "https://other.example", origins=named)
    assert not lets_in("localhost:8000", "null", origins=named)
    assert lets_in("localhost:8000", "https://other.example", origins=("*",))
    assert not lets_in("evil.example", "https://chat.example", origins=named)


@given(
    st.text(st.characters(max_codepoint=255), max_size=40), st.text(st.characters(max_codepoint=255), max_size=40)
)
def test_no_header_breaks_it(host: str, origin: str) -> None:
    assert lets_in(host, origin) in (True, False)  # and nothing is raised
    assert not lets_in(host, "https://evil.example")  # whatever name it used


@pytest.mark.parametrize("host", ["", "http://gpu1", "gpu1:8000", "a b", "*", "*.example.com", "-x", "a" * 300])
def test_names_that_are_none_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match="must be a name like"):
        IdentityConfig(hosts=(host,))


async def test_where_nobody_is_asked_everybody_is_anybody() -> None:
    assert await OpenToAll().identify([(b"authorization", b"Basic x"), (b"host", b"evil.example")]) == ANYBODY
