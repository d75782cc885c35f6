"""`POST /v1/chat/completions`."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from localmoe.core.request import FinishReason
from localmoe.core.request import Request as GenerationRequest
from localmoe.gateway.chat_schema import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
)
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.disconnect import run_until_disconnect
from localmoe.gateway.generation import Choice, ChoiceDelta, ScoredToken, UsageCounter, stream_choices
from localmoe.gateway.logprobs import chat_logprobs
from localmoe.gateway.openapi import ERROR_RESPONSES, stream_or
from localmoe.gateway.prompts import encode_chat
from localmoe.gateway.responses import EventStreamResponse, encode_event, json_response
from localmoe.gateway.sampling import resolve_max_tokens, sampling_params

API = "chat.completions"


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["chat"])

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: stream_or("ChatCompletionChunk"), **ERROR_RESPONSES},
        summary="Answer a conversation",
    )
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        started_s = time.monotonic()
        model = context.model(body.model)
        prompt_ids = await encode_chat(model, [message.for_template() for message in body.messages])
        answer = ChatAnswer(body, model, prompt_ids)
        deltas = stream_choices(model, answer.choices, api=API, bus=context.bus, started_s=started_s)
        if body.stream:
            return EventStreamResponse(
                answer.events(deltas),
                keepalive_s=context.config.keepalive_s,
                headers=body.ignored_headers(),
            )
        completion = await run_until_disconnect(request.receive, answer.collect(deltas))
        return json_response(completion, headers=body.ignored_headers())

    return routes


class ChatAnswer:
    """One request's answer, in the making."""

    def __init__(self, body: ChatCompletionRequest, model: ServedModel, prompt_ids: list[int]) -> None:
        field = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = resolve_max_tokens(
            body.answer_limit, field=field, prompt_field="messages", num_prompt_tokens=len(prompt_ids), model=model
        )
        self._tokenizer = model.text.tokenizer
        self._model_id = model.id
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._with_logprobs = body.num_logprobs is not None
        self._include_usage = body.include_usage
        self.choices: Sequence[Choice] = [
            Choice(
                index=index,
                request=GenerationRequest(
                    id=f"{self._id}-{index}",
                    model=model.id,
                    prompt_ids=prompt_ids,
                    sampling=sampling_params(
                        body, model, choice=index, max_tokens=max_tokens, logprobs=body.num_logprobs
                    ),
                ),
                stop_strings=body.stop_strings,
            )
            for index in range(body.n or 1)
        ]
        self._usage = UsageCounter(self.choices, len(self.choices))

    async def collect(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> ChatCompletion:
        """The answer in one piece."""
        texts: list[list[str]] = [[] for _ in self.choices]
        scored: list[list[ScoredToken]] = [[] for _ in self.choices]
        reasons: dict[int, FinishReason] = {}
        async with aclosing(deltas):
            async for delta in deltas:
                self._usage.count(delta)
                texts[delta.index].append(delta.text)
                scored[delta.index] += delta.scored
                if delta.finish_reason is not None:
                    reasons[delta.index] = delta.finish_reason
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model_id,
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(role="assistant", content="".join(texts[index]), refusal=None),
                    logprobs=chat_logprobs(self._tokenizer, scored[index]) if self._with_logprobs else None,
                    finish_reason=reasons[index],
                )
                for index in range(len(self.choices))
            ],
            usage=self._usage.usage(),
        )

    async def events(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> AsyncGenerator[bytes, None]:
        """The answer as encoded events: per choice a role chunk, texts, and an empty chunk with the reason."""
        begun: set[int] = set()
        async with aclosing(deltas):
            async for delta in deltas:
                self._usage.count(delta)
                if delta.index not in begun:
                    begun.add(delta.index)
                    yield self._chunk(delta.index, ChatDelta(role="assistant", content=""))
                if delta.text or delta.scored:
                    yield self._chunk(delta.index, ChatDelta(content=delta.text), scored=delta.scored)
                if delta.finish_reason is not None:
                    yield self._chunk(delta.index, ChatDelta(), finish_reason=delta.finish_reason)
        if self._include_usage:
            chunk = self._envelope([])
            chunk.usage = self._usage.usage()
            yield encode_event(chunk)

    def _chunk(
        self,
        index: int,
        delta: ChatDelta,
        *,
        scored: Sequence[ScoredToken] = (),
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        logprobs = chat_logprobs(self._tokenizer, scored) if scored else None
        choice = ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        return encode_event(self._envelope([choice]))

    def _envelope(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model_id,
            choices=choices,
        )
        if self._include_usage:
            chunk.usage = None  # set, so that it is sent as null
        return chunk
