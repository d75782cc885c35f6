import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import pytest

from localmoe.cli import chat as chat_module
from localmoe.cli.chat import ChatClient, Conversation, Sampling, chat, converse
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineFaultError,
    InvalidRequestError,
    LocalMoEError,
    ModelNotFoundError,
)


def delta(text: str) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})


def sse(*events: str) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


class FakeServer:
    """Answers chat completions from a script, one entry a request: SSE bytes, or (status, JSON body).

    SSE bytes that do not end with an event go on with comments until the client leaves.
    """

    def __init__(self, *script: bytes | tuple[int, bytes], models: tuple[str, ...] = ("tiny",)) -> None:
        self.requests: list[dict[str, Any]] = []
        self._script: Iterator[bytes | tuple[int, bytes]] = iter(script)
        self._models = models
        self.ready_after = 0
        self.client_left = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _handler(fake) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - the handler below has the other self
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    models = [{"id": name, "object": "model"} for name in fake._models]
                    self.reply(200, json.dumps({"object": "list", "data": models}).encode())
                elif self.path == "/health/ready" and fake.ready_after > 0:
                    fake.ready_after -= 1
                    self.reply(503, b"{}")
                else:
                    self.reply(200, b"{}")

            def do_POST(self) -> None:
                fake.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = next(fake._script)
                if isinstance(answer, tuple):
                    self.reply(*answer)
                else:
                    self.reply(200, answer, "text/event-stream; charset=utf-8")
                    if not answer.endswith(b"\n\n"):
                        self.comment_until_client_leaves()

            def comment_until_client_leaves(self) -> None:
                with contextlib.suppress(ConnectionError):
                    for _ in range(1000):
                        time.sleep(0.01)
                        self.wfile.write(b": keep-alive\n")
                    return
                fake.client_left.set()

            def reply(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                """Be quiet."""

        return Handler


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    def feed(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    return feed


HELLO = sse(delta("Hel"), delta("lo"), "[DONE]")


def test_pipe_answers_each_line_and_remembers(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("one\n\ntwo\n")
    with FakeServer(HELLO, sse(delta("Bye"), "[DONE]")) as server:
        chat(url=server.url, system="Be brief.", temperature=0.0, max_tokens=5)
    assert capsys.readouterr() == ("Hello\nBye\n", "")
    assert server.requests[0] == {
        "model": "tiny",
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}],
    }
    assert server.requests[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "two"},
    ]


def test_clear_keeps_only_the_system_message(pipe: Any) -> None:
    pipe("one\n/clear\ntwo\n/exit\nthree\n")
    with FakeServer(HELLO, HELLO) as server:
        chat("named", url=server.url, system="S")
    assert [request["model"] for request in server.requests] == ["named", "named"]
    assert [m["content"] for m in server.requests[1]["messages"]] == ["S", "two"]


def test_comments_and_usage_chunks_are_no_text(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pipe("x\n")
    usage = json.dumps({"choices": [], "usage": {"total_tokens": 3}})
    role = json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    with FakeServer(b": keep-alive\n\n" + sse(role, delta("ok"), usage, "[DONE]")) as server:
        chat(url=server.url)
    assert capsys.readouterr().out == "ok\n"


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (sse(delta("Hel"), '{"error": {"message": "engine died"}}'), EngineFaultError, "engine died"),
        (sse(delta("Hel")), EngineFaultError, "before the answer was complete"),
        (sse(delta("Hel"), "{oops"), EngineFaultError, "oops"),
        ((404, b'{"error": {"message": "no model x"}}'), InvalidRequestError, "no model x"),
        ((503, b"<html>"), EngineFaultError, "HTTP 503"),
    ],
)
def test_a_failure_ends_a_pipe(
    script: Any, error: type[LocalMoEError], message: str, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("one\ntwo\n")
    with FakeServer(script) as server, pytest.raises(error, match=message):
        chat(url=server.url)
    assert len(server.requests) == 1
    assert capsys.readouterr().out == ("Hel\n" if isinstance(script, bytes) else "\n")


def test_a_failure_is_shown_and_forgotten_by_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    failure = sse(delta("Hel"), '{"error": {"message": "engine died"}}')
    with FakeServer(failure, HELLO) as server, chat_module.open_client(server.url) as http:
        conversation = Conversation(ChatClient(http), model="m", system=None, sampling=Sampling())
        converse(conversation, iter(["one", "two"]), interactive=True)
    assert capsys.readouterr() == ("Hel\nHello\n", "error: engine died\n")
    assert [m["content"] for m in server.requests[1]["messages"]] == ["two"]


def test_control_characters_do_not_reach_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        FakeServer(sse(delta("a\x1b[2J\tb\nc\x9b"), "[DONE]")) as server,
        chat_module.open_client(server.url) as http,
    ):
        conversation = Conversation(ChatClient(http), model="m", system=None, sampling=Sampling())
        converse(conversation, iter(["x"]), interactive=True)
    assert capsys.readouterr().out == "a[2J\tb\nc\n"


class InterruptedClient(ChatClient):
    """Ctrl-C arrives after the first piece of the first answer."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.closed = False

    def answer(self, model: str, messages: list[dict[str, str]], sampling: Sampling) -> Generator[str, None, None]:
        self.asked.append([message["content"] for message in messages])
        try:
            yield "Hel"
            if len(self.asked) == 1:
                signal.raise_signal(signal.SIGINT)
            yield "lo"
        finally:
            self.closed = True


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(capsys: pytest.CaptureFixture[str]) -> None:
    client = InterruptedClient()
    conversation = Conversation(client, model="m", system=None, sampling=Sampling())
    converse(conversation, iter(["one", "two"]), interactive=True)
    assert client.closed
    assert client.asked == [["one"], ["one", "Hel", "two"]]
    assert capsys.readouterr().out == "Hel\n(stopped)\nHello\n"


def test_terminal_session() -> None:
    """Through a real terminal: Ctrl-C closes the stream, the chat goes on, Ctrl-D leaves."""
    terminal, child_end = pty.openpty()
    code = "import typer; from localmoe.cli.chat import chat; typer.run(chat)"
    shown = b""

    def expect(text: bytes) -> None:
        nonlocal shown
        while text not in shown:
            assert select.select([terminal], [], [], 20)[0], f"{text!r} is not in {shown!r}"
            shown += os.read(terminal, 4096)
        shown = shown.partition(text)[2]

    with FakeServer(sse(delta("Hel")) + b": go on\n", HELLO) as server:
        command = [sys.executable, "-c", code, "--url", server.url]
        with subprocess.Popen(command, stdin=child_end, stdout=child_end, stderr=child_end) as process:
            try:
                expect(b"Chatting with tiny")
                expect(b"> ")
                os.write(terminal, b"one\n")
                expect(b"Hel")
                process.send_signal(signal.SIGINT)
                expect(b"(stopped)")
                assert server.client_left.wait(10)
                expect(b"> ")
                os.write(terminal, b"two\n")
                expect(b"Hello")
                expect(b"> ")
                os.write(terminal, b"\x04")
                assert process.wait(10) == 0
            finally:
                process.kill()
                os.close(terminal)
                os.close(child_end)
    assert [m["content"] for m in server.requests[1]["messages"]] == ["one", "Hel", "two"]


def test_ctrl_c_ends_a_pipe() -> None:
    conversation = Conversation(InterruptedClient(), model="m", system=None, sampling=Sampling())
    with pytest.raises(KeyboardInterrupt):
        converse(conversation, iter(["one"]), interactive=False)


def test_named_server_that_does_not_answer() -> None:
    with FakeServer() as server:
        url = server.url
    with pytest.raises(BackendUnavailableError, match=url):
        chat(url=url)


def test_server_without_a_model() -> None:
    with FakeServer(models=()) as server, pytest.raises(ModelNotFoundError, match=server.url):
        chat(url=server.url)


def test_local_server_is_used_when_it_is_ready(
    monkeypatch: pytest.MonkeyPatch, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe("one\n")
    with FakeServer(HELLO) as server:
        server.ready_after = 2
        monkeypatch.setenv("LOCALMOE_PORT", server.url.rpartition(":")[2])
        chat()
    assert server.ready_after == 0
    assert capsys.readouterr().out == "Hello\n"


def test_own_server_is_started_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class FakeProcess:
        def __init__(self, command: list[str]) -> None:
            started.append(command)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            started.append(["stopped"])

        def wait_listening(self, on_line: Any) -> str:
            on_line("[loading] 10 %")
            return server.url

        def check_alive(self) -> None:
            """It lives."""

    with FakeServer() as server:
        unused = FakeServer()
        monkeypatch.setenv("LOCALMOE_PORT", unused.url.rpartition(":")[2])
        unused._http.server_close()
        monkeypatch.setattr(chat_module, "ServerProcess", FakeProcess)
        monkeypatch.setattr(chat_module.signal, "signal", lambda *_: None)
        with ExitStack() as stack:
            assert chat_module._connect(stack, "some/path", None)[1] == "tiny"
            own = ["env", "LOCALMOE_GATEWAY__IDENTITY__MODE=open", sys.executable]
            assert started == [
                # Ours alone: it listens to this machine, and asks for no key.
                [*own, "-m", "localmoe", "serve", "--host", "127.0.0.1", "--port", "0", "--", "some/path"],
            ]
        assert started[-1] == ["stopped"]
