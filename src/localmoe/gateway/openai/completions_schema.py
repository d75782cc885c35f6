"""`/v1/completions`: what comes in and what goes out."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from localmoe.core.errors import InvalidRequestError
from localmoe.core.request import FinishReason, Grammar
from localmoe.gateway.answering.structured import StructuredOutputs
from localmoe.gateway.fields import (
    MAX_TOKEN_IDS,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    SamplingFields,
    Text,
    TokenId,
    UsageCounts,
)

MAX_PROMPTS = 256

TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_TOKEN_IDS, fail_fast=True)]


def prompt_kind(value: Any) -> str:
    """Tells the branches of a prompt apart."""
    if not isinstance(value, list):
        return "<text>"
    if value and isinstance(value[0], list):
        return "<lists of ids>"
    return "<texts>" if not value or isinstance(value[0], str) else "<ids>"


Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<ids>")]
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True), Tag("<lists of ids>")],
    Discriminator(prompt_kind),
]


class CompletionRequest(SamplingFields):
    """Asks for the continuation of one or several prompts."""

    IGNORED = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
    REFUSED = {  # noqa: RUF012
        "best_of": (1,),
        "response_format": ({"type": "text"},),
        "store": (False,),
    }
    EXAMPLE = {"model": "smollm2-8x135m", "prompt": "The capital of France is", "max_tokens": 8}  # noqa: RUF012

    prompt: Prompt = Field(description="A text, token ids, or a list of either.")
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOKENS,
        description="Longest answer; the rest of the context if omitted. 0 with `echo` and `logprobs` scores.",
    )
    suffix: Text | None = Field(
        default=None, description="What follows the answer, for models that were made to fill in."
    )
    echo: bool | None = Field(default=None, description="Put the prompt before the answer.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOP_LOGPROBS,
        description="Report log-probabilities and this many alternatives; with `echo` for the prompt too.",
    )

    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="What the answer must be, as vLLM is asked for it."
    )

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must be a sentence of."""
        return None if self.structured_outputs is None else self.structured_outputs.as_grammar

    @model_validator(mode="after")
    def _check_suffix(self) -> Self:
        if self.suffix and self.echo:
            raise InvalidRequestError("not allowed together with suffix", param="echo")
        texts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if self.suffix and not all(isinstance(text, str) for text in texts):
            raise InvalidRequestError("only allowed where the prompt is text", param="suffix")
        return self


class CompletionLogprobs(BaseModel):
    """Parallel lists with an entry per token. The prompt's first token has no probability: null."""

    tokens: list[str]
    """Texts; a token that is no whole character is written `bytes:\\xe2\\x82`."""
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """The answers in one piece, or one event of a stream: there `usage` comes only if asked for."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageCounts | None = None
