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
from localmoe.gateway.generation import Choice, ChoiceDelta, ScoredToken, UsageCounter, stream_choices
from localmoe.gateway.logprobs import chat_logprobs
from localmoe.gateway.openapi import ERROR_RESPONSES, stream_or
from localmoe.gateway.prompts import encode_chat
from localmoe.gateway.responses import respond
from localmoe.gateway.sampling import check_num_logprobs, resolve_max_tokens, sampling_params

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
        check_num_logprobs(answer.choices, echo=False, limit=context.config.max_logprobs)
        deltas = stream_choices(model, answer.choices, api=API, bus=context.bus, started_s=started_s)
        return await respond(answer, deltas, body=body, request=request, keepalive_s=context.config.keepalive_s)

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
        self._begun: set[int] = set()
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
        self.usage = UsageCounter(self.choices, len(self.choices))

    async def collect(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> ChatCompletion:
        """The answer in one piece."""
        texts: list[list[str]] = [[] for _ in self.choices]
        scored: list[list[ScoredToken]] = [[] for _ in self.choices]
        reasons: dict[int, FinishReason] = {}
        async with aclosing(deltas):
            async for delta in deltas:
                self.usage.count(delta)
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
            usage=self.usage.usage(),
        )

    def pieces(self, delta: ChoiceDelta) -> list[ChatChunkChoice]:
        """See `Answer.pieces`: the role at first, the text, and an empty piece with the reason at the end."""
        index = delta.index
        pieces = []
        if index not in self._begun:
            self._begun.add(index)
            begin = ChatDelta(role="assistant", content="")
            pieces.append(ChatChunkChoice(index=index, delta=begin, logprobs=None, finish_reason=None))
        if delta.text or delta.scored:
            logprobs = chat_logprobs(self._tokenizer, delta.scored) if delta.scored else None
            text = ChatDelta(content=delta.text)
            pieces.append(ChatChunkChoice(index=index, delta=text, logprobs=logprobs, finish_reason=None))
        if delta.finish_reason is not None:
            reason = delta.finish_reason
            pieces.append(ChatChunkChoice(index=index, delta=ChatDelta(), logprobs=None, finish_reason=reason))
        return pieces

    def chunk(self, pieces: Sequence[ChatChunkChoice]) -> ChatCompletionChunk:
        """See `Answer.chunk`."""
        return ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model_id,
            choices=list(pieces),
        )
