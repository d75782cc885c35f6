"""Another server as an engine: what it is asked, what its answers become, and all that it may do wrong."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvicorn
from aiohttp import web

from localmoe.backends.base import Backend
from localmoe.backends.remote import RemoteBackend
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InvalidRequestError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.request import (
    UNBOUNDED_TOKENS,
    FinishReason,
    PromptSource,
    Request,
    SamplingParams,
    TokenChunk,
    Usage,
)
from localmoe.text.text_model import TextModel
from support.dispatching import dispatching
from support.fake_openai import DONE, FakeOpenAI, chunk, counts
from support.tiny_text import encode, scripted_app, write_tiny_text_model

KEY = "sk-very-secret-0123456789"
HELLO = [chunk(""), chunk("hel"), chunk("lo"), chunk(None, "stop"), counts(7, 2), DONE]


def request(source: PromptSource | None = None, prompt_ids: tuple[int, ...] = (), **sampling: Any) -> Request:
    return Request(
        id="r",
        model="m",
        prompt_ids=list(prompt_ids),
        sampling=SamplingParams(**{"max_tokens": 10, **sampling}),
        source=source or PromptSource(text="hi"),
    )


def config(url: str, **fields: Any) -> RemoteConfig:
    quick = {"connect_timeout_s": 2.0, "start_timeout_s": 0.3, "health_interval_s": 0.02}
    return RemoteConfig(**{"url": url, "model": "there", "api_key": KEY, **quick, **fields})


@asynccontextmanager
async def remote(server: FakeOpenAI, **fields: Any) -> AsyncIterator[RemoteBackend]:
    async with server.running():
        backend = RemoteBackend(config=config(server.url, **fields))
        await backend.start()
        try:
            yield backend
        finally:
            await backend.stop()


async def answer(backend: RemoteBackend, asked: Request | None = None) -> list[TokenChunk]:
    async with aclosing(backend.generate(asked or request())) as chunks:
        return [chunk async for chunk in chunks]


def piece(**delta: Any) -> bytes:
    """A chunk of a chat's stream with something else than content."""
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}]}).encode() + b"\n\n"


async def test_a_request_with_an_adapter_names_it() -> None:
    server = FakeOpenAI(HELLO)
    async with remote(server) as backend:
        for asked in (request(), msgspec.structs.replace(request(), adapter="l")):
            assert await answer(backend, asked)
    assert [body["model"] for _, body in server.bodies] == ["there", "l"]


async def test_tool_calls_and_reasoning_are_passed_on() -> None:
    server = FakeOpenAI(
        [
            piece(role="assistant", content=None, reasoning="Hm"),
            piece(reasoning_content="."),
            piece(tool_calls=[{"index": 3, "id": "a", "function": {"name": "f", "arguments": ""}}]),
            piece(tool_calls=[{"index": 3, "function": {"arguments": "{"}}]),
            piece(tool_calls=[{"index": 4, "function": {"name": "g", "arguments": "{}"}}]),
            piece(tool_calls=[{"index": 3, "function": {"name": "f", "arguments": "}"}}]),
            chunk(None, "tool_calls"),
            DONE,
        ]
    )
    parameters = {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "auto"}
    source = PromptSource(messages=[{"role": "user", "content": "hi"}], parameters=parameters)
    async with remote(server) as backend:
        chunks = await answer(backend, request(source))
    assert {name: server.bodies[0][1][name] for name in parameters} == parameters
    assert "".join(chunk.reasoning for chunk in chunks) == "Hm."
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert [(call.index, call.name, call.arguments) for call in calls] == [
        (0, "f", ""),
        (0, None, "{"),
        (1, "g", "{}"),
        (0, None, "}"),
    ]
    assert (calls[0].id, bool(calls[2].id)) == ("a", True)
    assert chunks[-1].finish_reason == FinishReason.TOOL_CALLS


async def test_calls_that_all_have_one_number_are_told_apart_by_their_ids() -> None:
    server = FakeOpenAI(
        [
            piece(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x":'}}]),
            piece(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": "1}"}}]),
            piece(tool_calls=[{"index": 0, "id": "b", "function": {"name": "g", "arguments": ""}}]),
            piece(tool_calls=[{"index": 0, "id": "c", "function": {"arguments": '{"y":2}'}}]),
            piece(tool_calls=[{"index": 0, "id": "d", "function": {"name": "g", "arguments": "{}"}}]),
            chunk(None, "tool_calls"),
            DONE,
        ]
    )
    async with remote(server) as backend:
        chunks = await answer(backend, request(PromptSource(messages=[{"role": "user", "content": "hi"}])))
    calls = [call for chunk in chunks for call in chunk.tool_calls]
    assert [(call.index, call.id, call.name, call.arguments) for call in calls] == [
        (0, "a", "f", '{"x":'),
        (0, None, None, "1}"),
        (1, "b", "g", ""),
        (1, None, None, '{"y":2}'),
        (2, "d", "g", "{}"),
    ]


async def test_a_piece_of_a_call_that_has_not_begun_is_a_fault() -> None:
    server = FakeOpenAI([piece(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]), DONE])
    assert isinstance(await failure(server), EngineFaultError)


async def failure(server: FakeOpenAI) -> LocalMoEError:
    async with remote(server) as backend:
        with pytest.raises(LocalMoEError) as caught:
            await answer(backend)
    assert KEY not in str(caught.value)
    return caught.value


async def until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - there is nothing to wait on
            await asyncio.sleep(0.005)


async def test_an_answer() -> None:
    async with remote(FakeOpenAI(list(HELLO))) as backend:
        as_backend: Backend = backend
        assert (as_backend.is_ready, as_backend.capacity) == (True, 64)
        chunks = await answer(backend)
    assert chunks == [
        TokenChunk(request_id="r", text="hel"),
        TokenChunk(request_id="r", text="lo"),
        TokenChunk(
            request_id="r", finish_reason=FinishReason.STOP, usage=Usage(prompt_tokens=7, completion_tokens=2)
        ),
    ]


async def test_what_servers_vary_in() -> None:
    """Comments, other fields, line ends, a completion's text, an end beside the last text, cached tokens."""
    details = {"prompt_tokens_details": {"cached_tokens": 4}}
    pieces: list[Any] = [
        b": keep-alive\r\n\r\nevent: message\nid: 5\nretry: 10\n",
        b'data:{"choices":[{"text":"h\\u00e9"}],"usage":null}\r\n\r\n',
        b'data: {"choices":[{"text":"!","finish_reason":"length"}]}\n',
        counts(7, 2, **details),
    ]
    async with remote(FakeOpenAI(pieces)) as backend:
        first, second, last = await answer(backend)
    assert (first.text, second.text, last.text) == ("hé", "!", None)
    assert last.finish_reason == FinishReason.LENGTH
    assert last.usage == Usage(prompt_tokens=7, completion_tokens=2, cached_tokens=4)


async def test_text_cut_anywhere_arrives_whole() -> None:
    stream = b"".join([chunk("世界"), chunk(None, "stop"), DONE])
    async with remote(FakeOpenAI([stream[i : i + 1] for i in range(len(stream))])) as backend:
        assert "".join(chunk.text or "" for chunk in await answer(backend)) == "世界"


async def test_what_it_is_asked() -> None:
    server = FakeOpenAI(list(HELLO))
    messages = [{"role": "user", "content": "hi"}]
    sampling = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "logit_bias": {5: -1.5}, "presence_penalty": 0.25}
    stops = tuple("abcdef")
    async with remote(server) as backend:
        await answer(backend, request(PromptSource(messages=messages, stop=stops), **sampling))
        await answer(backend, request(PromptSource(text="x"), max_tokens=UNBOUNDED_TOKENS))
    common = {
        "model": "there",
        "stream": True,
        "stream_options": {"include_usage": True},
        "frequency_penalty": 0.0,
    }
    assert server.bodies == [
        (
            "/v1/chat/completions",
            {
                **common,
                **sampling,
                "messages": messages,
                "max_tokens": 10,
                "logit_bias": {"5": -1.5},
                "stop": ["a", "b", "c", "d"],
            },
        ),
        ("/v1/completions", {**common, "prompt": "x", "temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0}),
    ]
    assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"] * 2


@pytest.mark.parametrize(
    ("sampling", "named"),
    [
        ({}, None),
        ({"top_k": 5}, "top_k"),
        ({"top_k": 5, "temperature": 0.0}, None),
        ({"min_p": 0.1}, "min_p"),
        ({"min_p": 0.1, "temperature": 0.0}, None),
        ({"repetition_penalty": 1.1, "temperature": 0.0}, "repetition_penalty"),
        ({"logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop_token_ids": (2,)}, "stop_token_ids"),
    ],
)
def test_what_it_is_not_asked(sampling: dict[str, Any], named: str | None) -> None:
    backend = RemoteBackend(config=config("http://localhost/v1"))
    refusal = backend.refusal(request(**sampling))
    assert (refusal is None) if named is None else (refusal is not None and named in refusal.split())


def test_what_else_it_is_not_asked() -> None:
    backend = RemoteBackend(config=config("http://localhost/v1"))
    sampling = SamplingParams(max_tokens=5, stop_token_ids=(2,))
    ids_only = Request(id="r", model="m", prompt_ids=[1], sampling=sampling)
    assert "token ids" in (backend.refusal(ids_only) or "")
    with_source = Request(id="r", model="m", prompt_ids=[1], sampling=sampling, source=PromptSource(text="x"))
    assert backend.refusal(with_source) is None  # those are the model's own
    resumed = Request(
        id="r", model="m", prompt_ids=[1], sampling=sampling, source=PromptSource(text="x"), resumed_ids=[5]
    )
    assert "begun" in (backend.refusal(resumed) or "")


async def test_closing_an_answer_cancels_it() -> None:
    server = FakeOpenAI([chunk("a"), asyncio.Event()])
    async with remote(server) as backend:
        async with aclosing(backend.generate(request())) as chunks:
            assert (await anext(chunks)).text == "a"
        async with asyncio.timeout(5):
            await server.gone.wait()


async def test_cancelling_before_the_answer_begins_cancels_it_too() -> None:
    server = FakeOpenAI([asyncio.Event()])
    async with remote(server) as backend:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1), aclosing(backend.generate(request())) as chunks:
                await anext(chunks)
        async with asyncio.timeout(5):
            await server.gone.wait()


async def test_a_connection_is_used_again() -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in HELLO:
            await response.write(piece)
        await asyncio.sleep(0.005)  # and only then says that this was all
        return response

    server = FakeOpenAI(respond=respond)
    async with remote(server) as backend:
        for _ in range(3):
            await answer(backend)
    assert len(server.peers) == 1


async def test_counts_that_never_come_do_not_hold_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.backends.remote._USAGE_WAIT_S", 0.1)
    for end in (asyncio.Event(), None):
        async with remote(FakeOpenAI([chunk("a", "stop"), end])) as backend:
            began_s = time.monotonic()
            assert await answer(backend) == [
                TokenChunk(request_id="r", text="a"),
                TokenChunk(request_id="r", finish_reason=FinishReason.STOP),
            ]
            assert time.monotonic() - began_s < 2


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([chunk("a"), None], EngineDiedError),
        ([chunk("a")], EngineFaultError),
        ([chunk("a"), DONE], EngineFaultError),
        ([chunk("a", "content_filter"), DONE], EngineFaultError),
        ([b"data: {nonsense\n\n"], EngineFaultError),
        ([b"data: \xff\n\n"], EngineFaultError),
        ([b"data: " + b"[" * 5000 + b"\n\n"], EngineFaultError),
        ([b'data: {"choices": 5}\n\n'], EngineFaultError),
        ([b'data: {"choices":[{"text":"\\ud800"}]}\n\n'], EngineFaultError),
        ([b"<html>hello</html>\n"], EngineFaultError),
        ([b"data: " + b"x" * 300_000] * 5, EngineFaultError),
        ([b"data: " + b"x" * 3_000_000 + b"\n"], EngineFaultError),
        ([chunk("a", "stop"), counts(-1, 5)], EngineFaultError),
        ([b'data: {"error":{"message":"out of\\nmemory ' + KEY.encode() + b'"}}\n\n'], EngineFaultError),
    ],
)
async def test_answers_that_are_none(pieces: list[Any], error: type[LocalMoEError]) -> None:
    assert type(await failure(FakeOpenAI(pieces))) is error


def says(status: int, body: Any = None, **headers: str) -> FakeOpenAI:
    async def respond(request: web.Request) -> web.StreamResponse:
        said = {} if body is None else {"text": body} if isinstance(body, str) else {"data": body}
        make = web.json_response if "data" in said else web.Response
        return make(
            status=status, headers={name.replace("_", "-"): value for name, value in headers.items()}, **said
        )

    return FakeOpenAI(respond=respond)


@pytest.mark.parametrize(
    ("server", "error", "message"),
    [
        (says(400, {"error": {"message": "too long"}}), InvalidRequestError, "too long"),
        (says(404, {"error": "no such model"}), EngineFaultError, "no such model"),
        (says(422, {"detail": "bad\x00\nfield"}), InvalidRequestError, "bad field"),
        (says(422, {"detail": [{"loc": ["x"]}]}), InvalidRequestError, "HTTP status 422"),
        (says(413, "<html>"), InvalidRequestError, "HTTP status 413"),
        (says(400, {"error": {"message": f"got {KEY} " + "x" * 5000}}), InvalidRequestError, "got *** xxx"),
        (says(429, {"message": "slow down"}), OverloadedError, "slow down"),
        (says(500, {"error": {"message": "oops"}}), EngineFaultError, "oops"),
        (says(503), BackendUnavailableError, "503"),
        (says(502, "<html>" * 100_000), BackendUnavailableError, "502"),
        (says(402, {"error": {"message": "pay"}}), EngineFaultError, "pay"),
        (says(301, location="http://127.0.0.1:9/v1"), EngineFaultError, "redirect"),
        (says(200, {"choices": []}), EngineFaultError, "no stream"),
    ],
)
async def test_refusals(server: FakeOpenAI, error: type[LocalMoEError], message: str) -> None:
    raised = await failure(server)
    assert type(raised) is error
    assert message in str(raised)
    assert len(str(raised)) < 400


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_is_not_accepted(status: int, caplog: pytest.LogCaptureFixture) -> None:
    raised = await failure(says(status, {"error": {"message": f"Incorrect API key {KEY[:8]}***{KEY[-4:]}"}}))
    assert type(raised) is EngineFaultError
    assert "key" in str(raised)
    assert "key" in caplog.text
    assert KEY[:8] not in str(raised) + caplog.text


@pytest.mark.parametrize(
    ("headers", "after_s"),
    [
        ({"retry_after": "7"}, 7.0),
        ({"retry_after_ms": "1500", "retry_after": "2"}, 1.5),
        ({"retry_after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 1.0),
        ({"retry_after": "-5"}, 1.0),
        ({"retry_after": "nan"}, 1.0),
        ({"retry_after": "1e300"}, 600.0),
        ({}, 1.0),
    ],
)
async def test_when_to_try_again(headers: dict[str, str], after_s: float) -> None:
    for status in (429, 503):
        raised = await failure(says(status, **headers))
        assert isinstance(raised, BackendUnavailableError)
        assert raised.retry_after_s == after_s


async def test_a_body_that_hangs_after_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localmoe.backends.remote_wire._COMPLAINT_WAIT_S", 0.1)

    async def respond(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=500)
        await response.prepare(request)
        await response.write(b'{"error')
        await asyncio.Event().wait()
        return response

    raised = await failure(FakeOpenAI(respond=respond))
    assert "HTTP status 500" in str(raised)


async def test_nobody_there() -> None:
    server = FakeOpenAI()
    async with remote(server) as backend:
        pass
    with pytest.raises(BackendUnavailableError):
        await answer(backend)  # it was stopped
    backend = RemoteBackend(config=config(server.url))
    began_s = time.monotonic()
    with pytest.raises(EngineStartError, match="Connection refused"):
        await backend.start()
    assert time.monotonic() - began_s < 2
    assert not backend.is_ready


async def test_a_host_that_is_not_known() -> None:
    async with remote(FakeOpenAI()) as backend:
        backend._url = "http://nobody.invalid/v1"
        with pytest.raises(BackendUnavailableError, match=r"name is not known|in time"):
            await answer(backend)


async def test_a_port_that_speaks_something_else() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n" + b"x" * 100_000)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(EngineStartError, match="no HTTP"):
            await RemoteBackend(config=config(f"http://127.0.0.1:{port}/v1")).start()
        with pytest.raises(EngineStartError, match="not ready"):
            await RemoteBackend(config=config(f"https://127.0.0.1:{port}/v1")).start()


async def test_a_connection_that_is_never_taken_up() -> None:
    """TLS that nobody answers: the connection is there and yet not."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = FakeOpenAI()
    async with (
        remote(server, connect_timeout_s=0.2) as backend,
        await asyncio.start_server(handle, "127.0.0.1", 0) as silent,
    ):
        backend._url = f"https://127.0.0.1:{silent.sockets[0].getsockname()[1]}/v1"
        began_s = time.monotonic()
        with pytest.raises(BackendUnavailableError, match="in time"):
            await answer(backend)
        assert time.monotonic() - began_s < 2


async def test_it_waits_for_a_server_that_starts() -> None:
    server = FakeOpenAI()
    looks = 0

    async def loading(request: web.Request) -> web.StreamResponse:
        nonlocal looks
        looks += 1
        return web.json_response({"data": []} if looks > 1 else {}, status=200 if looks > 1 else 503)

    server.models = loading
    async with remote(server, start_timeout_s=5.0) as backend:
        assert backend.is_ready
    assert looks >= 2


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [(401, {}, "key"), (404, {}, "404"), (200, {"hello": 1}, "no list of models"), (302, {}, "302")],
)
async def test_starts_that_fail(status: int, body: dict[str, Any], reason: str) -> None:
    server = FakeOpenAI()

    async def models(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={"location": "/v1/other"} if status == 302 else {})

    server.models = models
    with pytest.raises(EngineStartError, match=reason):
        async with remote(server):
            pass


async def test_it_follows_whether_the_server_is_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server = FakeOpenAI(list(HELLO))
    async with remote(server) as backend:

        async def away(request: web.Request) -> web.StreamResponse:
            return web.Response(status=503)

        server.models = away
        await until(lambda: not backend.is_ready)
        server.models = None
        await until(lambda: backend.is_ready)
        assert [record.message.split(" is ")[1] for record in caplog.records if " is " in record.message] == [
            "not there: it answers GET /models with HTTP status 503",
            "there again",
        ]


async def test_a_model_that_is_not_listed_is_said(caplog: pytest.LogCaptureFixture) -> None:
    async with remote(FakeOpenAI(), model="absent"):
        assert "'absent'" in caplog.text


async def test_stopping_fails_what_is_under_way_and_can_be_followed_by_a_start() -> None:
    server = FakeOpenAI([chunk("a"), asyncio.Event()])
    async with remote(server) as backend:
        async with aclosing(backend.generate(request())) as chunks:
            await anext(chunks)
            await backend.stop()
            assert not backend.is_ready
            with pytest.raises(BackendUnavailableError):
                async with asyncio.timeout(5):
                    await anext(chunks)
        server.pieces = list(HELLO)
        await backend.start()
        assert len(await answer(backend)) == 3


async def test_the_environment_names_no_proxy_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with remote(FakeOpenAI(list(HELLO))) as backend:
        assert len(await answer(backend)) == 3


async def test_compressed_answers_are_not_taken() -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "identity"
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        response.enable_compression(web.ContentCoding.gzip)
        await response.prepare(request)
        for piece in HELLO:
            await response.write(piece)
        return response

    assert type(await failure(FakeOpenAI(respond=respond))) is EngineFaultError


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "ftp://x/v1"},
        {"url": "http://x"},
        {"url": "http:///v1"},
        {"url": "http://x/v1?a=b"},
        {"url": "http://x:99999/v1"},
        {"url": "http://[x/v1"},
        {"url": "http://x/a\nb/v1"},
        {"model": ""},
        {"capacity": 0},
        {"connect_timeout_s": float("inf")},
        {"health_interval_s": float("nan")},
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        config(**{"url": "http://x/v1", **fields})


@pytest.mark.parametrize("fields", [{"api_key": f"{KEY}\n"}, {"api_key": ""}, {"url": f"http://me:{KEY}@x/v1"}])
def test_settings_that_cannot_be_and_are_not_shown(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        config(**{"url": "http://x/v1", **fields})
    assert KEY not in str(caught.value)


def test_a_key_is_not_printed() -> None:
    assert KEY not in repr(config("http://x/v1/"))


async def test_another_engine_answers_for_one_that_sends_garbage_or_nothing() -> None:
    for pieces in ([b"garbage\n"], [asyncio.Event()]):
        async with FakeOpenAI([*pieces]).running() as server:
            engines = {"remote": RemoteBackend(config=config(server.url)), "other": ScriptedBackend([5, 6])}
            async with dispatching(engines, stall_timeout_s=0.2, request_timeout_s=3.0) as (dispatcher, _):
                began_s = time.monotonic()
                for _ in range(2):  # each has its turn
                    async with aclosing(dispatcher.generate(request())) as chunks:
                        ids = [token_id async for chunk in chunks for token_id in chunk.token_ids]
                    assert ids == [5, 6]
                assert time.monotonic() - began_s < 3


async def test_a_server_of_our_own(tmp_path: Path) -> None:
    """Over a real gateway, through which text comes whole and in which a closed answer is cancelled."""
    text_model = TextModel.load(write_tiny_text_model(tmp_path))
    engine = ScriptedBackend(encode(text_model, "Grüße 世界"))
    await engine.start()
    server = uvicorn.Server(uvicorn.Config(scripted_app(text_model, engine), port=0, log_level="error", ws="none"))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    backend = RemoteBackend(config=config(f"http://127.0.0.1:{port}/v1", model="tiny"))
    await backend.start()
    try:
        for source in (PromptSource(text="hi"), PromptSource(messages=[{"role": "user", "content": "hi"}])):
            chunks = await answer(backend, request(source, max_tokens=50))
            assert "".join(chunk.text or "" for chunk in chunks) == "Grüße 世界"
            usage = chunks[-1].usage
            assert usage is not None
            assert (chunks[-1].finish_reason, usage.prompt_tokens > 0) == (FinishReason.STOP, True)
        with pytest.raises(InvalidRequestError, match="max_tokens"):
            await answer(backend, request(max_tokens=5000))
        engine._delay_s = 3.0
        stream = backend.generate(request(max_tokens=50))
        waiting = asyncio.ensure_future(anext(stream))
        await until(lambda: engine.num_running == 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        began_s = time.monotonic()
        await until(lambda: engine.num_running == 0)
        assert time.monotonic() - began_s < 3
    finally:
        await backend.stop()
        server.should_exit = True
        await serving
