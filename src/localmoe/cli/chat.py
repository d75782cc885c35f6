"""`localmoe chat`: a conversation in the terminal, over the HTTP API that every other client uses."""

import io
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any, NoReturn

import httpx2
import msgspec
import typer
from rich.console import Console
from rich.markup import escape

from localmoe.cli.server_process import ServerProcess
from localmoe.config.settings import load_settings
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineFaultError,
    InvalidRequestError,
    LocalMoEError,
    ModelNotFoundError,
)

HELP = "/clear starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer."
# Answers may take any time to begin; everything else answers at once.
TIMEOUT = httpx2.Timeout(10.0, read=None)
PROBE_TIMEOUT_S = 2.0
READY_POLL_S = 0.1
# A model's words must not move the cursor or change the terminal: control characters but tab and newline.
CONTROLS = dict.fromkeys([c for c in (*range(0x20), *range(0x7F, 0xA0)) if chr(c) not in "\t\n"])

Message = dict[str, str]


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta


class _Error(msgspec.Struct):
    message: str


class _Chunk(msgspec.Struct):
    """One event of a streamed chat completion, or the error that ends it."""

    choices: list[_Choice] = []
    error: _Error | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


class _ModelCard(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_ModelCard]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a request carries beside the messages; None leaves the choice to the server."""

    temperature: float | None = None
    max_tokens: int | None = None


class ChatClient:
    """Asks one server. Every failure is a `LocalMoEError` whose message a person can read."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

    def is_live(self) -> bool:
        try:
            response = self._http.get("/health/live", timeout=PROBE_TIMEOUT_S)
        except httpx2.TransportError:
            return False
        return response.is_success

    def wait_ready(self, check_alive: Callable[[], None]) -> None:
        """Return once the server admits requests; `check_alive` raises if it never will."""
        while True:
            check_alive()
            try:
                if self._http.get("/health/ready", timeout=PROBE_TIMEOUT_S).is_success:
                    return
            except httpx2.TimeoutException:
                continue  # Busy loading.
            except httpx2.TransportError as error:
                check_alive()
                raise self._unreachable(error) from error
            time.sleep(READY_POLL_S)

    def first_model(self) -> str:
        try:
            response = self._http.get("/v1/models", timeout=PROBE_TIMEOUT_S)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if not response.is_success:
            raise refusal(response)
        try:
            models = msgspec.json.decode(response.content, type=_ModelList).data
        except msgspec.MsgspecError as error:
            raise EngineFaultError(f"{response.url} answers with something else than a model list") from error
        if not models:
            raise ModelNotFoundError(f"{self._http.base_url} serves no model")
        return models[0].id

    def answer(self, model: str, messages: list[Message], sampling: Sampling) -> Generator[str, None, None]:
        """Stream the answer's text. Closing the generator cancels the request.

        Raises:
            InvalidRequestError: the server refuses the request.
            EngineFaultError: the server failed, before or within the answer.
            BackendUnavailableError: there is no server, or it went away within the answer.
        """
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
        if sampling.temperature is not None:
            body["temperature"] = sampling.temperature
        if sampling.max_tokens is not None:
            body["max_tokens"] = sampling.max_tokens
        try:
            with self._http.sse("/v1/chat/completions", method="POST", json=body) as events:
                if not events.response.is_success:
                    events.response.read()
                    raise refusal(events.response)
                for event in events:
                    if event.data == "[DONE]":
                        return
                    yield from _texts(event.data)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        raise EngineFaultError("the server closed the stream before the answer was complete")

    def _unreachable(self, error: httpx2.TransportError) -> BackendUnavailableError:
        return BackendUnavailableError(f"no answer from {self._http.base_url}: {error}")


def _texts(data: str) -> Iterator[str]:
    try:
        chunk = msgspec.json.decode(data, type=_Chunk)
    except msgspec.MsgspecError as error:
        raise EngineFaultError(f"the server sent {data[:200]!r}, which is no chat completion chunk") from error
    if chunk.error is not None:
        raise EngineFaultError(chunk.error.message)
    for choice in chunk.choices:
        if choice.delta.content:
            yield choice.delta.content


def refusal(response: httpx2.Response) -> LocalMoEError:
    """What a server says in an answer that is no success."""
    try:
        message = msgspec.json.decode(response.content, type=_ErrorBody).error.message
    except msgspec.MsgspecError:
        message = f"{response.url} answers with HTTP {response.status_code}"
    return InvalidRequestError(message) if response.is_client_error else EngineFaultError(message)


class Conversation:
    """The messages so far, and how a line typed becomes the next two."""

    def __init__(self, client: ChatClient, *, model: str, system: str | None, sampling: Sampling) -> None:
        self._client = client
        self._model = model
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._sampling = sampling
        self.clear()

    def clear(self) -> None:
        self._messages = list(self._opening)

    def say(self, text: str, show: Callable[[str], None]) -> None:
        """Ask, pass the answer to `show` as it comes, remember both.

        A stopped answer (KeyboardInterrupt) is remembered as far as it came; after an error neither is.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        parts: list[str] = []
        try:
            with closing(self._client.answer(self._model, messages, self._sampling)) as answer:
                for part in answer:
                    parts.append(part)
                    show(part)
        except KeyboardInterrupt:
            if parts:
                self._messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
            raise
        finally:
            show("\n")
        self._messages = [*messages, {"role": "assistant", "content": "".join(parts)}]


def _typed_lines() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D; Ctrl-C drops the line being typed."""
    import readline  # noqa: F401 - gives input() editing and history

    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def converse(conversation: Conversation, lines: Iterator[str], *, interactive: bool) -> None:
    """Answer line by line. In a pipe the first error ends it; a person sees the error and goes on."""
    for line in lines:
        text = line.strip()
        if text == "/exit":
            return
        if text == "/clear":
            conversation.clear()
        elif text and not interactive:
            conversation.say(text, _show)
        elif text:
            try:
                conversation.say(text, lambda part: _show(part.translate(CONTROLS)))
            except KeyboardInterrupt:
                print("(stopped)")
            except LocalMoEError as error:
                print(f"error: {error}", file=sys.stderr)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def open_client(url: str, *, api_key: str | None = None) -> httpx2.Client:
    """For requests to a server, which is shown the key. Raises BackendUnavailableError where `url` is none."""
    try:
        is_loopback = httpx2.URL(url).host in {"127.0.0.1", "::1", "localhost"}
    except httpx2.InvalidURL as error:
        raise BackendUnavailableError(f"--url {url!r}: {error}; it must be as http://127.0.0.1:8000") from error
    # A proxy from the environment leads to other machines, never to this one.
    headers = None if api_key is None else {"authorization": f"Bearer {api_key}"}
    return httpx2.Client(base_url=url, timeout=TIMEOUT, headers=headers, trust_env=not is_loopback)


def _connect(stack: ExitStack, model: str | None, url: str | None) -> tuple[ChatClient, str]:
    """A client for the server to talk to, and the model's name there; what was started ends with `stack`."""
    settings = load_settings()
    if url is not None:
        client = ChatClient(stack.enter_context(open_client(url, api_key=settings.api_key)))
        return client, model or client.first_model()
    local_url = f"http://{settings.host}:{settings.port}"
    with Console(stderr=True).status("Looking for a server …") as status:
        client = ChatClient(stack.enter_context(open_client(local_url, api_key=settings.api_key)))
        if client.is_live():
            status.update("Waiting for the server to be ready …")
            client.wait_ready(lambda: None)
            return client, model or client.first_model()
        status.update("Starting a server …")
        # Without these the child, which has a session of its own, would outlive us.
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _exit_on_signal)
        # It is ours alone, so it listens to this machine and asks for no key.
        command = ["env", "LOCALMOE_GATEWAY__IDENTITY__MODE=open", sys.executable, "-m", "localmoe", "serve"]
        command += ["--host", "127.0.0.1", "--port", "0", *(["--", model] if model else [])]
        server = stack.enter_context(ServerProcess(command))
        own_url = server.wait_listening(lambda line: status.update(escape(line)))
        client = ChatClient(stack.enter_context(open_client(own_url)))
        status.update("Loading the model …")
        client.wait_ready(server.check_alive)
        return client, client.first_model()


def chat(
    model: Annotated[str | None, typer.Argument(help="The model; by default the server's first.")] = None,
    url: Annotated[
        str | None,
        typer.Option(help="The server; by default the local one, started if there is none."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0, help="0: the likeliest token.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of one answer.")] = None,
) -> None:
    """Chat with a model in the terminal, or answer each line of a pipe.

    Examples:

      localmoe chat

      localmoe chat --system "Answer in one sentence." --temperature 0

      echo "What is a mixture of experts?" | localmoe chat --url http://127.0.0.1:8000
    """
    with ExitStack() as stack:
        client, name = _connect(stack, model, url)
        sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
        conversation = Conversation(client, model=name, system=system, sampling=sampling)
        interactive = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # what is not text cannot be sent
        if interactive:
            print(f"Chatting with {name}. {HELP}")
        converse(conversation, _typed_lines() if interactive else iter(sys.stdin), interactive=interactive)
