"""`/v1/responses`: OpenAI's Responses API, with what was said kept here."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from localmoe.core.errors import ConflictError, InvalidRequestError, UnsupportedFieldError
from localmoe.core.protocols import ResponseStore
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.streaming import respond
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.exchange import current_principal
from localmoe.gateway.openapi import ERROR_RESPONSES, documented
from localmoe.gateway.responses.creation import Creation
from localmoe.gateway.responses.keeping import UNFINISHED, BackgroundResponses, ResponseKeeper
from localmoe.gateway.responses.schema import FIELD_NAMES, Includable, ResponseRequest
from localmoe.gateway.responses.wire import ItemList, ResponseDeleted, ResponseObject, ResponseStreamEvent


def router(context: GatewayContext, store: ResponseStore) -> APIRouter:
    """The routes over these models.

    Args:
        store: keeps what is to be kept.
    """
    background = BackgroundResponses()
    routes = APIRouter(
        tags=["responses"],
        default_response_class=Response,
        responses=ERROR_RESPONSES,
        lifespan=lambda app: background.running(),
    )

    def my_keeper() -> ResponseKeeper:
        return ResponseKeeper(
            store,
            current_principal().id,
            limit_s=context.config.background_timeout_s,
            max_conversation_bytes=context.config.max_body_bytes,
        )

    @routes.post(
        "/v1/responses",
        responses={200: documented(ResponseObject, streams=get_args(ResponseStreamEvent))},
        summary="Answer, and keep what was said",
    )
    async def create_response(
        body: ResponseRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        model = context.model(body.model)  # or a refusal, before anything is made of the request
        keeper = my_keeper()
        creation = Creation(body, context, hints, keeper, await keeper.conversation(body.previous_response_id))
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
        responses={200: documented(ResponseObject)},
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
        responses={200: documented(ResponseDeleted)},
        summary="Keep a response no more",
    )
    async def delete_response(response_id: str) -> Response:
        await _delete(my_keeper(), background, current_principal().id, response_id)
        return _json(ResponseDeleted(id=response_id))

    @routes.post(
        "/v1/responses/{response_id}/cancel",
        responses={200: documented(ResponseObject)},
        summary="End a response that is made in the background",
    )
    async def cancel_response(response_id: str) -> Response:
        return _json(await _cancelled(my_keeper(), background, current_principal().id, response_id))

    @routes.get(
        "/v1/responses/{response_id}/input_items",
        responses={200: documented(ItemList)},
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


async def _delete(
    keeper: ResponseKeeper, background: BackgroundResponses, owner_id: str, response_id: str
) -> None:
    if not await background.cancel(owner_id, response_id):
        response = (await keeper.get(response_id)).response
        if response.background and response.status in UNFINISHED:
            raise ConflictError("the response is made by another gateway, which would keep it again")
    await keeper.delete(response_id)


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
