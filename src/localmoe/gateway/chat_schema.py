"""`/v1/chat/completions`: what comes in and what goes out."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Discriminator, Field, Tag, model_validator

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError
from localmoe.core.request import FinishReason
from localmoe.gateway.fields import (
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    UNICODE,
    ApiModel,
    SamplingFields,
    Text,
    UsageCounts,
    is_list,
)

MAX_MESSAGES = 4096
MAX_PARTS = 1024


class TextPart(ApiModel):
    """One text of a message; the texts of a message are joined by newlines."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_kinds(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "text":
            raise UnsupportedFieldError(
                f"content parts of type {kind[:50]!r} are not supported by this model; send text", param="type"
            )
        return data


Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]


class ChatMessage(ApiModel):
    """One turn of the conversation."""

    REFUSED = {  # noqa: RUF012 (a constant table; pydantic wants ClassVar in the base only)
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "audio": (),
        "refusal": ("",),
        "annotations": ([],),
        "reasoning": ("",),
        "reasoning_content": ("",),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[str, Field(min_length=1, max_length=64), UNICODE] | None = Field(
        default=None, description="Passed to the chat template."
    )

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        content = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)
        message = {"role": self.role, "content": content}
        return message if self.name is None else {**message, "name": self.name}


class ChatCompletionRequest(SamplingFields):
    """Asks for the next message of a conversation."""

    IGNORED = (
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    )
    REFUSED = {  # noqa: RUF012
        "audio": (),
        "best_of": (1,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "reasoning_effort": (),
        "response_format": ({"type": "text"},),
        "store": (False,),
        "suffix": ("",),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": (),
        "web_search_options": (),
    }
    EXAMPLE = {  # noqa: RUF012
        "model": "smollm2-8x135m",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_completion_tokens": 32,
        "temperature": 0,
    }

    messages: Annotated[list[ChatMessage], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Older name of `max_completion_tokens`."
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Longest answer; the rest of the context if omitted."
    )
    logprobs: bool | None = Field(default=None, description="Report each token's log-probability.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description="Alternatives to report; needs `logprobs`."
    )

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("only allowed with logprobs: true", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequestError(
                f"{both[0]} contradicts max_completion_tokens {both[1]}; send one of them", param="max_tokens"
            )
        return self

    @property
    def answer_limit(self) -> int | None:
        """The longest answer asked for, by either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token; None if no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(BaseModel):
    """An alternative at a token's place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobEntry(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer or of a chunk of it."""

    content: list[TokenLogprobEntry]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """The answer in one piece."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageCounts


class ChatDelta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A chunk's share of one of the `n` answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None


class ChatCompletionChunk(BaseModel):
    """One event of a stream. `usage` is there only with `stream_options.include_usage`."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: UsageCounts | None = None
