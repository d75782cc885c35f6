"""Speaks with one vLLM server: token ids in, token ids out, over its `/v1/completions`.

Each request has a task that reads the server's answer and fills a queue, which `generate` empties; closing the
generator cancels the task, which closes the connection, upon which vLLM forgets the request. `fail` gives all open
requests the same error, so that whoever finds out that the server is gone or hangs need not wait for anybody.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import msgspec

from localmoe.backends.hang_clock import HangClock
from localmoe.backends.vllm_answers import Answer, AnswerError, Metrics, Reading, WriteGrammar, decode, question
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    InvalidRequestError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.request import Request, TokenChunk

_CONNECT_TIMEOUT_S = 10.0
_KEEPALIVE_S = 4.0
"""Servers close idle connections after 5 s or more; a request that meets the closing one would fail."""
_ASK_TIMEOUT_S = 10.0
"""For questions that are answered without computing."""
_LINE_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 1 << 28


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    parent: str | None = None
    """Of an adapter: the model that it is for."""


class _ModelList(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[int]


@dataclass(frozen=True, kw_only=True)
class ServerModel:
    """What a server serves."""

    name: str
    max_context_tokens: int | None
    """Longest sequence; None: it does not say."""
    adapters: Sequence[str]
    """Their names."""


class VllmClient:
    """One server.

    Args:
        url: its root, as http://host:8000.
        socket: its Unix domain socket, where it has one in place of a port; the URL's host is then no matter.
        vocab_size: of the model; other ids are garbage.
        api_key: sent as a bearer token.
        write_grammar: see `vllm_answers.question`.
    """

    def __init__(
        self,
        *,
        url: str,
        socket: Path | None = None,
        vocab_size: int,
        api_key: str | None = None,
        write_grammar: WriteGrammar | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._write_grammar = write_grammar
        self._vocab_size = vocab_size
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
            if socket is None
            else aiohttp.UnixConnector(str(socket), limit=0, keepalive_timeout=_KEEPALIVE_S)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            read_bufsize=_LINE_BYTES,
            trust_env=False,
        )
        self._streams: set[asyncio.Queue[TokenChunk | LocalMoEError]] = set()
        self._broken: str | None = None
        self.hang_clock = HangClock()

    async def close(self) -> None:
        """Open requests fail."""
        self.fail("the connection to vLLM was closed")
        await self._session.close()

    def fail(self, reason: str) -> None:
        """Fail what is open, and all that follows: the server is gone."""
        self._broken = self._broken or reason
        for stream in self._streams:
            stream.put_nowait(EngineDiedError(reason))

    async def generate(self, request: Request, model: str) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`.

        Args:
            model: the server's name of the model.

        Raises:
            InvalidRequestError: vLLM does not take the request.
            OverloadedError: its queue is full.
        """
        if self._broken is not None:
            raise EngineDiedError(self._broken)
        num_resumed, max_tokens = len(request.resumed_ids), request.sampling.max_tokens
        if num_resumed >= max(1, max_tokens):
            raise InvalidRequestError(f"{num_resumed} tokens were generated already, of at most {max_tokens}")
        stream: asyncio.Queue[TokenChunk | LocalMoEError] = asyncio.Queue()
        self._streams.add(stream)
        self.hang_clock.begin()
        reader = asyncio.create_task(self._read(request, model, stream))
        reader.add_done_callback(lambda _: self.hang_clock.end())  # whoever reads slowly waits for vLLM no more
        try:
            while True:
                item = await stream.get()
                if isinstance(item, LocalMoEError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._streams.discard(stream)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def is_healthy(self) -> bool:
        """Whether the server says that it can compute. One whose engine hangs says so, too."""
        try:
            async with self._session.get(f"{self._url}/health", timeout=_quick()) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def model(self, name: str) -> ServerModel:
        """The model of this name, or the only one that the server has.

        Raises:
            BackendUnavailableError: the server does not answer, or has several others.
        """
        listed = decode(await self._ask("GET", "/v1/models"), _ModelList).data
        models = [model for model in listed if model.parent is None]
        found = [model for model in models if model.id == name] or models
        if len(found) != 1:
            known = ", ".join(model.id for model in models) or "none"
            raise BackendUnavailableError(f"the vLLM server serves no model {name!r}; it has {known}")
        return ServerModel(
            name=found[0].id,
            max_context_tokens=found[0].max_model_len,
            adapters=[model.id for model in listed if model.parent is not None],
        )

    async def tokenize(self, model: str, text: str) -> list[int]:
        """What the server's tokenizer makes of a text, without tokens around it.

        Raises:
            BackendUnavailableError: the server does not answer, or has no tokenizer.
        """
        question = {"model": model, "prompt": text, "add_special_tokens": False}
        return decode(await self._ask("POST", "/tokenize", question), _Tokens).tokens

    async def metrics(self) -> "Metrics":
        """What its `/metrics` say now.

        Raises:
            BackendUnavailableError: the server does not answer.
        """
        return Metrics((await self._ask("GET", "/metrics")).decode(errors="replace"))

    async def _ask(self, method: str, path: str, question: object = None) -> bytes:
        body = None if question is None else msgspec.json.encode(question)
        try:
            async with self._session.request(
                method, self._url + path, data=body, headers=_JSON, timeout=_quick()
            ) as response:
                answer = await _read_all(response)
                if response.status != 200:
                    raise BackendUnavailableError(f"vLLM answers {response.status} to {path}: {_message(answer)}")
                return answer
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise BackendUnavailableError(f"vLLM does not answer to {path}: {_said(error)}") from error

    async def _read(
        self, request: Request, model: str, stream: "asyncio.Queue[TokenChunk | LocalMoEError]"
    ) -> None:
        try:
            async with contextlib.aclosing(self._chunks(request, model)) as chunks:
                async for chunk in chunks:
                    self.hang_clock.heard()
                    stream.put_nowait(chunk)
        except LocalMoEError as error:
            stream.put_nowait(error)
        except aiohttp.ClientConnectorError as error:  # it never had the request
            stream.put_nowait(BackendUnavailableError(f"vLLM cannot be reached: {_said(error)}"))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            stream.put_nowait(EngineDiedError(f"vLLM cannot be reached: {_said(error)}"))
        except Exception as error:  # a line that is too long, an answer of a form that nobody foresaw
            stream.put_nowait(EngineFaultError(f"vLLM's answer cannot be understood: {_said(error)}"))

    async def _chunks(self, request: Request, model: str) -> AsyncGenerator[TokenChunk, None]:
        """The answer as the server gives it, checked."""
        # Log-probabilities of the prompt come with whole answers only.
        streams = request.sampling.prompt_logprobs is None
        body = msgspec.json.encode(question(request, model, stream=streams, write_grammar=self._write_grammar))
        async with self._session.post(
            f"{self._url}/v1/completions", data=body, headers=_JSON, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise await self._failure(response.status, await _read_all(response), response.headers)
            pieces = _events(response) if streams else _whole(response)
            reading = Reading(request, self._vocab_size)
            async with contextlib.aclosing(pieces):
                async for data in pieces:
                    answer = decode(data, Answer)
                    if answer.error is not None:
                        raise await self._failure(_status(answer.error), data, response.headers)
                    for chunk in reading.take(answer):
                        yield chunk
            yield reading.end()

    async def _failure(self, status: int, body: bytes, headers: Mapping[str, str]) -> LocalMoEError:
        """What an error of the server's is to us."""
        message = f"vLLM: {_message(body)}"
        if status in (429, 503) and await self.is_healthy():
            return OverloadedError(message, retry_after_s=_retry_after_s(headers))
        if status in (400, 413, 422):
            return InvalidRequestError(message)
        if status < 500:
            return BackendUnavailableError(message)
        # A server whose engine is dead answers for a moment longer.
        return EngineFaultError(message) if await self.is_healthy() else EngineDiedError(message)


_JSON = {"Content-Type": "application/json"}


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events, up to the one that says that there are no more."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue  # blank lines, and comments that keep the connection alive
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        yield data


async def _whole(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    yield await _read_all(response)


async def _read_all(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for data in response.content.iter_any():
        body += data
        if len(body) > _MAX_ANSWER_BYTES:
            raise EngineFaultError(f"vLLM's answer has more than {_MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _message(body: bytes) -> str:
    """What an error's body says."""
    with contextlib.suppress(EngineFaultError):
        error = decode(body, Answer).error
        if error is not None:
            return error.message
    return body[:200].decode(errors="replace") or "no reason is given"


def _status(error: AnswerError) -> int:
    """Of an error in a stream, which began with 200."""
    return error.code if isinstance(error.code, int) and 400 <= error.code < 600 else 500


def _retry_after_s(headers: Mapping[str, str]) -> float:
    said = headers.get("Retry-After", "")
    return min(float(said), 60.0) if said.isdecimal() else 1.0


def _quick() -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)


def _said(error: BaseException) -> str:
    """Of a failed connection, without the address, which is not the client's to know."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return error.os_error.strerror or "no connection"
    return str(error) or type(error).__name__
