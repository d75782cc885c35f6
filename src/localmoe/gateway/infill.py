"""`POST /infill`: code between a prefix and a suffix, as llama.cpp's server has it and editors' extensions use it."""

import uuid
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from localmoe.core.request import FinishReason
from localmoe.gateway.answering.generation import Choice, ChoiceDelta, stream_choices
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.prompts import EncodedPrompt, encode_to_fill, prompt_source
from localmoe.gateway.answering.sampling import resolve_max_tokens, sampling_params
from localmoe.gateway.answering.streaming import Begun, encode_event, respond
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.fields import MAX_TOKENS, ApiModel, SamplingFields, Text
from localmoe.gateway.openapi import ERROR_RESPONSES, documented
from localmoe.text.fill_in_middle import OtherFile

API = "infill"
MAX_FILES = 256


class ExtraFile(ApiModel):
    """A file that helps to understand the one in question."""

    filename: Annotated[Text, Field(max_length=4096)]
    text: Text


class InfillRequest(SamplingFields):
    """Asks for what is between two texts."""

    IGNORED = (
        "cache_prompt",
        "id_slot",
        "n_indent",
        "n_keep",
        "response_fields",
        "samplers",
        "t_max_predict_ms",
        "t_max_prompt_ms",
        "timings_per_token",
    )
    REFUSED = {  # noqa: RUF012
        "dynatemp_range": (0, 0.0),
        "grammar": ("",),
        "json_schema": (),
        "mirostat": (0,),
        "n_probs": (0,),
        "typical_p": (1, 1.0),
    }
    EXAMPLE = {  # noqa: RUF012
        "input_prefix": "def add(a, b):\n    return ",
        "input_suffix": "\n",
        "n_predict": 16,
    }

    model: str = Field(default="", max_length=512, description="The first model that can fill in, if omitted.")
    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: Annotated[list[ExtraFile], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_FILES
    )
    prompt: Text = Field(default="", description="Put after the prefix.")
    n: Literal[1] | None = None
    n_predict: int | None = Field(
        default=None,
        ge=-1,
        le=MAX_TOKENS,
        description="Longest answer; the rest of the context for -1 or if omitted.",
    )


class Infill(BaseModel):
    """The answer, or one event of a stream: there the content is what has come since the last one."""

    index: Literal[0] = 0
    content: str
    stop: bool
    """Whether this is all."""
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    """Of the prompt."""
    stop_type: Literal["none", "eos", "limit", "word"]
    stopping_word: str = ""
    truncated: Literal[False] = False


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["completions"])

    @routes.post(
        "/infill",
        response_model=Infill,
        responses={200: documented(Infill, streams=[Infill]), **ERROR_RESPONSES},
        summary="Fill in between two texts",
    )
    async def create_infill(
        body: InfillRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        prefix = body.input_prefix + body.prompt
        others = [OtherFile(name=file.filename, text=file.text) for file in body.input_extra or ()]

        async def begin(model: ServedModel) -> Begun:
            prompts = await encode_to_fill([prefix], body.input_suffix, model, others=others)
            answer = InfillAnswer(body, model, prompts[0], hints)
            deltas = stream_choices(model, [answer.choice], api=API, bus=context.bus, started_s=hints.came_s)
            return Begun(answer, deltas)

        return await respond(
            begin,
            context.candidates(body.model or _first_to_fill(context)),
            stream=bool(body.stream),
            headers=body.ignored_headers(),
            request=request,
            keepalive_s=context.config.keepalive_s,
        )

    return routes


def _first_to_fill(context: GatewayContext) -> str:
    """A model's name; one that cannot do it, whose refusal says so, where none can."""
    able = (name for name, model in context.models.items() if model.text is None or model.text.fill_in_middle)
    return next(able, None) or next(iter(context.models), "")


class InfillAnswer:
    """One request's answer, in the making."""

    def __init__(
        self, body: InfillRequest, model: ServedModel, prompt: EncodedPrompt, hints: DispatchHints
    ) -> None:
        limit = None if body.n_predict is None or body.n_predict < 0 else body.n_predict
        max_tokens = resolve_max_tokens(
            limit, field="n_predict", prompt_field="input_prefix", num_prompt_tokens=len(prompt.ids), model=model
        )
        self._model_id = model.id
        self.choice = Choice(
            index=0,
            request=hints.request(
                f"infill-{uuid.uuid4().hex}",
                model=model,
                prompt_ids=prompt.ids,
                source=prompt_source(body, model, text=prompt.given, suffix=body.input_suffix),
                sampling=sampling_params(
                    body,
                    model,
                    max_tokens=max_tokens,
                    logprobs=None,
                    also_stop_at=prompt.stop_token_ids,
                ),
            ),
            stop_strings=body.stop_strings,
        )
        self._texts: list[str] = []
        self._last: ChoiceDelta | None = None

    def events(self, delta: ChoiceDelta) -> bytes:
        """See `Answer.events`."""
        return encode_event(self._piece(delta, delta.text))

    def end(self) -> bytes:
        """See `Answer.end`: the last piece says so itself."""
        return b""

    def add(self, delta: ChoiceDelta) -> None:
        """See `Answer.add`."""
        self._texts.append(delta.text)
        self._last = delta

    def whole(self) -> bytes:
        """See `Answer.whole`."""
        assert self._last is not None
        return msgspec.json.encode(self._piece(self._last, "".join(self._texts)))

    def _piece(self, delta: ChoiceDelta, content: str) -> dict[str, Any]:
        """An `Infill`."""
        return {
            "index": 0,
            "content": content,
            "stop": delta.finish_reason is not None,
            "model": self._model_id,
            "tokens_predicted": delta.completion_tokens,
            "tokens_evaluated": delta.prompt_tokens,
            "stop_type": _stop_type(delta),
            "stopping_word": delta.stop_string or "",
            "truncated": False,
        }


def _stop_type(delta: ChoiceDelta) -> str:
    if delta.finish_reason is None:
        return "none"
    if delta.stop_string is not None:
        return "word"
    return "limit" if delta.finish_reason is FinishReason.LENGTH else "eos"
