"""`POST /v1/completions`, with the `echo` and `logprobs` that evaluation harnesses score by."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.request import FinishReason, TokenLogprob
from localmoe.gateway.answering.generation import Choice, ChoiceDelta, UsageCounter, stream_choices
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.prompts import EncodedPrompt, encode_prompts, encode_to_fill, prompt_source
from localmoe.gateway.answering.sampling import (
    bounded_logprobs,
    of_answer,
    resolve_max_tokens,
    sampling_params,
)
from localmoe.gateway.answering.streaming import DONE, Begun, encode, encode_event, respond
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.openai.completions_schema import (
    Completion,
    CompletionRequest,
)
from localmoe.gateway.openai.logprobs import CompletionScores, Scorer
from localmoe.gateway.openapi import ERROR_RESPONSES, documented

API = "completions"


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["completions"])

    @routes.post(
        "/v1/completions",
        response_model=Completion,
        responses={200: documented(Completion, streams=[Completion]), **ERROR_RESPONSES},
        summary="Continue prompts",
    )
    async def create_completion(
        body: CompletionRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        given = _prompts(body.prompt)
        _check_num_choices(len(given), body.n or 1, limit=context.config.max_choices)
        if body.grammar is not None:
            await context.grammars.check(body.grammar, param="structured_outputs")

        async def begin(model: ServedModel) -> Begun:
            if body.suffix:
                prompts = await encode_to_fill([str(text) for text in given], body.suffix, model)
            else:
                prompts = await encode_prompts(given, model, echo=bool(body.echo))
            answer = CompletionAnswer(body, model, prompts, hints)
            asked = bounded_logprobs(
                answer.choices,
                echo=bool(body.echo),
                limit=context.config.max_logprobs,
                max_tokens_given=body.max_tokens is not None,
            )
            deltas = stream_choices(model, asked, api=API, bus=context.bus, started_s=hints.came_s)
            return Begun(answer, deltas)

        return await respond(
            begin,
            context.candidates(body.model),
            stream=bool(body.stream),
            headers=body.ignored_headers(),
            request=request,
            keepalive_s=context.config.keepalive_s,
        )

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


class _Piece(msgspec.Struct, frozen=True, kw_only=True):
    """A `CompletionChoice`, or a part of one."""

    index: int
    text: str
    logprobs: CompletionScores | None
    finish_reason: FinishReason | None


class CompletionAnswer:
    """One request's answer, in the making. Choice `p * n + i` is the i-th answer to prompt p."""

    def __init__(
        self,
        body: CompletionRequest,
        model: ServedModel,
        prompts: Sequence[EncodedPrompt],
        hints: DispatchHints,
    ) -> None:
        self._model = model
        self._scorer = Scorer(model)
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._n = body.n or 1
        self._echo = bool(body.echo)
        self._with_logprobs = body.logprobs is not None
        self._prompts = prompts
        self._begun: set[int] = set()
        self._include_usage = body.include_usage
        self._envelope = {
            "id": self._id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model.id,
        }
        self._prompt_logprobs: dict[int, CompletionScores] = {}
        """By prompt; the first of its answers brings them."""
        self._held: dict[int, list[ChoiceDelta]] = {}
        """By prompt: of its other answers, until then."""
        self.choices = list(self._ask(body, hints))
        self._usage = UsageCounter(self._n)
        self._collected: list[list[_Piece]] = [[] for _ in self.choices]

    def _ask(self, body: CompletionRequest, hints: DispatchHints) -> Iterator[Choice]:
        common = sampling_params(
            body,
            self._model,
            max_tokens=0,  # each prompt leaves another room
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if self._echo else None,
            grammar=body.grammar,
            also_stop_at=self._prompts[0].stop_token_ids,
        )
        for number, prompt in enumerate(self._prompts):
            max_tokens = resolve_max_tokens(
                body.max_tokens,
                field="max_tokens",
                prompt_field="prompt",
                num_prompt_tokens=len(prompt.ids),
                model=self._model,
            )
            sampling = msgspec.structs.replace(common, max_tokens=max_tokens)
            source = prompt_source(body, self._model, text=prompt.given, suffix=body.suffix or None)
            for place in range(self._n):
                index = number * self._n + place
                request = hints.request(
                    f"{self._id}-{index}",
                    model=self._model,
                    prompt_ids=prompt.ids,
                    source=source,
                    sampling=of_answer(sampling, place),
                )
                yield Choice(index=index, request=request, stop_strings=body.stop_strings)

    def add(self, delta: ChoiceDelta) -> None:
        """See `Answer.add`."""
        self._usage.count(delta)
        for piece in self._pieces(delta):
            self._collected[piece.index].append(piece)

    def whole(self) -> bytes:
        """See `Answer.whole`: a `Completion`."""
        choices = [_join_pieces(choice) for choice in self._collected]
        return encode({**self._envelope, "choices": choices, "usage": self._usage.usage()})

    def events(self, delta: ChoiceDelta) -> bytes:
        """See `Answer.events`."""
        self._usage.count(delta)
        return b"".join(map(self._event, self._pieces(delta)))

    def end(self) -> bytes:
        """See `Answer.end`: token counts where asked for."""
        if not self._include_usage:
            return DONE
        return encode_event({**self._envelope, "choices": [], "usage": self._usage.usage()}) + DONE

    def _event(self, piece: "_Piece") -> bytes:
        """A `Completion`."""
        chunk = {**self._envelope, "choices": [piece]}
        if self._include_usage:
            chunk["usage"] = None
        return encode_event(chunk)

    def _pieces(self, delta: ChoiceDelta) -> "list[_Piece]":
        """What a delta adds. An echo with log-probabilities waits for those of its prompt."""
        prompt, place = divmod(delta.index, self._n)
        if self._echo and self._with_logprobs and prompt not in self._prompt_logprobs:
            if place > 0:
                self._held.setdefault(prompt, []).append(delta)
                return []
            self._prompt_logprobs[prompt] = self._score(self._prompts[prompt], delta.prompt_logprobs)
        return [piece for ready in [delta, *self._held.pop(prompt, [])] for piece in self._own_pieces(ready)]

    def _own_pieces(self, delta: ChoiceDelta) -> "list[_Piece]":
        """The echoed prompt if due, the text, and the end, as far as this delta has them."""
        prompt = delta.index // self._n
        pieces = []
        if self._echo and delta.index not in self._begun:
            self._begun.add(delta.index)
            logprobs = self._prompt_logprobs.get(prompt)
            text = self._prompts[prompt].text
            pieces.append(_Piece(index=delta.index, text=text, logprobs=logprobs, finish_reason=None))
        if delta.text or delta.scored:
            base = len(self._prompts[prompt].text)
            logprobs = None
            if self._with_logprobs:
                logprobs = self._scorer.completion_scores(delta.scored, base_offset=base)
            pieces.append(_Piece(index=delta.index, text=delta.text, logprobs=logprobs, finish_reason=None))
        if delta.finish_reason is not None:
            reason = delta.finish_reason
            pieces.append(_Piece(index=delta.index, text="", logprobs=None, finish_reason=reason))
        return pieces

    def _score(self, prompt: EncodedPrompt, scored: list[TokenLogprob] | None) -> CompletionScores:
        if scored is None:
            raise EngineFaultError("the engine sent no log-probabilities of the prompt")
        return self._scorer.prompt_scores(prompt.ids, scored, num_prefix_tokens=prompt.num_prefix_tokens)


def _join_pieces(pieces: Sequence[_Piece]) -> _Piece:
    scores = None
    for piece in pieces:
        if piece.logprobs is not None:
            scores = scores or CompletionScores([], [], [], [])
            scores.add(piece.logprobs)  # into lists of its own: several answers share a prompt's
    last = pieces[-1]
    return _Piece(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        logprobs=scores,
        finish_reason=last.finish_reason,
    )
