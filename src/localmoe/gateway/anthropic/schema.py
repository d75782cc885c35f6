"""What comes in at Anthropic's `/v1/messages` and `/v1/messages/count_tokens`."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag, model_validator, with_config
from typing_extensions import TypedDict

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError
from localmoe.gateway.answering.conversation import check_tool_names
from localmoe.gateway.fields import (
    BOUNDED,
    MAX_STOPS,
    MAX_TOKENS,
    UNICODE,
    ApiModel,
    ModelId,
    StopString,
    Text,
    is_list,
)
from localmoe.gateway.json_fields import BOUNDED_TOGETHER, JsonObject, ObjectSchema
from localmoe.gateway.kinds import kind_of, refuse_other_kinds
from localmoe.gateway.openai.chat_messages import MAX_MESSAGES, MAX_PARTS, CalledName, CallId


class TextInput(ApiModel):
    """A text; those of one message are joined by newlines."""

    IGNORED = ("cache_control", "citations")

    type: Literal["text"]
    text: Text


class Base64Source(ApiModel):
    """An image within the request."""

    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9+/=\s]+$")]


class UrlSource(ApiModel):
    """An image elsewhere, which the engine fetches if it does."""

    type: Literal["url"]
    url: Annotated[str, Field(min_length=1, max_length=8192), UNICODE]


class ImageInput(ApiModel):
    """An image, for engines that take them."""

    IGNORED = ("cache_control",)
    REFUSED = {"transformations": ()}  # noqa: RUF012

    type: Literal["image"]
    source: Annotated[
        Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")],
        Discriminator(kind_of),
        refuse_other_kinds("image sources", "base64", "url"),
    ]


class ThinkingInput(ApiModel):
    """What the assistant thought, as an earlier answer said it."""

    IGNORED = ("signature",)

    type: Literal["thinking"]
    thinking: Text


class RedactedThinkingInput(ApiModel):
    """Thoughts that only the server that encrypted them can read; they are left out."""

    IGNORED = ("data",)

    type: Literal["redacted_thinking"]


def _check_input(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError) as error:  # a lone surrogate is a ValueError, too
        raise InvalidRequestError(f"it is no JSON that could be written again: {error}") from error
    return value


class ToolUseInput(ApiModel):
    """A tool that the assistant called."""

    IGNORED = ("cache_control", "caller")
    REFUSED = {"toolset_name": ()}  # noqa: RUF012

    type: Literal["tool_use"]
    id: CallId
    name: CalledName
    input: Annotated[dict[str, Any], AfterValidator(_check_input)]


ResultBlock = Annotated[
    Annotated[TextInput, Tag("<text>")] | Annotated[ImageInput, Tag("<image>")],
    Discriminator(kind_of),
    refuse_other_kinds("content blocks", "text", "image"),
]
ResultContent = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[ResultBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]


class ToolResultInput(ApiModel):
    """What a tool gave back."""

    IGNORED = ("cache_control",)
    REFUSED = {"toolset_name": ()}  # noqa: RUF012

    type: Literal["tool_result"]
    tool_use_id: CallId
    content: ResultContent = ""
    is_error: bool | None = None


InputBlock = Annotated[
    Annotated[TextInput, Tag("<text>")]
    | Annotated[ImageInput, Tag("<image>")]
    | Annotated[ThinkingInput, Tag("<thinking>")]
    | Annotated[RedactedThinkingInput, Tag("<redacted_thinking>")]
    | Annotated[ToolUseInput, Tag("<tool_use>")]
    | Annotated[ToolResultInput, Tag("<tool_result>")],
    Discriminator(kind_of),
    refuse_other_kinds(
        "content blocks", "text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result"
    ),
]
InputContent = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[InputBlock], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")]
_MAX_TOOLS = 1024
"""Agents name those of all their servers."""
_ROLES = {
    "user": ("text", "image", "tool_result"),
    "assistant": ("text", "thinking", "redacted_thinking", "tool_use"),
    "system": ("text",),
}


class InputMessage(ApiModel):
    """One turn of the conversation; turns of one role that follow each other are one."""

    role: Literal["user", "assistant", "system"]
    content: InputContent

    @property
    def blocks(self) -> list[InputBlock]:
        """The content, whichever way it was written."""
        content = self.content
        return content if isinstance(content, list) else [TextInput(type="text", text=content)]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        for index, block in enumerate(self.content if isinstance(self.content, list) else ()):
            if block.type not in _ROLES[self.role]:
                raise InvalidRequestError(
                    f"blocks of type {block.type!r} are not allowed in a message of the {self.role}",
                    param=f"content[{index}].type",
                )
        return self


class Tool(ApiModel):
    """A function that the model may ask to be called."""

    IGNORED = ("cache_control", "eager_input_streaming")
    REFUSED = {  # noqa: RUF012
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }

    type: Literal["custom"] | None = None
    name: ToolName
    description: Text | None = None
    input_schema: ObjectSchema = Field(description="JSON Schema of an object.")
    strict: bool | None = Field(default=None, description="Calls follow the schema, whatever the model would say.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_server_tools(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(kind := data.get("type"), str) and kind != "custom":
            raise UnsupportedFieldError(
                f"tools of type {kind[:50]!r} are not supported by this server; describe it with an input_schema",
                param="type",
            )
        return data


class ToolChoice(ApiModel):
    """Whether tools are to be called: as the model likes, some tool, this tool, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = Field(default=None, description="With type `tool`.")
    disable_parallel_tool_use: bool | None = Field(default=None, description="At most one call.")

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if self.type == "tool" and self.name is None:
            raise InvalidRequestError("required with type 'tool'", param="name")
        if self.type != "tool" and self.name is not None:
            raise InvalidRequestError(f"not allowed with type {self.type!r}", param="name")
        return self


class Thinking(ApiModel):
    """Whether the model is to think before it answers. Its thoughts are shown where it does."""

    IGNORED = ("budget_tokens",)

    type: Literal["enabled", "disabled", "adaptive"]
    display: Literal["summarized", "omitted"] | None = Field(
        default=None,
        description="`omitted` sends thinking blocks without their text; otherwise all of it is sent.",
    )


@with_config(ConfigDict(strict=True, extra="forbid"))
class JsonFormat(TypedDict):
    """The answer is JSON that follows the schema. (Not a model: those have a method named `schema`.)"""

    type: Literal["json_schema"]
    schema: JsonObject


class OutputConfig(ApiModel):
    """What the answer is to be like."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="How much to think, for models whose template knows that."
    )
    format: JsonFormat | None = None


FIELD_NAMES = {"reasoning_effort": "output_config.effort", "tools.function.strict": "tools.strict"}
"""What fields of OpenAI's chat API are called here, of those that a model may make no use of."""


class PromptFields(ApiModel):
    """What makes a prompt."""

    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control", "context_management", "speed")

    model: ModelId = Field(description="A name from `/v1/models`.")
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BOUNDED]
    system: (
        Annotated[
            Annotated[Text, Tag("<text>")]
            | Annotated[list[TextInput], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
            Discriminator(is_list),
        ]
        | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=_MAX_TOOLS, fail_fast=True), BOUNDED_TOGETHER] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        choice = self.tool_choice
        forced = None if choice is None else choice.name
        named = [{"function": {"name": tool.name}} for tool in self.tools or ()]
        check_tool_names(named, forced, choice_field="tool_choice.name")
        if choice is not None and choice.type == "any" and not named:
            raise InvalidRequestError("type 'any' needs tools to choose from", param="tool_choice.type")
        return self

    @model_validator(mode="after")
    def _check_last(self) -> Self:
        if self.messages[-1].role == "assistant":
            raise UnsupportedFieldError(
                "the conversation must end with a message of the user: beginnings of an answer are not taken up",
                param="messages",
            )
        return self

    @property
    def thinks(self) -> bool:
        """Whether the model is to think first, which is then shown."""
        return self.thinking is not None and self.thinking.type != "disabled"

    @property
    def forbids_thinking(self) -> bool:
        """Whether it says that the model is not to."""
        return self.thinking is not None and self.thinking.type == "disabled"

    @property
    def shows_thoughts(self) -> bool:
        """Whether thinking blocks have their text."""
        return self.thinking is None or self.thinking.display != "omitted"


class MessageRequest(PromptFields):
    """Asks for the next message of a conversation."""

    IGNORED = (*PromptFields.IGNORED, "diagnostics", "metadata", "service_tier")
    REFUSED = {"container": (), "inference_geo": (), "mcp_servers": ([],)}  # noqa: RUF012
    EXAMPLE = {  # noqa: RUF012
        "model": "smollm2-8x135m",
        "max_tokens": 32,
        "messages": [{"role": "user", "content": "Name three colours."}],
    }

    max_tokens: int = Field(ge=0, le=MAX_TOKENS, description="Longest answer; 0 only computes the prompt.")
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_STOPS, description="The answer ends before any of these."
    )
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events.")
    temperature: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="Keep the k likeliest tokens.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")


class CountTokensRequest(PromptFields):
    """Asks how long a prompt would be."""

    EXAMPLE = {  # noqa: RUF012
        "model": "smollm2-8x135m",
        "messages": [{"role": "user", "content": "Name three colours."}],
    }
