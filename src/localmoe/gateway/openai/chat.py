"""`POST /v1/chat/completions`."""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from localmoe.core.request import FinishReason, ToolCallDelta
from localmoe.gateway.answering.conversation import choices
from localmoe.gateway.answering.generation import ChoiceDelta, UsageCounter, stream_choices
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.sampling import bounded_logprobs
from localmoe.gateway.answering.streaming import DONE, Begun, encode, encode_event, respond
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.openai.chat_schema import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    FunctionCall,
    ToolCall,
)
from localmoe.gateway.openai.logprobs import Scorer
from localmoe.gateway.openapi import ERROR_RESPONSES, documented

API = "chat.completions"


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["chat"])

    @routes.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={200: documented(ChatCompletion, streams=[ChatCompletionChunk]), **ERROR_RESPONSES},
        summary="Answer a conversation",
    )
    async def create_chat_completion(
        body: ChatCompletionRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        conversation = body.conversation()
        ignored = conversation.ignored(context.model(body.model))

        async def begin(model: ServedModel) -> Begun:
            answer_id = f"chatcmpl-{uuid.uuid4().hex}"
            given = await choices(conversation, model, hints, answer_id=answer_id, grammars=context.grammars)
            asked = bounded_logprobs(
                given,
                echo=False,
                limit=context.config.max_logprobs,
                max_tokens_given=conversation.max_tokens is not None,
            )
            deltas = stream_choices(model, asked, api=API, bus=context.bus, started_s=hints.came_s)
            return Begun(ChatAnswer(body, model, len(asked), answer_id), deltas)

        return await respond(
            begin,
            context.candidates(body.model),
            stream=bool(body.stream),
            headers=body.ignored_headers(ignored),
            request=request,
            keepalive_s=context.config.keepalive_s,
        )

    return routes


class ChatAnswer:
    """One request's answer, in the making."""

    def __init__(self, body: ChatCompletionRequest, model: ServedModel, num_choices: int, answer_id: str) -> None:
        self._with_logprobs = body.num_logprobs is not None
        self._scorer = Scorer(model)
        self._begun: set[int] = set()
        self._include_usage = body.include_usage
        self._envelope = {
            "id": answer_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model.id,
        }
        self._messages: dict[int, _Message] = {}
        self._usage = UsageCounter(num_choices)

    def add(self, delta: ChoiceDelta) -> None:
        """See `Answer.add`."""
        self._usage.count(delta)
        message = self._messages.setdefault(delta.index, _Message())
        message.add(delta, self._scorer.entries(delta.scored))

    def whole(self) -> bytes:
        """See `Answer.whole`: a `ChatCompletion`."""
        choices = [
            {
                "index": index,
                "message": message.whole(),
                "logprobs": _logprobs(message.scores) if self._with_logprobs else None,
                "finish_reason": message.finish_reason,
            }
            for index, message in sorted(self._messages.items())
        ]
        envelope = {**self._envelope, "object": "chat.completion"}
        return encode({**envelope, "choices": choices, "usage": self._usage.usage()})

    def events(self, delta: ChoiceDelta) -> bytes:
        """See `Answer.events`: the role at first, what there is, and an empty chunk with the reason at the end."""
        self._usage.count(delta)
        events = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            events += self._event(delta.index, {"role": "assistant", "content": ""})
        if delta.reasoning:
            events += self._event(delta.index, {"reasoning_content": delta.reasoning})
        if delta.text or delta.scored:
            logprobs = _logprobs(self._scorer.entries(delta.scored)) if delta.scored else None
            events += self._event(delta.index, {"content": delta.text}, logprobs=logprobs)
        if delta.tool_calls:
            events += self._event(delta.index, {"tool_calls": [_call_chunk(call) for call in delta.tool_calls]})
        if delta.finish_reason is not None:
            events += self._event(delta.index, {}, finish_reason=delta.finish_reason)
        return events

    def end(self) -> bytes:
        """See `Answer.end`: token counts where asked for."""
        if not self._include_usage:
            return DONE
        return encode_event({**self._envelope, "choices": [], "usage": self._usage.usage()}) + DONE

    def _event(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        """A `ChatCompletionChunk`."""
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._envelope, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return encode_event(chunk)


class _Message:
    """One of the answers, put together."""

    finish_reason: FinishReason

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ToolCallDelta, list[str]]] = []
        self.scores: list[msgspec.Raw] = []

    def add(self, delta: ChoiceDelta, scores: list[msgspec.Raw]) -> None:
        self._texts.append(delta.text)
        self._reasoning.append(delta.reasoning)
        self.scores += scores
        for call in delta.tool_calls:
            if call.name is not None:
                self._calls.append((call, []))
            self._calls[call.index][1].append(call.arguments)
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason

    def whole(self) -> AssistantMessage:
        content = "".join(self._texts)
        parts: dict[str, Any] = {}
        if reasoning := "".join(self._reasoning):
            parts["reasoning_content"] = reasoning
        if self._calls:
            parts["tool_calls"] = [
                ToolCall(
                    id=call.id or "",
                    type="function",
                    function=FunctionCall(name=call.name or "", arguments="".join(arguments)),
                )
                for call, arguments in self._calls
            ]
        shown = content if content or not self._calls else None
        return AssistantMessage(role="assistant", content=shown, refusal=None, **parts)


def _logprobs(scores: list[msgspec.Raw]) -> dict[str, Any]:
    """A `ChatLogprobs`."""
    return {"content": scores, "refusal": None}


def _call_chunk(call: ToolCallDelta) -> dict[str, Any]:
    """A `ToolCallChunk`."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": call.id, "type": "function", "function": function}
