"""A model whose answers are kept."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing

import msgspec

from localmoe.core.protocols import Generator
from localmoe.core.request import FinishReason, Request, TokenChunk, Usage
from localmoe.gateway.cache.key import answer_key, is_repeatable
from localmoe.gateway.cache.levels import Cache
from localmoe.gateway.cache.use import current_use

_CHUNK_TOKENS = 32
"""An answer from the cache comes in pieces of so many, so that turning them into text holds nobody up."""
_TOKEN_BYTES, _LOGPROB_BYTES = 5, 14
"""At most, as kept."""

_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(list[TokenChunk])


class CachingGenerator:
    """Answers from the cache what it can, and keeps what another generator answers. It keeps tokens, so one entry
    serves every API, streams too. Only complete answers are kept; one that was closed when a stop string had come is
    one.

    Args:
        model_version: see `answer_key`.
        scope: whose answers may be given to whoever asks now.
        decode: the text of token ids; None where tokens are not known here.
    """

    def __init__(
        self,
        inner: Generator,
        cache: Cache,
        *,
        model_version: str,
        scope: Callable[[], str],
        decode: Callable[[Sequence[int]], str] | None,
    ) -> None:
        self._inner = inner
        self._cache = cache
        self._model_version = model_version
        self._scope = scope
        self._decode = decode

    @property
    def is_ready(self) -> bool:
        """See `Generator.is_ready`."""
        return self._inner.is_ready

    async def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `Generator.generate`."""
        use = current_use()
        if use is None or not is_repeatable(request):
            answer = self._inner.generate(request)
        else:
            key = answer_key(request, model_version=self._model_version, scope=self._scope())
            use.num_asked += 1
            found = await self._cache.get(key) if use.may_read else None
            chunks = None if found is None else _chunks(found.data)
            if found is not None and chunks is not None:
                use.num_found += 1
                use.level = found.level
                for chunk in chunks:
                    yield msgspec.structs.replace(chunk, request_id=request.id)
                    await asyncio.sleep(0)  # others have their turn
                return
            answer = self._kept(request, key) if use.may_write else self._inner.generate(request)
        async with aclosing(answer):
            async for chunk in answer:
                yield chunk

    async def _kept(self, request: Request, key: bytes) -> AsyncGenerator[TokenChunk, None]:
        recording = _Recording(self._cache.max_entry_bytes)
        try:
            async with aclosing(self._inner.generate(request)) as chunks:
                async for chunk in chunks:
                    recording.add(chunk)
                    if chunk.finish_reason is not None:  # now, since nobody may ask for more after the last one
                        self._keep(key, recording)
                    yield chunk
        except GeneratorExit:
            if self._has_just_stopped(request, recording):
                recording.end(request)
                self._keep(key, recording)
            raise

    def _keep(self, key: bytes, recording: "_Recording") -> None:
        if recording.is_complete and (data := recording.data()) is not None:
            self._cache.put(key, data)

    def _has_just_stopped(self, request: Request, recording: "_Recording") -> bool:
        """Whether the last piece of an answer that was closed has brought a stop string: then it was for that reason.
        If an earlier one had, whoever read it went on all the same, and its end was nobody's wish."""
        stops = request.source.stop if request.source is not None else ()
        if not stops or recording.is_complete or self._decode is None or not recording.num_last_ids:
            return False
        text = self._decode(recording.token_ids)
        before = self._decode(recording.token_ids[: -recording.num_last_ids])
        return any(stop in text for stop in stops) and not any(stop in before for stop in stops)


class _Recording:
    """An answer so far, in larger pieces; of one that is too long, nothing.

    Args:
        max_bytes: about.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left_bytes = max_bytes
        self._pieces: list[_Piece] = []
        self.token_ids: list[int] = []
        self.num_last_ids = 0
        """Of the last piece."""
        self.is_complete = False

    def add(self, chunk: TokenChunk) -> None:
        """The next piece."""
        if self._left_bytes < 0:
            return
        self._left_bytes -= _size(chunk)
        if self._left_bytes < 0:
            self._pieces, self.token_ids, self.num_last_ids = [], [], 0
            return
        self.token_ids += chunk.token_ids
        self.num_last_ids = len(chunk.token_ids)
        if not self._pieces or not self._pieces[-1].takes(chunk):
            self._pieces.append(_Piece(chunk))
        else:
            self._pieces[-1].add(chunk)
        self.is_complete = chunk.finish_reason is not None

    def end(self, request: Request) -> None:
        """Nothing more comes, as nothing more was wanted."""
        if self._pieces:
            last = self._pieces[-1]
            last.finish_reason = FinishReason.STOP
            prompt_tokens = len(request.prompt_ids)
            last.usage = Usage(prompt_tokens=prompt_tokens, completion_tokens=len(self.token_ids))
            self.is_complete = True

    def data(self) -> bytes | None:
        """As it is kept; None: it was too long."""
        return _encode([piece.chunk() for piece in self._pieces]) if self._pieces else None


class _Piece:
    """Several chunks as one."""

    def __init__(self, first: TokenChunk) -> None:
        self._first = first
        self._texts = [] if first.text is None else [first.text]
        self._token_ids = list(first.token_ids)
        self._logprobs = list(first.logprobs)
        self.finish_reason = first.finish_reason
        self.usage = first.usage

    def takes(self, chunk: TokenChunk) -> bool:
        """Whether there is room, and nothing whose place among the rest would be lost."""
        plain = not any(part.reasoning or part.tool_calls for part in (self._first, chunk))
        same_kind = (self._first.text is None) == (chunk.text is None)
        return plain and same_kind and len(self._token_ids) + len(self._texts) < _CHUNK_TOKENS

    def add(self, chunk: TokenChunk) -> None:
        """The next one."""
        self._token_ids += chunk.token_ids
        if chunk.text is not None:
            self._texts.append(chunk.text)
        self._logprobs += chunk.logprobs
        self.finish_reason = chunk.finish_reason
        self.usage = chunk.usage or self.usage

    def chunk(self) -> TokenChunk:
        """All of them."""
        usage = self.usage
        return msgspec.structs.replace(
            self._first,
            request_id="",
            token_ids=self._token_ids,
            text=None if self._first.text is None else "".join(self._texts),
            logprobs=self._logprobs,
            finish_reason=self.finish_reason,
            # It did not wait, and its prompt was not computed.
            usage=usage and msgspec.structs.replace(usage, queue_s=None, prefill_s=None),
        )


def _size(chunk: TokenChunk) -> int:
    size = _TOKEN_BYTES * len(chunk.token_ids) + 4 * len((chunk.text or "") + chunk.reasoning)
    size += sum(len(msgspec.msgpack.encode(call)) for call in chunk.tool_calls)
    for scored in (chunk.logprobs, chunk.prompt_logprobs or ()):
        size += sum(_LOGPROB_BYTES * (1 + len(logprob.top)) for logprob in scored)
    return size


def _chunks(data: bytes) -> list[TokenChunk] | None:
    """An answer that was kept; None: it is none of this version."""
    try:
        chunks = _decoder.decode(data)
    except msgspec.MsgspecError:
        return None
    return chunks if chunks and chunks[-1].finish_reason is not None else None
