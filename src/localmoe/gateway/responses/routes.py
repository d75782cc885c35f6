"""`/v1/responses`: OpenAI's Responses API, with what was said kept here."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, Literal, get_args

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from starlette.responses import Response

from localmoe.core.errors import ConflictError, DeadlineExceededError, InvalidRequestError, UnsupportedFieldError
from localmoe.core.protocols import ResponseStore
from localmoe.gateway.answering.conversation import choices
from localmoe.gateway.answering.generation import ScoredToken, stream_choices
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.sampling import bounded_logprobs
from localmoe.gateway.answering.streaming import Begun, collect, encode_tagged, respond
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.errors import ApiError, to_api_error
from localmoe.gateway.exchange import current_principal
from localmoe.gateway.openai.logprobs import chat_logprobs
from localmoe.gateway.openapi import ERROR_RESPONSES, documented
from localmoe.gateway.responses.answer import ResponseAnswer, no_scores, set_failed
from localmoe.gateway.responses.conversation import conversation_of
from localmoe.gateway.responses.keeping import UNFINISHED, BackgroundResponses, ResponseKeeper, numbered
from localmoe.gateway.responses.schema import FIELD_NAMES, Includable, InputItem, ResponseRequest
from localmoe.gateway.responses.wire import (
    ErrorEvent,
    ItemList,
    ResponseDeleted,
    ResponseObject,
    ResponseStatus,
    ResponseStreamEvent,
    StoredResponse,
)

API = "responses"


def router(context: GatewayContext, store: ResponseStore) -> APIRouter:
    """The routes over these models.

    Args:
        store: keeps what is to be kept.
    """
    background = BackgroundResponses()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        await background.close()

    routes = APIRouter(tags=["responses"], lifespan=lifespan)

    def my_keeper() -> ResponseKeeper:
        return ResponseKeeper(
            store,
            current_principal().id,
            limit_s=context.config.background_timeout_s,
            max_conversation_bytes=context.config.max_body_bytes,
        )

    @routes.post(
        "/v1/responses",
        response_class=Response,
        responses={200: documented(ResponseObject, streams=get_args(ResponseStreamEvent)), **ERROR_RESPONSES},
        summary="Answer, and keep what was said",
    )
    async def create_response(
        body: ResponseRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        model = context.model(body.model)  # or a refusal, before anything is made of the request
        keeper = my_keeper()
        creation = _Creation(body, context, hints, keeper, await keeper.conversation(body.previous_response_id))
        models = context.candidates(body.model)
        headers = body.ignored_headers(FIELD_NAMES[name] for name in creation.conversation.ignored(model))
        if body.background:
            with background.room(context.config.max_background_responses):
                queued = await creation.queue()
                background.start(current_principal().id, queued.id, creation.make(models))
            return _json(queued, headers)
        return await respond(
            creation.begin,
            models,
            stream=bool(body.stream),
            headers=headers,
            request=request,
            keepalive_s=context.config.keepalive_s,
            failure=creation.failure,
        )

    @routes.get(
        "/v1/responses/{response_id}",
        response_class=Response,
        responses={200: documented(ResponseObject), **ERROR_RESPONSES},
        summary="A response as it is now",
    )
    async def get_response(
        response_id: str,
        include: Annotated[list[Includable] | None, Query(alias="include[]")] = None,
        stream: bool = False,
    ) -> Response:
        """`include` has no effect: all that there is to show is shown."""
        if stream:
            raise UnsupportedFieldError("not supported for what was made before; leave it out", param="stream")
        stored = await my_keeper().get(response_id)
        return _json(stored.response)

    @routes.delete(
        "/v1/responses/{response_id}",
        response_class=Response,
        responses={200: documented(ResponseDeleted), **ERROR_RESPONSES},
        summary="Keep a response no more",
    )
    async def delete_response(response_id: str) -> Response:
        keeper = my_keeper()
        if not await background.cancel(current_principal().id, response_id):
            response = (await keeper.get(response_id)).response
            if response.background and response.status in UNFINISHED:
                raise ConflictError("the response is made by another gateway, which would keep it again")
        await keeper.delete(response_id)
        return _json(ResponseDeleted(id=response_id))

    @routes.post(
        "/v1/responses/{response_id}/cancel",
        response_class=Response,
        responses={200: documented(ResponseObject), **ERROR_RESPONSES},
        summary="End a response that is made in the background",
    )
    async def cancel_response(response_id: str) -> Response:
        owner_id = current_principal().id
        return _json(await _cancelled(my_keeper(), background, owner_id, response_id))

    @routes.get(
        "/v1/responses/{response_id}/input_items",
        response_class=Response,
        responses={200: documented(ItemList), **ERROR_RESPONSES},
        summary="What a response was asked",
    )
    async def list_input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: Annotated[str | None, Query(max_length=256, description="The id of an item.")] = None,
        include: Annotated[list[Includable] | None, Query(alias="include[]")] = None,
    ) -> Response:
        """Its own items, not those of the responses before it. `include` has no effect."""
        stored = await my_keeper().get(response_id)
        return _json(_page(stored.input, limit=limit, order=order, after=after))

    return routes


async def _cancelled(
    keeper: ResponseKeeper, background: BackgroundResponses, owner_id: str, response_id: str
) -> ResponseObject:
    """A response of the background, which is made no more."""
    stored = await keeper.get(response_id)
    if not stored.response.background:
        raise InvalidRequestError(
            "only responses with background: true can be cancelled; end others by closing the connection",
            param="response_id",
        )
    was_here = await background.cancel(owner_id, response_id)
    stored = await keeper.get(response_id)
    if stored.response.status in UNFINISHED:
        if not was_here:
            raise ConflictError("the response is made by another gateway, which alone can cancel it")
        stored.response.status = "cancelled"  # before it began
        await keeper.put(stored)
    return stored.response


class _Creation:
    """One request, until its answer is complete."""

    def __init__(
        self,
        body: ResponseRequest,
        context: GatewayContext,
        hints: DispatchHints,
        keeper: ResponseKeeper,
        earlier: Sequence[InputItem],
    ) -> None:
        self._body = body
        self._context = context
        self._hints = hints
        self._keeper = keeper
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created_at = int(time.time())
        self._input = numbered(body.items, self._id)
        self.conversation = conversation_of(body, [*earlier, *body.items])
        self._answer: ResponseAnswer | None = None

    async def begin(self, model: ServedModel) -> Begun:
        """See `Begin`."""
        body = self._body
        given = await choices(
            self.conversation, model, self._hints, answer_id=self._id, grammars=self._context.grammars
        )
        asked = bounded_logprobs(
            given,
            echo=False,
            limit=self._context.config.max_logprobs,
            max_tokens_given=body.max_output_tokens is not None,
        )
        sampling = asked[0].request.sampling
        response = self._response(model.id, "in_progress")
        response.temperature, response.top_p = sampling.temperature, sampling.top_p
        score = partial(_score, model) if body.wants_logprobs else no_scores
        answer = self._answer = ResponseAnswer(response, score=score)
        deltas = stream_choices(model, asked, api=API, bus=self._context.bus, started_s=self._hints.came_s)
        if response.store:
            must_keep = body.store is True or response.background
            deltas = self._keeper.following(answer, deltas, self._input, must_keep=must_keep)
        return Begun(answer, deltas)

    def failure(self, error: ApiError) -> bytes:
        """The last event of a stream that breaks off."""
        if self._answer is not None:
            return self._answer.failure(error)
        return encode_tagged(
            ErrorEvent(sequence_number=0, code=error.code, message=error.message, param=error.param)
        )

    async def queue(self) -> ResponseObject:
        """Keep it before it has begun."""
        response = self._response(self._body.model, "queued")
        await self._keeper.put(StoredResponse(response=response, input=self._input))
        return response

    async def make(self, models: Iterator[ServedModel]) -> None:
        """Make the answer with nobody waiting. Whatever becomes of it is kept."""
        limit_s = self._context.config.background_timeout_s
        try:
            try:
                async with asyncio.timeout(limit_s):
                    await collect(self.begin, models)
            except TimeoutError:
                raise DeadlineExceededError(f"the response was not complete within {limit_s:g} s") from None
        except asyncio.CancelledError:
            response = self._so_far()
            response.status = "cancelled"
            await self._keeper.put(StoredResponse(response=response, input=self._input))
            raise
        except Exception as error:
            response = self._so_far()
            set_failed(response, to_api_error(error))
            await self._keeper.put(StoredResponse(response=response, input=self._input))

    def _so_far(self) -> ResponseObject:
        return self._response(self._body.model, "queued") if self._answer is None else self._answer.response

    def _response(self, model_id: str, status: ResponseStatus) -> ResponseObject:
        """Without an answer yet."""
        body = self._body
        choice = body.tool_choice or "auto"
        return ResponseObject(
            id=self._id,
            created_at=self._created_at,
            status=status,
            background=bool(body.background),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            metadata=body.metadata or {},
            model=model_id,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            previous_response_id=body.previous_response_id,
            reasoning={"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            store=body.store is not False,
            temperature=body.temperature,
            text={"format": body.format if isinstance(body.format, dict) else body.format.model_dump()},
            tool_choice=choice if isinstance(choice, str) else choice.model_dump(),
            tools=[tool.model_dump() for tool in body.tools or ()],
            top_logprobs=body.top_logprobs or 0,
            top_p=body.top_p,
        )


def _score(model: ServedModel, scored: list[ScoredToken]) -> list[dict[str, Any]]:
    return [entry.model_dump() for entry in chat_logprobs(model.local_text.tokenizer, scored).content]


def _page(items: list[dict[str, Any]], *, limit: int, order: str, after: str | None) -> ItemList:
    ordered = items if order == "asc" else items[::-1]
    ids = [item["id"] for item in ordered]
    if after is not None and after not in ids:
        raise InvalidRequestError(f"after: the response has no item {after!r}", param="after")
    start = 0 if after is None else ids.index(after) + 1
    page, page_ids = ordered[start : start + limit], ids[start : start + limit]
    return ItemList(
        data=page,
        first_id=page_ids[0] if page else None,
        last_id=page_ids[-1] if page else None,
        has_more=start + limit < len(ordered),
    )


def _json(value: msgspec.Struct, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=dict(headers or {}), media_type="application/json")
