"""`POST /v1/completions`, with the `echo` and `logprobs` that evaluation harnesses score by."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request
from starlette.responses import Response

from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.request import Request as GenerationRequest
from localmoe.gateway.completions_schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.disconnect import run_until_disconnect
from localmoe.gateway.generation import Choice, ChoiceDelta, UsageCounter, stream_choices
from localmoe.gateway.logprobs import completion_logprobs, join, prompt_logprobs
from localmoe.gateway.openapi import ERROR_RESPONSES, stream_or
from localmoe.gateway.prompts import encode_text, work_on
from localmoe.gateway.responses import EventStreamResponse, encode_event, json_response
from localmoe.gateway.sampling import check_token_id, resolve_max_tokens, sampling_params

API = "completions"


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """One prompt, ready for the engine."""

    ids: list[int]
    text: str
    """What `echo` shows; empty if it was not asked for."""
    num_prefix_tokens: int
    """Tokens at the beginning that the text does not show."""


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["completions"])

    @routes.post(
        "/v1/completions",
        response_model=Completion,
        responses={200: stream_or("Completion"), **ERROR_RESPONSES},
        summary="Continue prompts",
    )
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        started_s = time.monotonic()
        model = context.model(body.model)
        prompts = await encode_prompts(body, model, max_choices=context.config.max_choices)
        answer = CompletionAnswer(body, model, prompts)
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


async def encode_prompts(body: CompletionRequest, model: ServedModel, *, max_choices: int) -> list[EncodedPrompt]:
    """Token ids of every prompt, in whichever of the four ways they were given.

    Raises:
        InvalidRequestError: too many choices, an empty prompt, or an id outside the vocabulary.
    """
    given = _prompts(body.prompt)
    num_choices = len(given) * (body.n or 1)
    if num_choices > max_choices:
        raise InvalidRequestError(
            f"prompt: {len(given)} prompts with n = {body.n or 1} are {num_choices} choices; at most"
            f" {max_choices} are allowed",
            param="prompt",
        )
    tokenizer = model.text.tokenizer
    encoded = []
    for index, prompt in enumerate(given):
        param = "prompt" if len(given) == 1 else f"prompt[{index}]"
        if isinstance(prompt, str):
            ids = await encode_text(model, prompt, param=param)
            encoded.append(
                EncodedPrompt(
                    ids=ids, text=prompt if body.echo else "", num_prefix_tokens=tokenizer.num_prefix_tokens
                )
            )
        else:
            check_token_id(max(prompt), model, param=param)
            text = ""
            if body.echo:
                text = await work_on(len(prompt), tokenizer.decode, prompt, skip_special_tokens=False)
            encoded.append(EncodedPrompt(ids=prompt, text=text, num_prefix_tokens=0))
    return encoded


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


class CompletionAnswer:
    """One request's answer, in the making. Choice `p * n + i` is the i-th answer to prompt p."""

    def __init__(self, body: CompletionRequest, model: ServedModel, prompts: Sequence[EncodedPrompt]) -> None:
        self._tokenizer = model.text.tokenizer
        self._model_id = model.id
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._with_logprobs = body.logprobs is not None
        self._include_usage = body.include_usage
        self._prompts = prompts
        self.choices: list[Choice] = []
        for prompt in prompts:
            max_tokens = resolve_max_tokens(
                body.max_tokens,
                field="max_tokens",
                prompt_field="prompt",
                num_prompt_tokens=len(prompt.ids),
                model=model,
            )
            for place in range(self._n):
                sampling = sampling_params(
                    body,
                    model,
                    choice=place,
                    max_tokens=max_tokens,
                    logprobs=body.logprobs,
                    prompt_logprobs=body.logprobs if self._echo else None,
                )
                index = len(self.choices)
                request = GenerationRequest(
                    id=f"{self._id}-{index}", model=model.id, prompt_ids=prompt.ids, sampling=sampling
                )
                self.choices.append(Choice(index=index, request=request, stop_strings=body.stop_strings))
        self._usage = UsageCounter(self.choices, self._n)

    async def collect(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> Completion:
        """The answers in one piece."""
        pieces: list[list[CompletionChoice]] = [[] for _ in self.choices]
        async with aclosing(deltas):
            async for delta in deltas:
                self._usage.count(delta)
                pieces[delta.index] += self._pieces(delta, first=not pieces[delta.index])
        completion = self._envelope([_join_pieces(choice) for choice in pieces])
        completion.usage = self._usage.usage()
        return completion

    async def events(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> AsyncGenerator[bytes, None]:
        """The answers as encoded events; each choice ends with an empty text and the reason."""
        begun: set[int] = set()
        async with aclosing(deltas):
            async for delta in deltas:
                self._usage.count(delta)
                for piece in self._pieces(delta, first=delta.index not in begun):
                    begun.add(delta.index)
                    yield encode_event(self._stream_envelope([piece]))
        if self._include_usage:
            chunk = self._stream_envelope([])
            chunk.usage = self._usage.usage()
            yield encode_event(chunk)

    def _pieces(self, delta: ChoiceDelta, *, first: bool) -> list[CompletionChoice]:
        """The echoed prompt if due, the text, and the end, as far as this delta has them."""
        pieces = []
        if first and self._echo:
            pieces.append(self._echoed(delta))
        if delta.text or delta.scored:
            base = len(self._prompts[delta.index // self._n].text)
            logprobs = None
            if self._with_logprobs:
                logprobs = completion_logprobs(self._tokenizer, delta.scored, base_offset=base)
            pieces.append(
                CompletionChoice(index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=None)
            )
        if delta.finish_reason is not None:
            pieces.append(
                CompletionChoice(index=delta.index, text="", logprobs=None, finish_reason=delta.finish_reason)
            )
        return pieces

    def _echoed(self, delta: ChoiceDelta) -> CompletionChoice:
        prompt = self._prompts[delta.index // self._n]
        logprobs = None
        if self._with_logprobs:
            if delta.prompt_logprobs is None:
                raise EngineFaultError("the engine sent no log-probabilities of the prompt")
            logprobs = prompt_logprobs(
                self._tokenizer,
                prompt.ids,
                delta.prompt_logprobs,
                num_prefix_tokens=prompt.num_prefix_tokens,
            )
        return CompletionChoice(index=delta.index, text=prompt.text, logprobs=logprobs, finish_reason=None)

    def _stream_envelope(self, choices: list[CompletionChoice]) -> Completion:
        chunk = self._envelope(choices)
        if self._include_usage:
            chunk.usage = None  # set, so that it is sent as null
        return chunk

    def _envelope(self, choices: list[CompletionChoice]) -> Completion:
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model_id,
            choices=choices,
        )


def _join_pieces(pieces: Sequence[CompletionChoice]) -> CompletionChoice:
    logprobs: CompletionLogprobs | None = None
    for piece in pieces:
        if piece.logprobs is not None:
            logprobs = piece.logprobs if logprobs is None else join(logprobs, piece.logprobs)
    last = pieces[-1]
    return CompletionChoice(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        logprobs=logprobs,
        finish_reason=last.finish_reason,
    )
