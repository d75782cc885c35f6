"""OpenAI's API as a client writes and reads it: questions, streams of answers, complaints.

What a server sends is bounded in size and checked in form before anybody believes it.
"""

import asyncio
import math
import secrets
import struct
from collections.abc import Mapping
from typing import Annotated, Any

import aiohttp
import msgspec

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import (
    UNBOUNDED_TOKENS,
    FinishReason,
    Grammar,
    PromptSource,
    Request,
    SamplingParams,
    ToolCallDelta,
    Usage,
)

READ_BUFFER_BYTES = 2**19
"""aiohttp takes lines of at most twice as much."""
MAX_LIST_BYTES = 8 * 2**20
_MAX_COMPLAINT_BYTES = 2**16
_MAX_COMPLAINT_CHARS = 300
_COMPLAINT_WAIT_S = 5.0
_MAX_STOPS = 4
_MAX_RETRY_AFTER_S = 600.0
_MAX_DIMENSIONS = 2**16
_MAX_EMBEDDING_BYTES = 2**22
_DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Count | None = None


class _UsageCounts(msgspec.Struct):
    prompt_tokens: _Count = 0
    completion_tokens: _Count = 0
    prompt_tokens_details: _PromptDetails | None = None


def _usage(counts: _UsageCounts | None) -> Usage | None:
    if counts is None:
        return None
    details = counts.prompt_tokens_details
    return Usage(
        prompt_tokens=counts.prompt_tokens,
        completion_tokens=counts.completion_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
    )


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct):
    index: int = 0
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """What vLLM calls it."""
    tool_calls: list[_ToolCall] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class Event(msgspec.Struct):
    """One chunk of a stream, of either API."""

    choices: list[_Choice] = []
    usage_counts: _UsageCounts | None = msgspec.field(default=None, name="usage")
    error: Any = None

    @property
    def text(self) -> str:
        """What it adds to the answer."""
        pieces = (choice.text or (choice.delta.content if choice.delta else None) for choice in self.choices)
        return "".join(piece or "" for piece in pieces)

    @property
    def reasoning(self) -> str:
        """What it adds to what goes before the answer."""
        deltas = (choice.delta for choice in self.choices)
        return "".join((delta.reasoning_content or delta.reasoning or "") for delta in deltas if delta)

    @property
    def tool_calls(self) -> list[_ToolCall]:
        """Pieces of tool calls, as the server numbers them."""
        deltas = (choice.delta for choice in self.choices)
        return [call for delta in deltas if delta for call in delta.tool_calls or ()]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the answer ends with it, if it does.

        Raises:
            EngineFaultError: for a reason for which no answer that was asked for ends.
        """
        reason = next((choice.finish_reason for choice in self.choices if choice.finish_reason), None)
        if reason is None:
            return None
        try:
            return FinishReason(reason)
        except ValueError:
            raise EngineFaultError(f"the server ended the answer for another reason: {reason[:40]!r}") from None

    @property
    def usage(self) -> Usage | None:
        """Token counts, where it has them."""
        return _usage(self.usage_counts)


_event_decoder = msgspec.json.Decoder(Event)


class _Embedding(msgspec.Struct):
    embedding: Annotated[list[float], msgspec.Meta(min_length=1, max_length=_MAX_DIMENSIONS)]


class _Embeddings(msgspec.Struct):
    data: Annotated[list[_Embedding], msgspec.Meta(min_length=1, max_length=1)]
    usage: _UsageCounts | None = None


class ToolCalls:
    """One answer's tool calls, numbered from 0 without gaps, whatever their server does."""

    def __init__(self) -> None:
        self._begun: dict[int, tuple[int, str | None]] = {}
        """By the server's number: the place of the last call of that number, and the id that it came with."""
        self._num_calls = 0

    def take(self, event: Event) -> tuple[ToolCallDelta, ...]:
        """What the event adds to them.

        Raises:
            EngineFaultError: to one that has not begun.
        """
        return tuple(self._delta(call) for call in event.tool_calls)

    def _delta(self, call: _ToolCall) -> ToolCallDelta:
        arguments = call.function.arguments or ""
        name = call.function.name
        place, known_id = self._begun.get(call.index, (None, None))
        # Some servers repeat id and name with every piece, and some have one number for all calls.
        is_another = bool(name and call.id and known_id and call.id != known_id)
        if place is not None and not is_another:
            return ToolCallDelta(index=place, arguments=arguments)
        if not name:
            raise EngineFaultError("the server sent a piece of a tool call that it had not begun")
        place, self._num_calls = self._num_calls, self._num_calls + 1
        self._begun[call.index] = place, call.id
        return ToolCallDelta(
            index=place, id=call.id or f"call_{secrets.token_hex(12)}", name=name, arguments=arguments
        )


class _Model(msgspec.Struct):
    id: str


class _ModelList(msgspec.Struct):
    data: list[_Model]


def unsupported(sampling: SamplingParams) -> str | None:
    """The first parameter that would change the answer and is not in OpenAI's API; None if there is none."""
    is_drawn = sampling.temperature > 0.0
    matters = {
        "logprobs": sampling.logprobs is not None,
        "prompt_logprobs": sampling.prompt_logprobs is not None,
        "max_tokens": sampling.max_tokens < 1,
        "top_k": is_drawn and sampling.top_k > 0,
        "min_p": is_drawn and sampling.min_p > 0.0,
        "repetition_penalty": sampling.repetition_penalty != 1.0,
    }
    return next((name for name, it_does in matters.items() if it_does), None)


def question(request: Request, model: str) -> tuple[str, bytes]:
    """(route, body) of a request that has a source."""
    source, sampling = request.source, request.sampling
    assert source is not None
    if request.embed:
        asked = {"model": model, "input": source.text, "encoding_format": "float"}
        return "embeddings", msgspec.json.encode(asked)
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        # Said even where it is OpenAI's default: servers may have others.
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.max_tokens != UNBOUNDED_TOKENS:
        body["max_tokens"] = sampling.max_tokens  # also to chats: few servers know max_completion_tokens
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if sampling.logit_bias:
        body["logit_bias"] = sampling.logit_bias
    if not source.must_call and (response_format := _response_format(source.content_grammar)) is not None:
        body["response_format"] = response_format
    if source.stop:
        body["stop"] = source.stop[:_MAX_STOPS]
    if source.messages is not None:
        return "chat/completions", msgspec.json.encode({**body, **source.parameters, "messages": source.messages})
    if source.suffix is not None:
        body["suffix"] = source.suffix
    return "completions", msgspec.json.encode({**body, "prompt": source.text})


def asks_for_grammar(source: PromptSource) -> bool:
    """Whether that the answer follows its grammar can be asked for in the API's words: as tool calls that there must
    be, or as a `response_format`."""
    return source.must_call or _response_format(source.content_grammar) is not None


def _response_format(grammar: Grammar | None) -> dict[str, Any] | None:
    """None where the API has none for it."""
    if grammar is None or grammar.kind not in ("json_object", "json_schema"):
        return None
    if grammar.kind == "json_object":
        return {"type": "json_object"}
    schema = msgspec.Raw(grammar.source.encode())
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


async def next_event(content: aiohttp.StreamReader) -> Event | None:
    """The next chunk of a stream (WHATWG HTML, server-sent events); None at `[DONE]` or the stream's end.

    Raises:
        EngineFaultError: it is something else.
        aiohttp.ClientError: the connection broke.
    """
    while line := await _line(content):
        name, _, value = line.rstrip(b"\r\n").partition(b":")
        if name == b"data":
            if value.strip() == b"[DONE]":
                return None
            try:
                return _event_decoder.decode(value)
            except _DECODE_ERRORS as error:
                raise EngineFaultError("the server sent something that is no chunk of an answer") from error
        if name not in (b"", b"event", b"id", b"retry"):  # of a comment and of an empty line it is empty
            raise EngineFaultError("the server sent something that is no stream of events")
    return None


async def _line(content: aiohttp.StreamReader) -> bytes:
    try:
        return await content.readline()
    except (ValueError, aiohttp.http_exceptions.LineTooLong) as error:
        raise EngineFaultError(f"the server sent a line of more than {2 * READ_BUFFER_BYTES} bytes") from error
    except RuntimeError as error:  # the session was closed a moment ago, and the reader does not know it yet
        raise aiohttp.ClientConnectionError from error


async def embedding(response: aiohttp.ClientResponse) -> tuple[bytes, Usage | None]:
    """The vector of an answer, as `TokenChunk.embedding`, and what it took.

    Raises:
        EngineFaultError: it is something else.
        aiohttp.ClientError: the connection broke.
    """
    try:
        answer = msgspec.json.decode(await _read(response, _MAX_EMBEDDING_BYTES), type=_Embeddings)
        vector = answer.data[0].embedding
        return struct.pack(f"<{len(vector)}f", *vector), _usage(answer.usage)
    except (*_DECODE_ERRORS, OverflowError) as error:  # a number may be too large for float32
        raise EngineFaultError("the server sent something that is no embedding") from error


async def model_names(response: aiohttp.ClientResponse) -> list[str]:
    """What `GET /models` lists.

    Raises:
        EngineFaultError: it is no such list.
    """
    try:
        listed = msgspec.json.decode(await _read(response, MAX_LIST_BYTES), type=_ModelList)
    except _DECODE_ERRORS as error:
        raise EngineFaultError("what it answers to GET /models is no list of models") from error
    return [model.id for model in listed.data]


async def complaint(response: aiohttp.ClientResponse) -> str:
    """What a server says of a failure, where it does so in JSON; else its HTTP status."""
    fallback = f"HTTP status {response.status}"
    try:
        async with asyncio.timeout(_COMPLAINT_WAIT_S):
            said = msgspec.json.decode(await _read(response, _MAX_COMPLAINT_BYTES))
    except (*_DECODE_ERRORS, aiohttp.ClientError, TimeoutError):
        return fallback
    return message_of(said) or fallback


def message_of(said: Any) -> str:
    """The message in the JSON of a failure, whichever server's form it has; empty if there is none."""
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return said if isinstance(said, str) else ""


def presentable(message: str, secret: str | None) -> str:
    """A server's message, short, in one line, and without our key."""
    if secret is not None:
        message = message.replace(secret, "***")
    message = " ".join("".join(char if char.isprintable() else " " for char in message).split())
    return message if len(message) <= _MAX_COMPLAINT_CHARS else message[:_MAX_COMPLAINT_CHARS] + "…"


def retry_after_s(headers: Mapping[str, str]) -> float:
    """When a server wants to be tried again; a second where it does not say so in numbers."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            after_s = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if math.isfinite(after_s) and after_s >= 0.0:
            return min(after_s, _MAX_RETRY_AFTER_S)
    return 1.0


async def _read(response: aiohttp.ClientResponse, limit_bytes: int) -> bytes:
    """A body, or so much of it."""
    body = bytearray()
    while len(body) < limit_bytes and (piece := await response.content.readany()):
        body += piece
    return bytes(body[:limit_bytes])
