"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API."""

from typing import Annotated, Any, get_args

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from localmoe.gateway.answering.conversation import choices, prompt_ids
from localmoe.gateway.answering.generation import stream_choices
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.streaming import Begun, encode_tagged, respond
from localmoe.gateway.anthropic.answer import MessageAnswer
from localmoe.gateway.anthropic.conversation import conversation_of
from localmoe.gateway.anthropic.errors import failure_event
from localmoe.gateway.anthropic.schema import FIELD_NAMES, CountTokensRequest, MessageRequest
from localmoe.gateway.anthropic.wire import ErrorMessage, Message, MessageStreamEvent, Ping, TokenCount
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.fields import SamplingFields
from localmoe.gateway.openapi import documented, ref_to

API = "messages"
_PING = encode_tagged(Ping())
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": what, "content": {"application/json": {"schema": ref_to(ErrorMessage)}}}
    for code, what in (
        ("4XX", "The request cannot be served as it stands."),
        ("5XX", "The engine is not available (503), overloaded (529) or failed (500)."),
    )
}


def router(context: GatewayContext) -> APIRouter:
    """The routes over these models."""
    routes = APIRouter(tags=["messages"])

    @routes.post(
        "/v1/messages",
        response_class=Response,
        responses={200: documented(Message, streams=get_args(MessageStreamEvent)), **_ERRORS},
        summary="Answer a conversation, as Anthropic's API does",
    )
    async def create_message(
        body: MessageRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        sampling = SamplingFields(
            model=body.model,
            temperature=body.temperature,
            top_k=body.top_k,
            top_p=body.top_p,
            stop=body.stop_sequences,
        )
        conversation = conversation_of(body, sampling, body.max_tokens)

        ignored = (FIELD_NAMES[name] for name in conversation.ignored(context.model(body.model)))

        async def begin(model: ServedModel) -> Begun:
            answer = MessageAnswer(model.id, shows_thinking=body.thinks, shows_thoughts=body.shows_thoughts)
            asked = await choices(conversation, model, hints, answer_id=answer.id, grammars=context.grammars)
            deltas = stream_choices(model, asked, api=API, bus=context.bus, started_s=hints.came_s)
            return Begun(answer, deltas)

        return await respond(
            begin,
            context.candidates(body.model),
            stream=bool(body.stream),
            headers=body.ignored_headers(ignored),
            request=request,
            keepalive_s=context.config.keepalive_s,
            keepalive=_PING,
            failure=failure_event,
        )

    @routes.post(
        "/v1/messages/count_tokens",
        response_class=Response,
        responses={200: documented(TokenCount), **_ERRORS},
        summary="How many tokens a conversation is",
    )
    async def count_tokens(body: CountTokensRequest) -> Response:
        conversation = conversation_of(body, SamplingFields(model=body.model), None)
        ids = await prompt_ids(conversation, context.model(body.model))
        return Response(msgspec.json.encode(TokenCount(input_tokens=len(ids))), media_type="application/json")

    return routes
