"""`POST /v1/tokenize` and `/v1/detokenize`, in vLLM's shapes."""

from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import BaseModel, Field, model_validator

from localmoe.core.errors import InvalidRequestError
from localmoe.gateway.chat_schema import MAX_MESSAGES, ChatMessage
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.fields import MAX_TOKEN_IDS, ApiModel, ModelId, Text, TokenId
from localmoe.gateway.openapi import ERROR_RESPONSES
from localmoe.gateway.prompts import encode_chat, encode_text, work_on
from localmoe.gateway.sampling import check_token_id


class TokenizeRequest(ApiModel):
    """Either `prompt` or `messages`."""

    EXAMPLE = {"model": "smollm2-8x135m", "prompt": "Hello"}  # noqa: RUF012

    model: ModelId
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES
    )
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
    max_model_len: int
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
        if body.messages is not None:
            messages = [message.for_template() for message in body.messages]
            ids = await encode_chat(model, messages, add_special_tokens=bool(body.add_special_tokens))
        else:
            prompt = body.prompt or ""
            add = body.add_special_tokens is not False
            ids = await work_on(len(prompt), encode_text, prompt, model, add_special_tokens=add, param="prompt")
        return TokenizeResponse(count=len(ids), max_model_len=model.context_tokens, tokens=ids)

    @routes.post("/v1/detokenize", responses=ERROR_RESPONSES, summary="Token ids to text")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        model = context.model(body.model)
        check_token_id(max(body.tokens, default=0), model, param="tokens")
        text = await work_on(len(body.tokens), model.text.tokenizer.decode, body.tokens, skip_special_tokens=False)
        return DetokenizeResponse(prompt=text)

    return routes
