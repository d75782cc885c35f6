"""`/v1/chat/completions`: what comes in and what goes out. Messages and tools are in `chat_messages`."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from localmoe.core.errors import InvalidRequestError
from localmoe.core.request import FinishReason
from localmoe.gateway.answering.conversation import Conversation
from localmoe.gateway.answering.structured import ResponseFormat, grammar_of
from localmoe.gateway.fields import MAX_TOKENS, MAX_TOP_LOGPROBS, SamplingFields, UsageCounts
from localmoe.gateway.json_fields import BOUNDED_TOGETHER, JsonObject
from localmoe.gateway.openai.chat_messages import (
    Messages,
    NamedToolChoice,
    ToolChoice,
    Tools,
    check_call_ids,
    check_tools,
    other_part,
)

MAX_DOCUMENTS = 256
_TEMPLATE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_TEMPLATE_NAMES_TAKEN = ("messages", "tools", "documents", "add_generation_prompt")


class ChatCompletionRequest(SamplingFields):
    """Asks for the next message of a conversation."""

    IGNORED = (
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    )
    REFUSED = {  # noqa: RUF012
        "audio": (),
        "best_of": (1,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "store": (False,),
        "suffix": ("",),
        "web_search_options": (),
    }
    EXAMPLE = {  # noqa: RUF012
        "model": "smollm2-8x135m",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "max_completion_tokens": 32,
        "temperature": 0,
    }

    messages: Messages
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
    tools: Tools | None = Field(default=None, description="Functions that the model may ask to be called.")
    tool_choice: ToolChoice | None = Field(
        default=None,
        description="`auto`: as the model likes; `none`: no tools; `required` or a tool's name: the answer is calls,"
        " with arguments that their schemas allow.",
    )
    parallel_tool_calls: bool | None = Field(default=None, description="Whether an answer may have several calls.")
    response_format: ResponseFormat | None = Field(default=None, description="What the answer's content must be.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="How much to think, for models whose template knows that."
    )
    chat_template_kwargs: JsonObject | None = Field(
        default=None, max_length=64, description="Further names for the chat template, such as `enable_thinking`."
    )
    documents: (
        Annotated[list[JsonObject], Field(max_length=MAX_DOCUMENTS, fail_fast=True), BOUNDED_TOGETHER] | None
    ) = Field(default=None, description="Texts to answer from, for models whose template knows documents.")

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

    @model_validator(mode="after")
    def _check_conversation(self) -> Self:
        check_call_ids(self.messages)
        check_tools(self.tools or [], self.tool_choice)
        for name in self.chat_template_kwargs or ():
            if name in _TEMPLATE_NAMES_TAKEN or not _TEMPLATE_NAME.fullmatch(name):
                raise InvalidRequestError(f"{name[:50]!r} is no name to give", param="chat_template_kwargs")
        return self

    def conversation(self) -> Conversation:
        """The request, as what all APIs' conversations become."""
        choice = self.tool_choice
        forced = choice.function.name if isinstance(choice, NamedToolChoice) else None
        return Conversation(
            messages=[message.plain() for message in self.messages],
            sampling=self,
            max_tokens=self.answer_limit,
            max_tokens_field="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens",
            num_logprobs=self.num_logprobs,
            tools=[tool.model_dump(exclude_none=True) for tool in self.tools or ()],
            tool_choice=choice if isinstance(choice, str) else "auto",
            forced_tool=forced,
            parallel_tool_calls=self.parallel_tool_calls is not False,
            response_grammar=grammar_of(self.response_format),
            effort=self.reasoning_effort,
            template_arguments=self.chat_template_kwargs or {},
            documents=self.documents or (),
            other_part=other_part(self.messages),
        )

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


class FunctionCall(BaseModel):
    """What is to be called."""

    name: str
    arguments: str
    """JSON, unless the answer broke off."""


class ToolCall(BaseModel):
    """A call that the client is asked to make."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    """Null where there are only tool calls."""
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


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


class FunctionCallDelta(BaseModel):
    """What a chunk adds to a call: its name at first, then its arguments piece by piece."""

    name: str | None = None
    arguments: str


class ToolCallChunk(BaseModel):
    """Of which call, and what."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCallDelta


class ChatDelta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallChunk] | None = None


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
