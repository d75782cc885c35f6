"""`POST /v1/completions`, with the `echo` and `logprobs` that evaluation harnesses score by."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fastapi import APIRouter, Request
from starlette.responses import Response

from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.request import Request as GenerationRequest
from localmoe.core.request import TokenLogprob
from localmoe.gateway.completions_schema import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.generation import Choice, ChoiceDelta, UsageCounter, stream_choices
from localmoe.gateway.logprobs import completion_logprobs, join, prompt_logprobs
from localmoe.gateway.openapi import ERROR_RESPONSES, stream_or
from localmoe.gateway.prompts import EncodedPrompt, encode_prompts
from localmoe.gateway.responses import respond
from localmoe.gateway.sampling import check_num_logprobs, resolve_max_tokens, sampling_params

API = "completions"


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
        given = _prompts(body.prompt)
        _check_num_choices(len(given), body.n or 1, limit=context.config.max_choices)
        prompts = await encode_prompts(given, model, echo=bool(body.echo))
        answer = CompletionAnswer(body, model, prompts)
        check_num_logprobs(answer.choices, echo=bool(body.echo), limit=context.config.max_logprobs)
        deltas = stream_choices(model, answer.choices, api=API, bus=context.bus, started_s=started_s)
        return await respond(answer, deltas, body=body, request=request, keepalive_s=context.config.keepalive_s)

    return routes


def _check_num_choices(num_prompts: int, n: int, *, limit: int) -> None:
    num_choices = num_prompts * n
    if num_choices > limit:
        raise InvalidRequestError(
            f"prompt: {num_prompts} prompts with n = {n} are {num_choices} choices; at most {limit} are allowed",
            param="prompt",
        )


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
        self._prompts = prompts
        self._begun: set[int] = set()
        self._prompt_logprobs: dict[int, CompletionLogprobs] = {}
        """By prompt; the first of its answers brings them."""
        self._held: dict[int, list[ChoiceDelta]] = {}
        """By prompt: of its other answers, until then."""
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
                    prompt_logprobs=body.logprobs if self._echo and place == 0 else None,
                )
                index = len(self.choices)
                request = GenerationRequest(
                    id=f"{self._id}-{index}", model=model.id, prompt_ids=prompt.ids, sampling=sampling
                )
                self.choices.append(Choice(index=index, request=request, stop_strings=body.stop_strings))
        self.usage = UsageCounter(self.choices, self._n)

    async def collect(self, deltas: AsyncGenerator[ChoiceDelta, None]) -> Completion:
        """The answers in one piece."""
        pieces: list[list[CompletionChoice]] = [[] for _ in self.choices]
        async with aclosing(deltas):
            async for delta in deltas:
                self.usage.count(delta)
                for piece in self.pieces(delta):
                    pieces[piece.index].append(piece)
        completion = self.chunk([_join_pieces(choice) for choice in pieces])
        completion.usage = self.usage.usage()
        return completion

    def pieces(self, delta: ChoiceDelta) -> list[CompletionChoice]:
        """See `Answer.pieces`. An echo with log-probabilities waits for those of its prompt."""
        prompt, place = divmod(delta.index, self._n)
        if self._echo and self._with_logprobs and prompt not in self._prompt_logprobs:
            if place > 0:
                self._held.setdefault(prompt, []).append(delta)
                return []
            self._prompt_logprobs[prompt] = self._score(self._prompts[prompt], delta.prompt_logprobs)
        return [piece for ready in [delta, *self._held.pop(prompt, [])] for piece in self._own_pieces(ready)]

    def _own_pieces(self, delta: ChoiceDelta) -> list[CompletionChoice]:
        """The echoed prompt if due, the text, and the end, as far as this delta has them."""
        prompt = delta.index // self._n
        pieces = []
        if self._echo and delta.index not in self._begun:
            self._begun.add(delta.index)
            logprobs = self._prompt_logprobs.get(prompt)
            text = self._prompts[prompt].text
            pieces.append(CompletionChoice(index=delta.index, text=text, logprobs=logprobs, finish_reason=None))
        if delta.text or delta.scored:
            base = len(self._prompts[prompt].text)
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

    def _score(self, prompt: EncodedPrompt, scored: list[TokenLogprob] | None) -> CompletionLogprobs:
        if scored is None:
            raise EngineFaultError("the engine sent no log-probabilities of the prompt")
        return prompt_logprobs(self._tokenizer, prompt.ids, scored, num_prefix_tokens=prompt.num_prefix_tokens)

    def chunk(self, pieces: Sequence[CompletionChoice]) -> Completion:
        """See `Answer.chunk`."""
        return Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model_id,
            choices=list(pieces),
        )


def _join_pieces(pieces: Sequence[CompletionChoice]) -> CompletionChoice:
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    last = pieces[-1]
    return CompletionChoice(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        logprobs=join(logprobs) if logprobs else None,
        finish_reason=last.finish_reason,
    )
