"""Engines that fail, clients that leave, and silence."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from localmoe.backends.scripted import ScriptedBackend, ScriptedFailure
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.events import EventBus, RequestFinished
from localmoe.core.request import Grammar, Request, TokenChunk
from localmoe.gateway.answering.grammar_checks import GrammarChecker
from localmoe.gateway.config import GatewayConfig
from localmoe.text.text_model import TextModel
from support.tiny_text import encode, scripted_app

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}

FAILURES = [
    (BackendUnavailableError("the engine is starting", retry_after_s=2.5), 503, "engine_unavailable"),
    (OverloadedError("the queue is full", retry_after_s=0.2), 503, "overloaded"),
    (EngineDiedError("the engine ended"), 503, "engine_died"),
    (EngineFaultError("out of memory in step 7"), 500, "engine_fault"),
]


@pytest.mark.parametrize(("error", "status", "code"), FAILURES)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_a_plain_error(
    serve, error: LocalMoEError, status: int, code: str, stream: bool
) -> None:
    async with serve(ScriptedBackend([5], failure=ScriptedFailure(error=error))) as client:
        response = await client.post(CHAT, json={**BODY, "stream": stream})
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"] == {
        "message": str(error),
        "type": "server_error",
        "param": None,
        "code": code,
    }
    assert ("x-should-retry" in response.headers) == (code == "engine_fault")
    if isinstance(error, BackendUnavailableError):
        assert int(response.headers["retry-after"]) == -(-error.retry_after_s // 1)
        assert int(response.headers["retry-after-ms"]) == error.retry_after_s * 1000


@pytest.mark.parametrize(("error", "status", "code"), FAILURES)
async def test_a_failure_in_the_stream_is_its_last_event(
    serve, text_model: TextModel, error: LocalMoEError, status: int, code: str
) -> None:
    ids = encode(text_model, "fox, dog")
    backend = ScriptedBackend(ids, failure=ScriptedFailure(error=error, after_tokens=2))
    async with serve(backend) as client:
        response = await client.post(CHAT, json={**BODY, "stream": True, "n": 2})
    assert response.status_code == 200
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert "[DONE]" not in response.text
    assert json.loads(lines[-1].removeprefix("data: ")) == {
        "error": {"message": str(error), "type": "server_error", "param": None, "code": code}
    }
    assert all("error" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])
    assert backend.num_running == 0


class Broken(ScriptedBackend):
    """Fails in ways that no engine should."""

    def __init__(self, how: str) -> None:
        super().__init__([5, 6, 7])
        self._how = how

    async def generate(self, request: Request):
        yield TokenChunk(request_id=request.id, token_ids=[40])
        if self._how == "cancel":
            raise asyncio.CancelledError
        if self._how == "crash":
            raise ZeroDivisionError("a secret of the house")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("crash", "the server failed on this request"),
        ("vanish", "without a finish reason"),
        ("cancel", "the engine broke the answer off"),
    ],
)
async def test_unexpected_failures_tell_no_secrets(
    serve, caplog: pytest.LogCaptureFixture, how: str, words: str, stream: bool
) -> None:
    async with serve(Broken(how)) as client:
        async with asyncio.timeout(5):
            response = await client.post(CHAT, json={**BODY, "stream": stream})
    assert response.status_code == (200 if stream else 500)
    last = response.text.removesuffix("\n\n").split("\n\n")[-1]
    assert words in json.loads(last.removeprefix("data: "))["error"]["message"]
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert ("a secret of the house" in caplog.text) == (how == "crash")


@pytest.mark.parametrize(("stream", "delay_s"), [(True, 0.15), (True, 0.0)])
async def test_silence_is_filled_with_comments(serve, text_model: TextModel, stream: bool, delay_s: float) -> None:
    backend = ScriptedBackend(encode(text_model, "fox"), delay_s=delay_s)
    async with serve(backend, config=GatewayConfig(keepalive_s=0.05)) as client:
        response = await client.post(CHAT, json={**BODY, "stream": stream})
    assert response.status_code == 200
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    comments = [block for block in blocks if block.startswith(":")]
    assert set(comments) <= {": keep-alive"}
    assert bool(comments) == bool(delay_s)
    assert blocks[-1] == "data: [DONE]"
    if delay_s:
        assert blocks[0] == ": keep-alive"


async def test_after_a_comment_a_failure_is_an_event(serve) -> None:
    failure = ScriptedFailure(error=EngineFaultError("broken"))
    backend = ScriptedBackend([5], delay_s=0.1, failure=failure)
    async with serve(backend, config=GatewayConfig(keepalive_s=0.03)) as client:
        response = await client.post(CHAT, json={**BODY, "stream": True})
    assert response.status_code == 200
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert blocks[0] == ": keep-alive"
    assert json.loads(blocks[-1].removeprefix("data: "))["error"]["code"] == "engine_fault"


async def test_so_is_a_failure_while_the_comment_goes_out(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes between the timer of a keep-alive and the task that this begins."""
    config = GatewayConfig(keepalive_s=0.2)

    async def fail_then(checker: GrammarChecker, grammar: Grammar, *, param: str) -> None:
        time.sleep(config.keepalive_s)  # noqa: ASYNC251 (nothing else runs until the timer is due)
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # meanwhile the timer runs
        raise EngineFaultError("broken")

    monkeypatch.setattr(GrammarChecker, "check", fail_then)
    async with serve(ScriptedBackend([5]), config=config) as client:
        response = await client.post(
            CHAT, json={**BODY, "stream": True, "response_format": {"type": "json_object"}}
        )
    assert response.status_code == 200
    comment, failure = response.text.removesuffix("\n\n").split("\n\n")
    assert comment == ": keep-alive"
    assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "engine_fault"


class Client:
    """One raw ASGI request whose client leaves when told to."""

    def __init__(self, app: Any, body: dict[str, Any], url: str = CHAT, *, padding: bytes = b"") -> None:
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self._body = [{"type": "http.request", "body": json.dumps(body).encode() + padding, "more_body": False}]
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "method": "POST",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("test", 80),
            "client": ("test", 1),
            "root_path": "",
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body:
            return self._body.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise TimeoutError


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("delay_s", [0.01, 30.0])
async def test_a_client_that_leaves_frees_the_engine(
    text_model: TextModel, stream: bool, n: int, delay_s: float
) -> None:
    outcomes: list[str] = []
    bus = EventBus()
    bus.subscribe(lambda event: outcomes.append(event.outcome) if isinstance(event, RequestFinished) else None)
    backend = ScriptedBackend([60] * 200, delay_s=delay_s)
    await backend.start()
    client = Client(scripted_app(text_model, backend, bus=bus), {**BODY, "stream": stream, "n": n})
    async with asyncio.timeout(5):
        await until(lambda: backend.num_running == n)
        await asyncio.sleep(0.05)
        client.left.set()
        await client.task
    assert backend.num_running == 0
    assert backend.num_cancelled == n
    assert outcomes == ["abort"] * n
    assert not any(message.get("body", b"").endswith(b"[DONE]\n\n") for message in client.sent)


async def test_a_server_that_stops_frees_the_engine(text_model: TextModel) -> None:
    backend = ScriptedBackend([60] * 200, delay_s=30)
    await backend.start()
    client = Client(scripted_app(text_model, backend), {**BODY, "stream": True})
    async with asyncio.timeout(5):
        await until(lambda: backend.num_running == 1)
        client.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await client.task
    assert backend.num_running == 0


async def test_cleaning_up_may_wait(text_model: TextModel) -> None:
    """A backend that must tell its engine of a cancellation gets to await while it closes."""
    told: list[str] = []

    class Telling(ScriptedBackend):
        async def generate(self, request: Request):
            try:
                async for chunk in super().generate(request):
                    yield chunk
            finally:
                await asyncio.sleep(0.02)
                told.append(request.id)

    backend = Telling([60] * 200, delay_s=0.01)
    await backend.start()
    client = Client(scripted_app(text_model, backend), {**BODY, "stream": True, "n": 2})
    async with asyncio.timeout(5):
        await until(lambda: len(client.sent) >= 5)
        client.left.set()
        await client.task
    assert len(told) == 2


async def test_a_stream_does_not_keep_what_was_asked(text_model: TextModel) -> None:
    backend = ScriptedBackend([60] * 200, delay_s=0.01)
    await backend.start()
    app, padding = scripted_app(text_model, backend), b" " * 2_000_000
    first = Client(app, {**BODY, "stream": True})
    async with asyncio.timeout(20):
        await until(lambda: len(first.sent) >= 3)  # what is made once has been
        tracemalloc.start()
        try:
            second = Client(app, {**BODY, "stream": True}, padding=padding)
            await until(lambda: len(second.sent) >= 3)
            num_bytes, most_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        for client in (first, second):
            client.left.set()
            await client.task
    assert num_bytes < len(padding) / 2 < most_bytes
