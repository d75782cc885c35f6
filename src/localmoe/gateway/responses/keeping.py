"""What is kept of responses: to be asked for, and to go on from."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import msgspec
from pydantic import TypeAdapter, ValidationError

from localmoe.core.errors import (
    InvalidRequestError,
    LocalMoEError,
    NotFoundError,
    OverloadedError,
    StorageError,
)
from localmoe.core.protocols import ResponseStore
from localmoe.gateway.answering.generation import ChoiceDelta
from localmoe.gateway.answering.prompts import work_on
from localmoe.gateway.errors import to_api_error
from localmoe.gateway.exchange import current_exchange
from localmoe.gateway.fields import MAX_PARTS_TOGETHER
from localmoe.gateway.jobs.owners import could_be_id
from localmoe.gateway.openai.chat_messages import MAX_MESSAGES
from localmoe.gateway.responses.answer import ResponseAnswer, set_failed
from localmoe.gateway.responses.schema import InputItem, MessageItem
from localmoe.gateway.responses.wire import OutputMessage, ResponseError, StoredResponse

_MAX_READ_RATIO = 16
"""Of all that is kept of a conversation's responses to what was said in them: tools and scores are kept, too."""
_GRACE_S = 60.0
"""After which nobody is still about to say what became of a response."""
UNFINISHED = ("queued", "in_progress")
_ITEM_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}

logger = logging.getLogger(__name__)
_items: TypeAdapter[InputItem] = TypeAdapter(InputItem)


class ResponseKeeper:
    """One owner's responses.

    Args:
        limit_s: a background response that is not complete after this long has failed, even where its gateway was
            killed and cannot say so.
        max_conversation_bytes: of what was said in the responses that one may go on from.
    """

    def __init__(self, store: ResponseStore, owner: str, *, limit_s: float, max_conversation_bytes: int) -> None:
        self._store = store
        self._owner = owner
        self._limit_s = limit_s
        self._max_conversation_bytes = max_conversation_bytes

    async def put(self, stored: StoredResponse) -> None:
        """Keep it, in place of an earlier state of it."""
        await self._store.put(self._owner, stored.response.id, msgspec.json.encode(stored))

    async def get(self, response_id: str) -> StoredResponse:
        """What is kept of it.

        Raises:
            NotFoundError: nothing.
        """
        data = await self._data(response_id)
        if data is None:
            raise _not_found(response_id)
        stored = await work_on(len(data), _stored, data)
        response = stored.response
        if response.status in UNFINISHED and time.time() > response.created_at + self._limit_s + _GRACE_S:
            response.status = "failed"
            response.error = ResponseError(code="server_error", message="it was not complete in time")
        return stored

    async def delete(self, response_id: str) -> None:
        """Keep it no more.

        Raises:
            NotFoundError: it is not there.
        """
        if not could_be_id(response_id) or not await self._store.delete(self._owner, response_id):
            raise _not_found(response_id)

    async def _data(self, response_id: str) -> bytes | None:
        return await self._store.get(self._owner, response_id) if could_be_id(response_id) else None

    async def conversation(self, response_id: str | None) -> list[InputItem]:
        """What was said as far as this response, itself included.

        Raises:
            InvalidRequestError: some of it is there no more, is not complete, or it is too long.
        """
        turns: list[list[InputItem]] = []
        num_bytes = num_bytes_read = num_items = num_parts = 0
        while response_id is not None:
            data = await self._data(response_id)
            if data is None:
                raise _previous_error(str(_not_found(response_id)), "previous_response_not_found")
            num_bytes_read += len(data)
            if num_bytes_read > _MAX_READ_RATIO * self._max_conversation_bytes:
                raise _previous_error("too much is kept with the conversation", "conversation_too_long")
            items, num_bytes_said, response_id = await work_on(len(data), _turn, data)
            turns.append(items)
            num_bytes += num_bytes_said
            num_items += len(items)
            num_parts += sum(map(_num_parts, items))
            for number, most, what in (
                (num_bytes, self._max_conversation_bytes, "bytes"),
                (num_items, MAX_MESSAGES, "items"),
                (num_parts, MAX_PARTS_TOGETHER, "parts"),
            ):
                if number > most:
                    raise _previous_error(f"the conversation has more than {most} {what}", "conversation_too_long")
        return [item for turn in reversed(turns) for item in turn]

    async def following(
        self,
        answer: ResponseAnswer,
        deltas: AsyncGenerator[ChoiceDelta, None],
        input_: list[dict[str, Any]],
        *,
        must_keep: bool,
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """The same deltas. Whoever takes one after the other finds the response kept when there are no more.

        Args:
            must_keep: otherwise, where it cannot be kept, it says that it is not.
        """
        response = answer.response
        stored = StoredResponse(response=response, input=input_)
        has_begun = False
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if not has_begun and response.background:
                        await self.put(stored)
                    has_begun = True
                    yield delta
        except LocalMoEError as error:
            if has_begun:
                set_failed(response, to_api_error(error))
                await self.put(stored)
            raise
        try:
            await self.put(stored)
        except StorageError as error:
            if must_keep:
                raise
            logger.warning("response %s is not kept: %s", response.id, error)
            response.store = False


def _stored(data: bytes) -> StoredResponse:
    return msgspec.json.decode(data, type=StoredResponse)


def _num_parts(item: InputItem) -> int:
    return sum(len(field) for field in vars(item).values() if isinstance(field, list))


def _turn(data: bytes) -> tuple[list[InputItem], int, str | None]:
    """What was said in one response, the bytes of its JSON, and the id of the response before."""
    stored = _stored(data)
    response = stored.response
    if response.status in UNFINISHED:
        raise _previous_error(f"response {response.id!r} is not complete yet", "previous_response_unfinished")
    for item in response.output:
        for part in item.content if isinstance(item, OutputMessage) else ():
            part.logprobs = []  # which nobody said
    said = [*stored.input, *(msgspec.to_builtins(item) for item in response.output)]
    num_bytes = len(msgspec.json.encode(said))
    try:
        return [_items.validate_python(item) for item in said], num_bytes, response.previous_response_id
    except ValidationError as error:  # a server elsewhere may have called a function by any name
        message = f"response {response.id!r} has something in it that cannot be gone on from"
        raise _previous_error(message, "previous_response_unusable") from error


def numbered(items: Sequence[InputItem], response_id: str) -> list[dict[str, Any]]:
    """Input items as they are kept and shown, each with an id."""
    suffix = response_id.partition("_")[2]
    kept = []
    for place, item in enumerate(items):
        fields = item.model_dump(mode="json", exclude_none=True)
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            fields["content"] = [{"type": kind, "text": item.content}]
        id_ = f"{_ITEM_PREFIXES[item.type]}_{suffix}_i{place}"
        kept.append({"id": id_, "status": "completed", **fields})
    return kept


class BackgroundResponses:
    """Responses that are made while nobody waits for them."""

    def __init__(self) -> None:
        self._num_coming = 0
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    @contextmanager
    def room(self, max_running: int) -> Iterator[None]:
        """Room for one more, which is to be started meanwhile. Raises OverloadedError if so many are made already."""
        if len(self._tasks) + self._num_coming >= max_running:
            raise OverloadedError(f"{max_running} responses are being made in the background; try again later")
        self._num_coming += 1
        try:
            yield
        finally:
            self._num_coming -= 1

    def start(self, owner: str, response_id: str, work: Coroutine[Any, Any, None]) -> None:
        """Let it be made. What fails is the work's business. It counts as one of its owner's requests."""
        key = owner, response_id
        exchange = current_exchange()
        ticket = None if exchange is None else exchange.ticket
        if ticket is not None:
            ticket.hold()

        def ended(_: asyncio.Task[None]) -> None:
            if ticket is not None:
                ticket.end()
            self._forget(key)

        task = self._tasks[key] = asyncio.create_task(work)
        task.add_done_callback(ended)

    async def cancel(self, owner: str, response_id: str) -> bool:
        """End it, and return when its engine is free; False if it is not being made here."""
        task = self._tasks.get((owner, response_id))
        if task is None:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    def _forget(self, key: tuple[str, str]) -> None:
        task = self._tasks.pop(key)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("what became of response %s could not be kept", key[1], exc_info=error)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """For as long as any may be made; ends those that are left."""
        try:
            yield
        finally:
            tasks = set(self._tasks.values())
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)


def _not_found(response_id: str) -> NotFoundError:
    return NotFoundError(f"there is no response {response_id[:100]!r}")


def _previous_error(message: str, code: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="previous_response_id", code=code)
