"""`POST /v1/embeddings`.

Each input is a request of its own, as each choice of an answer is; some of them are under way at a time, so that many
inputs neither fill the queue nor keep others from their places. An embedding is of use only beside others of the same
model, so no fallback answers in a model's place.
"""

import asyncio
import base64
import math
import struct
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, Discriminator, Field, Tag
from starlette.responses import Response, StreamingResponse

from localmoe.core.errors import ContextLengthError, EngineFaultError, InvalidRequestError
from localmoe.core.events import EventBus, RequestFinished
from localmoe.core.request import PromptSource, SamplingParams, Usage
from localmoe.core.request import Request as EngineRequest
from localmoe.gateway.answering.disconnect import run_until_disconnect
from localmoe.gateway.answering.hints import DispatchHints, dispatch_hints
from localmoe.gateway.answering.prompts import encode_text, not_empty, work_on
from localmoe.gateway.answering.sampling import check_token_id
from localmoe.gateway.answering.streaming import first_able
from localmoe.gateway.context import GatewayContext, ServedModel
from localmoe.gateway.exchange import CLIENT_LEFT
from localmoe.gateway.fields import ApiModel, ModelId, Text
from localmoe.gateway.limits.metering import Metered, num_prompt_tokens
from localmoe.gateway.openai.completions_schema import TokenIds, prompt_kind
from localmoe.gateway.openapi import ERROR_RESPONSES

API = "embeddings"
MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 300_000
"""Of all inputs together. Both are OpenAI's bounds."""
_AT_ONCE = 16
"""Inputs of one request under way."""
_NO_TOKENS = SamplingParams(max_tokens=0, temperature=0.0)

InputText = Annotated[Text, Field(min_length=1)]
Input = Annotated[
    Annotated[InputText, Tag("<text>")]
    | Annotated[list[InputText], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("<lists of ids>")],
    Discriminator(prompt_kind),
]


class EmbeddingRequest(ApiModel):
    """Asks for a vector for each input."""

    IGNORED = ("user",)
    EXAMPLE = {"model": "smollm2-8x135m", "input": "The food was delicious."}  # noqa: RUF012

    model: ModelId = Field(description="A name from `/v1/models`.")
    input: Input = Field(description="A text, token ids, or a list of either.")
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="Numbers, or base64 of little-endian float32."
    )
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=2**16,
        description="Keep so many of the first dimensions, scaled to length 1 again. Models that generate were not "
        "trained to have the most important ones first.",
    )

    @property
    def inputs(self) -> Sequence[str | list[int]]:
        """All of them, whichever way they were written."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [item for item in self.input if isinstance(item, int)]
        return [ids] if ids else [item for item in self.input if not isinstance(item, int)]


class Embedding(BaseModel):
    """One input's."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """In the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def router(context: GatewayContext) -> APIRouter:
    """The route over these models."""
    routes = APIRouter(tags=["embeddings"])

    @routes.post(
        "/v1/embeddings", response_model=EmbeddingList, responses=ERROR_RESPONSES, summary="Texts to vectors"
    )
    async def create_embeddings(
        body: EmbeddingRequest, request: Request, hints: Annotated[DispatchHints, Depends(dispatch_hints)]
    ) -> Response:
        async def embed(model: ServedModel) -> "_Embedded":
            return await _embed(body, model, hints, bus=context.bus)

        embedded = await run_until_disconnect(request.receive, first_able(embed, context.holders(body.model)))
        if embedded is None:
            return Response(status_code=CLIENT_LEFT)
        return StreamingResponse(
            _pieces(embedded, body), headers=body.ignored_headers(), media_type="application/json"
        )

    return routes


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """What is answered."""

    model_id: str
    vectors: Sequence[bytes]
    prompt_tokens: int


async def _embed(body: EmbeddingRequest, model: ServedModel, hints: DispatchHints, *, bus: EventBus) -> _Embedded:
    """All inputs' vectors.

    Raises:
        InvalidRequestError: an input is too long, or has tokens that the model does not know; all of them have too
            many; the model's vectors have fewer dimensions than are wanted; or none of its engines embeds.
        BackendUnavailableError: see `Generator.generate`.
        EngineFaultError: likewise; also for an engine that sends something else.
    """
    inputs = body.inputs
    prompts = await work_on(sum(map(len, inputs)), _encode, inputs, model)
    answer_id = uuid.uuid4().hex

    def asked(index: int) -> EngineRequest:
        given = inputs[index]
        request = hints.request(
            f"embd-{answer_id}-{index}",
            model=model,
            prompt_ids=prompts[index],
            source=PromptSource(text=given) if isinstance(given, str) else None,
            sampling=_NO_TOKENS,
        )
        return msgspec.structs.replace(request, embed=True)

    vectors, num_tokens = [b""] * len(inputs), [0] * len(inputs)
    waiting = iter(range(len(inputs)))

    async def work() -> None:
        for index in waiting:
            vector, num_tokens[index] = await _vector(asked(index), model, hints.came_s, bus=bus)
            vectors[index] = _shortened(vector, body.dimensions)

    async with Metered(num_prompt_tokens([asked(index) for index in range(len(inputs))]), 0):
        workers = [asyncio.create_task(work()) for _ in range(min(_AT_ONCE, len(inputs)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
    return _Embedded(model_id=model.id, vectors=vectors, prompt_tokens=sum(num_tokens))


def _encode(inputs: Sequence[str | list[int]], model: ServedModel) -> list[list[int]]:
    """Token ids of the inputs; of texts none where the engine tokenizes."""
    encoded: list[list[int]] = []
    left = MAX_INPUT_TOKENS
    for index, given in enumerate(inputs):
        param = "input" if len(inputs) == 1 else f"input[{index}]"
        if isinstance(given, str):
            if model.text is None:
                encoded.append([])
                continue
            ids = encode_text(given, model, add_special_tokens=True, param=param)
        else:
            ids = given
            check_token_id(max(ids), model, param=param)
        encoded.append(not_empty(ids, param))
        if model.context_tokens is not None and len(ids) > model.context_tokens:
            raise ContextLengthError(
                f"{param}: it has {len(ids)} tokens; the model's context is {model.context_tokens}. Shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        left -= len(ids)
        if left < 0:
            raise InvalidRequestError(
                f"input: the inputs have more than {MAX_INPUT_TOKENS} tokens together; send fewer at a time",
                param="input",
            )
    return encoded


async def _vector(
    request: EngineRequest, model: ServedModel, started_s: float, *, bus: EventBus
) -> tuple[bytes, int]:
    """One input's vector and number of tokens; publishes how it went.

    Args:
        started_s: monotonic time at which the HTTP request came.
    """
    outcome, usage, num_tokens = "error", None, len(request.prompt_ids)
    try:
        async with aclosing(model.generator.generate(request)) as chunks:
            async for chunk in chunks:
                usage = chunk.usage or usage
                if chunk.embedding is not None:
                    num_tokens = num_tokens or (usage.prompt_tokens if usage else 0)
                    outcome = "stop"
                    return chunk.embedding, num_tokens
        raise EngineFaultError("the engine sent no embedding")
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or not task.cancelling():  # it came from below
            raise EngineFaultError("the engine broke the answer off") from None
        outcome = "abort"
        raise
    finally:
        bus.publish(_finished(model, outcome, num_tokens, usage, started_s))


def _finished(
    model: ServedModel, outcome: str, num_tokens: int, usage: Usage | None, started_s: float
) -> RequestFinished:
    return RequestFinished(
        model=model.id,
        api=API,
        outcome=outcome,
        prompt_tokens=num_tokens,
        completion_tokens=0,
        time_to_first_token_s=None,
        inter_token_s=(),
        queue_s=usage.queue_s if usage else None,
        prefill_s=usage.prefill_s if usage else None,
        e2e_s=time.monotonic() - started_s,
    )


def _shortened(vector: bytes, dimensions: int | None) -> bytes:
    """The first dimensions, of length 1. Raises InvalidRequestError where there are fewer."""
    if dimensions is None:
        return vector
    values = _numbers(vector)
    if dimensions > len(values):
        raise InvalidRequestError(
            f"dimensions: {dimensions} are wanted, and the model's vectors have {len(values)}", param="dimensions"
        )
    length = math.hypot(*values[:dimensions]) or 1.0
    return struct.pack(f"<{dimensions}f", *(value / length for value in values[:dimensions]))


def _numbers(vector: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(vector) // 4}f", vector)


async def _pieces(embedded: _Embedded, body: EmbeddingRequest) -> AsyncGenerator[bytes, None]:
    """An `EmbeddingList`, vector by vector: thousands of them are hundreds of megabytes of JSON."""
    before = b'{"object":"list","data":['
    for index, vector in enumerate(embedded.vectors):
        shown: Any = base64.b64encode(vector).decode() if body.encoding_format == "base64" else _numbers(vector)
        yield before + msgspec.json.encode({"object": "embedding", "index": index, "embedding": shown})
        before = b","
        await asyncio.sleep(0)  # others have their turn
    usage = {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens}
    yield b'],"model":' + msgspec.json.encode(embedded.model_id) + b',"usage":' + msgspec.json.encode(usage) + b"}"
