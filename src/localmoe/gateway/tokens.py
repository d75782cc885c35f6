"""`POST /v1/tokenize` and `/v1/detokenize`, in vLLM's shapes."""

from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from localmoe.core.errors import InvalidRequestError
from localmoe.gateway.answering.conversation import Conversation, prompt_ids
from localmoe.gateway.answering.prompts import encode_text, work_on
from localmoe.gateway.answering.sampling import check_token_id
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.fields import MAX_TOKEN_IDS, ApiModel, ModelId, SamplingFields, Text, TokenId
from localmoe.gateway.openai.chat_messages import Messages, other_part
from localmoe.gateway.openapi import ERROR_RESPONSES


class TokenizeRequest(ApiModel):
    """Either `prompt` or `messages`."""

    EXAMPLE = {"model": "smollm2-8x135m", "prompt": "Hello"}  # noqa: RUF012

    model: ModelId
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        default=None,
        description="Put the model's beginning token before the text. Default: true for a prompt, false for "
        "messages, whose template writes its own.",
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("send either prompt or messages", param="prompt")
        return self


class TokenizeResponse(BaseModel):
    """The token ids and how they compare to the model's context."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeRequest(ApiModel):
    """Token ids of one text."""

    EXAMPLE = {"model": "smollm2-8x135m", "tokens": [19556]}  # noqa: RUF012

    model: ModelId
    tokens: Annotated[list[TokenId], Field(fail_fast=True)] = Field(max_length=MAX_TOKEN_IDS)


class DetokenizeResponse(BaseModel):
    """The text, special tokens written out."""

    prompt: str


def router(context: GatewayContext) -> APIRouter:
    """The routes over these models."""
    routes = APIRouter(tags=["tokens"])

    @routes.post("/v1/tokenize", responses=ERROR_RESPONSES, summary="Text or messages to token ids")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        model = context.model(body.model)
        _ = model.local_text  # a refusal where it is not here
        if body.messages is not None:
            conversation = Conversation(
                messages=[message.plain() for message in body.messages],
                sampling=SamplingFields(model=body.model),
                max_tokens=None,
                max_tokens_field="max_tokens",
                other_part=other_part(body.messages),
            )
            ids = await prompt_ids(conversation, model, add_special_tokens=bool(body.add_special_tokens))
        else:
            prompt = body.prompt or ""
            add = body.add_special_tokens is not False
            ids = await work_on(len(prompt), encode_text, prompt, model, add_special_tokens=add, param="prompt")
        return TokenizeResponse(count=len(ids), max_model_len=model.context_tokens, tokens=ids)

    @routes.post("/v1/detokenize", responses=ERROR_RESPONSES, summary="Token ids to text")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        model = context.model(body.model)
        check_token_id(max(body.tokens, default=0), model, param="tokens")
        decode = model.local_text.tokenizer.decode
        text = await work_on(len(body.tokens), decode, body.tokens, skip_special_tokens=False)
        return DetokenizeResponse(prompt=text)

    return routes
