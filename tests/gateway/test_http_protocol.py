"""What a client may send before there is a request to look at, over real connections."""

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from localmoe.gateway import http_protocol
from localmoe.gateway.http_protocol import BoundedHttpProtocol

KIB = 1024


class Echo:
    """Answers with how much body there was, and takes note of requests."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        num_bytes, more = 0, scope["path"] != "/refused"
        while more:
            message = await receive()
            num_bytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        await self.may_end.wait()
        body = str(num_bytes).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    config = uvicorn.Config(app, http=BoundedHttpProtocol, ws="none", port=0, lifespan="off", log_level="critical")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110 - it has no event for it
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            yield reader, writer
    finally:
        writer.close()


async def flood(writer: asyncio.StreamWriter, piece: bytes, *, num_bytes: int) -> int:
    """Send until the server has had enough; returns how much that was."""
    sent = 0
    try:
        while sent < num_bytes:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    return sent


ENDLESS = {
    "request line": (b"GET /", b"a" * KIB),
    "header value": (b"GET / HTTP/1.1\r\nhost: a\r\nx: ", b"a" * KIB),
    "headers": (b"GET / HTTP/1.1\r\nhost: a\r\n", b"x: y\r\n" * 200),
    "chunk extension": (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5;", b"a" * KIB),
    "trailers": (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", b"x: y\r\n" * 200),
}


@pytest.mark.parametrize("what", ENDLESS)
async def test_what_never_ends_is_cut_off(what: str) -> None:
    begin, piece = ENDLESS[what]
    app = Echo()
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(begin)
        sent = await flood(writer, piece, num_bytes=64 * KIB * KIB)
        assert sent < 32 * KIB * KIB  # what lies in the buffers of two sockets
        with_end = b""
        with contextlib.suppress(ConnectionError):
            with_end = await reader.read()
        assert with_end == b"" or with_end.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))


async def test_what_comes_after_the_body_is_no_header() -> None:
    """Also where all of it comes at once: whoever checks heads before us saw none of it."""
    app = Echo()
    head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(head + b"2\r\n{}\r\n0\r\nauthorization: Bearer lm-secret\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    assert [name for name, _ in app.scopes[0]["headers"]] == [b"host", b"connection", b"transfer-encoding"]


async def test_a_head_behind_an_open_answer_is_bounded_too() -> None:
    app = Echo()
    app.may_end.clear()
    async with serving(app) as port, connection(port) as (_, writer):
        writer.write(b"GET /first HTTP/1.1\r\nhost: a\r\n\r\nGET /second HTTP/1.1\r\nhost: a\r\nx: ")
        assert await flood(writer, b"a" * KIB, num_bytes=64 * KIB * KIB) < 32 * KIB * KIB
        app.may_end.set()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", b"\r\n", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n\r\n"])
async def test_who_does_not_go_on_is_left(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(http_protocol, "_MAX_WAIT_S", 0.2)
    async with serving(Echo()) as port, connection(port) as (reader, writer):
        writer.write(sent)
        async with asyncio.timeout(10):  # uvicorn's own bound, for connections that are idle, is 5 s
            await reader.read()
        assert reader.at_eof()


async def test_who_dribbles_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_MAX_WAIT_S", 0.3)
    async with serving(Echo()) as port, connection(port) as (reader, writer):
        writer.write(b"GET / HTTP/1.1\r\n")
        gone = asyncio.create_task(reader.read())
        async with asyncio.timeout(10):
            while not gone.done():
                try:
                    writer.write(b"x: y\r\n")
                    await writer.drain()
                except ConnectionError:
                    break
                await asyncio.sleep(0.05)
            await asyncio.gather(gone, return_exceptions=True)
        assert reader.at_eof() or reader.exception() is not None


async def test_an_answer_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_MAX_WAIT_S", 0.1)
    app = Echo()
    app.may_end.clear()
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab")
        await asyncio.sleep(0.3)
        writer.write(b"cd")
        await asyncio.sleep(0.3)
        app.may_end.set()
        assert (await reader.readuntil(b"\r\n\r\n4")).startswith(b"HTTP/1.1 200")


async def test_who_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_MAX_STALL_S", 0.5)
    left = asyncio.Event()

    async def flooding(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(wait_for_disconnect(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * KIB * KIB, "more_body": True})
            await asyncio.sleep(0)
        left.set()

    async def wait_for_disconnect(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    async with serving(flooding) as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            async with asyncio.timeout(20):
                await left.wait()
    assert left.is_set()


async def test_who_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_MAX_STALL_S", 0.5)
    size = 2 * KIB * KIB

    async def large(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * size})

    def read(port: int) -> int:
        num_bytes = 0
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)  # the kernel reads no more ahead
            client.connect(("127.0.0.1", port))
            client.sendall(b"GET / HTTP/1.0\r\nhost: a\r\n\r\n")
            while data := client.recv(128 * KIB):
                num_bytes += len(data)
                time.sleep(0.1)
        return num_bytes

    async with serving(large) as port:
        started_s = time.monotonic()
        assert await asyncio.to_thread(read, port) > size
        assert time.monotonic() - started_s > 1.0


async def test_large_bodies_and_many_requests_on_one_connection() -> None:
    app = Echo()
    async with serving(app) as port, connection(port) as (reader, writer):
        body = b"x" * (5 * KIB * KIB)
        writer.write(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body)
        await reader.readuntil(str(len(body)).encode())
        chunk = b"1000\r\n" + b"x" * 0x1000 + b"\r\n"
        writer.write(
            b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 100 + b"0\r\n\r\n"
        )
        await reader.readuntil(b"409600")
        for _ in range(500):  # far more than a head may have, together
            writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"a" * KIB + b"\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n0")
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 100)  # at once
        for _ in range(100):
            await reader.readuntil(b"\r\n\r\n0")
    assert len(app.scopes) == 602


async def test_after_a_refusal_the_rest_of_the_body_is_thrown_away() -> None:
    app = Echo()
    async with serving(app) as port, connection(port) as (reader, writer):
        size = 3 * KIB * KIB
        writer.write(b"POST /refused HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % size)
        writer.write(b"x" * size)
        await writer.drain()
        await reader.readuntil(b"\r\n\r\n0")
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n0")
    assert len(app.scopes) == 2


async def test_a_websocket_is_not_opened() -> None:
    app = Echo()
    async with serving(app) as port, connection(port) as (reader, writer):
        writer.write(
            b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b"101" not in await reader.readline()
    assert all(scope["type"] == "http" for scope in app.scopes)
