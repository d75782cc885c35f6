"""Any server that speaks OpenAI's API, here or elsewhere: text goes in, and text comes out.

So it needs no tokenizer of the model here; and its answers have no token ids, so that nobody can go on with one that
broke off. It gets the parameters that OpenAI's API has, and a request with others that would change its answer is
refused. Tokens that end an answer cannot be named there. A server ends answers at those of its own model, and where
a request has prompt ids its stop tokens are those. Where the tokenizer is not here they can only be a client's own.
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncGenerator
from contextlib import suppress

import aiohttp

from localmoe.backends import remote_wire as wire
from localmoe.backends.remote_config import RemoteConfig
from localmoe.core.errors import (
    BackendUnavailableError,
    EngineDiedError,
    EngineFaultError,
    EngineStartError,
    InvalidRequestError,
    LocalMoEError,
    OverloadedError,
)
from localmoe.core.request import FinishReason, Request, TokenChunk, Usage

logger = logging.getLogger(__name__)

_START_LOOK_S = 0.5
_MAX_MISSED_LOOKS = 2
"""One may be missed by a server that is busy."""
_KEEPALIVE_S = 4.0
"""Servers close idle connections after 5 s or more; a request that meets the closing one would fail."""
_USAGE_WAIT_S = 5.0
"""From an answer's end to its token counts, at most."""
_END_WAIT_S = 0.05
"""From there to the end of the response, after which its connection can be used again."""


class RemoteBackend:
    """One server.

    Args:
        name: the engine's, for logs.
        config: where it is, and what it calls the model.
    """

    def __init__(self, *, name: str = "remote", config: RemoteConfig) -> None:
        self._name = name
        self._config = config
        self._url = config.url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_ready = False
        self.capacity = config.capacity

    @property
    def is_ready(self) -> bool:
        """See `Generator.is_ready`: whether it answered when it was last asked."""
        return self._is_ready

    async def start(self) -> None:
        """See `Backend.start`. Where it fails, nothing is left running."""
        key = self._config.api_key
        self._session = aiohttp.ClientSession(
            headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            # Dispatch sees to it that there are not too many.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._config.connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # little that comes could become much
            read_bufsize=wire.READ_BUFFER_BYTES,
            trust_env=False,
        )
        try:
            names = await self._first_look(self._session)
        except BaseException:
            await self.stop()
            raise
        if self._config.model not in names:
            logger.warning("%s: %s does not list a model %r", self._name, self._url, self._config.model)
        self._is_ready = True
        self._watching = asyncio.create_task(self._watch(self._session))

    async def stop(self) -> None:
        """See `Backend.stop`."""
        self._is_ready = False
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
            self._watching = None
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def refusal(self, request: Request) -> str | None:
        """See `Backend.refusal`."""
        if request.source is None:
            return "it takes text, and the prompt is of token ids"
        if request.resumed_ids:
            return "it takes text, and the answer was begun in token ids"
        if request.embed:
            return None if request.source.text is not None else "it embeds texts only"
        if parameter := wire.unsupported(request.sampling):
            return f"its API has no {parameter} of this value"
        if request.sampling.grammar is not None and not wire.asks_for_grammar(request.source):
            return "its API has JSON in answers to messages as the only grammar"
        if request.sampling.stop_token_ids and not request.prompt_ids:
            return "its API has no stop_token_ids"
        return None

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `core.protocols.Generator.generate`. Closing it closes the connection, which cancels the request there.

        Raises:
            InvalidRequestError: the server says that the request cannot be served as it stands.
        """
        session = self._session
        if session is None:
            raise BackendUnavailableError("the server's connection is not open")
        route, body = wire.question(request, request.adapter or self._config.model)
        accepted = "application/json" if request.embed else "text/event-stream"
        has_begun = False
        try:
            response = await session.post(
                f"{self._url}/{route}",
                data=body,
                headers={"Content-Type": "application/json", "Accept": accepted},
                allow_redirects=False,
            )
            # Answers last for long: the encoded copy of what may be long is let go, and so is the call's own frame,
            # which a context manager of `post` would keep.
            del body
            async with response:
                if failure := await self._failure(response, accepted):
                    raise failure
                has_begun = True
                if request.embed:
                    vector, usage = await wire.embedding(response)
                    yield TokenChunk(
                        request_id=request.id, embedding=vector, finish_reason=FinishReason.LENGTH, usage=usage
                    )
                    return
                calls, usage = wire.ToolCalls(), None
                while True:
                    event = await self._event(response)
                    if event is None:
                        raise EngineFaultError("the server ended its stream without a finish reason")
                    usage = event.usage or usage
                    text, reasoning, tool_calls = event.text, event.reasoning, calls.take(event)
                    if text or reasoning or tool_calls:
                        yield TokenChunk(
                            request_id=request.id, text=text, reasoning=reasoning, tool_calls=tool_calls
                        )
                    if finish := event.finish_reason:
                        break
                usage = await self._last_usage(response) or usage
                yield TokenChunk(request_id=request.id, finish_reason=finish, usage=usage)
        except (aiohttp.ClientError, OSError) as error:
            if has_begun:
                raise EngineDiedError(f"the server broke the answer off: {_reason(error)}") from error
            raise BackendUnavailableError(f"the server did not answer: {_reason(error)}") from error

    async def _event(self, response: aiohttp.ClientResponse) -> wire.Event | None:
        """The next chunk of an answer; None at its end."""
        event = await wire.next_event(response.content)
        if event is not None and event.error is not None:
            message = wire.message_of(event.error) or "it does not say why"
            raise EngineFaultError(f"the server failed: {self._presentable(message)}")
        return event

    async def _last_usage(self, response: aiohttp.ClientResponse) -> Usage | None:
        """Token counts that come behind an answer's last chunk. Without them it is complete all the same."""
        usage: Usage | None = None
        with suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_USAGE_WAIT_S):
                while event := await self._event(response):
                    usage = event.usage or usage
            async with asyncio.timeout(_END_WAIT_S):
                while await response.content.readany():
                    pass
        return usage

    async def _failure(self, response: aiohttp.ClientResponse, accepted: str) -> LocalMoEError | None:
        """What a response means, if it is no answer of the type that was asked for."""
        status = response.status
        if status == 200 and response.content_type == accepted:
            return None
        if status == 200:
            what = "stream of events" if accepted == "text/event-stream" else "JSON"
            return EngineFaultError(f"the server's answer is no {what}")
        if status in (401, 403):
            logger.error("%s: %s does not accept the API key (HTTP status %d)", self._name, self._url, status)
            return EngineFaultError("the server does not accept the API key that this one has for it")
        if 300 <= status < 400:
            return EngineFaultError("the server wants to redirect, which is not followed; its URL may be wrong")
        message = self._presentable(await wire.complaint(response))
        after_s = wire.retry_after_s(response.headers)
        if status in (400, 413, 422):
            return InvalidRequestError(f"the engine does not take this request: {message}")
        if status == 429:
            return OverloadedError(f"the server has too much to do: {message}", retry_after_s=after_s)
        if status in (408, 502, 503, 504):
            return BackendUnavailableError(f"the server is not available: {message}", retry_after_s=after_s)
        return EngineFaultError(f"the server failed: {message}")

    def _presentable(self, message: str) -> str:
        return wire.presentable(message, self._config.api_key)

    async def _first_look(self, session: aiohttp.ClientSession) -> list[str]:
        """The models that it lists, once it is there."""
        problem = "it did not answer"
        try:
            async with asyncio.timeout(self._config.start_timeout_s):
                while True:
                    try:
                        return await self._look(session)
                    except (BackendUnavailableError, EngineFaultError) as error:
                        problem = str(error)
                    await asyncio.sleep(_START_LOOK_S)
        except TimeoutError as error:
            raise EngineStartError(
                f"{self._url} was not ready within {self._config.start_timeout_s:g} s: {problem}"
            ) from error

    async def _look(self, session: aiohttp.ClientSession) -> list[str]:
        """The models that it lists.

        Raises:
            EngineStartError: it does not accept our key.
            BackendUnavailableError: it does not answer.
            EngineFaultError: it answers something else.
        """
        timeout = aiohttp.ClientTimeout(total=self._config.connect_timeout_s)
        try:
            async with session.get(f"{self._url}/models", timeout=timeout, allow_redirects=False) as response:
                if response.status in (401, 403):
                    raise EngineStartError(f"{self._url} does not accept the API key")
                if response.status != 200:
                    raise BackendUnavailableError(f"it answers GET /models with HTTP status {response.status}")
                return await wire.model_names(response)
        except (aiohttp.ClientError, OSError) as error:
            raise BackendUnavailableError(_reason(error)) from error

    async def _watch(self, session: aiohttp.ClientSession) -> None:
        num_missed = 0
        while True:
            await asyncio.sleep(self._config.health_interval_s)
            try:
                await self._look(session)
            except Exception as error:
                # Whatever it was: nobody looks any more if this task ends.
                num_missed += 1
                if num_missed == _MAX_MISSED_LOOKS:
                    foreseen = isinstance(error, LocalMoEError)
                    logger.warning("%s: %s is not there: %s", self._name, self._url, error, exc_info=not foreseen)
            else:
                if not self._is_ready:
                    logger.info("%s: %s is there again", self._name, self._url)
                num_missed = 0
            self._is_ready = num_missed < _MAX_MISSED_LOOKS


def _reason(error: Exception) -> str:
    """Why a connection failed, without where to: clients are told."""
    match error:
        case TimeoutError():
            return "no connection in time"
        case aiohttp.ClientConnectorCertificateError():
            return f"its certificate is not valid: {error.certificate_error}"
        case aiohttp.ClientConnectorError():
            return _os_reason(error.os_error)
        case aiohttp.ServerDisconnectedError():
            return "it closed the connection"
        case OSError():
            return _os_reason(error)
        case aiohttp.ClientPayloadError():
            return "the connection broke"
        case aiohttp.ClientResponseError():
            return "what it sent is no HTTP"
        case _:
            return "the connection was closed"


def _os_reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "its name is not known"
    # The error's own text may have the address in it.
    return os.strerror(error.errno) if error.errno else "there is no connection"
