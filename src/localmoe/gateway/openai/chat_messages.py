"""A conversation as it comes in at OpenAI's chat API: messages, their parts, and tools."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from localmoe.core.errors import InvalidRequestError
from localmoe.gateway.answering.conversation import MAX_TOOLS, check_tool_names
from localmoe.gateway.fields import BOUNDED, UNICODE, ApiModel, Text, is_list
from localmoe.gateway.json_fields import BOUNDED_TOGETHER, ObjectSchema
from localmoe.gateway.kinds import kind_of, refuse_other_kinds

MAX_MESSAGES = 4096
MAX_PARTS = 1024
_TEXT_KINDS = ("text", "refusal")
_PART_KINDS = (*_TEXT_KINDS, "image_url", "input_audio", "file")

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
CalledName = Annotated[str, Field(min_length=1, max_length=128), UNICODE]
"""As a model wrote it, which may be the name of no tool."""
CallId = Annotated[str, Field(min_length=1, max_length=256), UNICODE]


class TextPart(ApiModel):
    """One text of a message; the texts of a message are joined by newlines."""

    IGNORED = ("prompt_cache_breakpoint",)

    type: Literal["text"]
    text: Text


class RefusalPart(ApiModel):
    """A text with which the assistant declined."""

    type: Literal["refusal"]
    refusal: Text


class ImageUrl(ApiModel):
    """Where an image is, or the image itself as a `data:` URL."""

    url: Annotated[str, Field(min_length=1), UNICODE]
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(ApiModel):
    """An image, for models whose engine takes them."""

    IGNORED = ("prompt_cache_breakpoint",)

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(ApiModel):
    """Sound, in base 64."""

    data: Annotated[str, Field(min_length=1), UNICODE]
    format: Literal["wav", "mp3"]


class AudioPart(ApiModel):
    """Sound, for models whose engine takes it."""

    IGNORED = ("prompt_cache_breakpoint",)

    type: Literal["input_audio"]
    input_audio: InputAudio


class InputFile(ApiModel):
    """A file's contents in base 64, or its id at the engine."""

    file_data: Annotated[str, Field(min_length=1), UNICODE] | None = None
    file_id: Annotated[str, Field(min_length=1, max_length=256), UNICODE] | None = None
    filename: Annotated[str, Field(max_length=256), UNICODE] | None = None


class FilePart(ApiModel):
    """A file, for models whose engine takes them."""

    IGNORED = ("prompt_cache_breakpoint",)

    type: Literal["file"]
    file: InputFile


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[AudioPart, Tag("<input_audio>")]
    | Annotated[FilePart, Tag("<file>")],
    Discriminator(kind_of),
    refuse_other_kinds("content parts", *_PART_KINDS),
]
Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]


class CalledFunction(ApiModel):
    """What was called, as the model wrote it."""

    name: CalledName
    arguments: Text


class ToolCallInput(ApiModel):
    """A call that the assistant made."""

    IGNORED = ("index",)

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(ApiModel):
    """One turn of the conversation."""

    REFUSED = {  # noqa: RUF012 (a constant table; pydantic wants ClassVar in the base only)
        "function_call": (),
        "audio": (),
        "refusal": ("",),
        "annotations": ([],),
        "reasoning": ("",),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(default=None, description="May be left out beside `tool_calls`.")
    name: Annotated[str, Field(min_length=1, max_length=64), UNICODE] | None = Field(
        default=None, description="Passed to the chat template."
    )
    tool_calls: (
        Annotated[
            list[Annotated[ToolCallInput, refuse_other_kinds("tool calls", "function")]], Field(fail_fast=True)
        ]
        | None
    ) = Field(default=None, max_length=MAX_TOOLS, description="Of an assistant.")
    tool_call_id: CallId | None = Field(default=None, description="Of a tool: which call this answers.")
    reasoning_content: Text | None = Field(
        default=None, description="Of an assistant: what it thought, for templates that have a place for it."
    )

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        for name, role in (
            ("tool_calls", "assistant"),
            ("reasoning_content", "assistant"),
            ("tool_call_id", "tool"),
        ):
            if getattr(self, name) and self.role != role:
                raise InvalidRequestError(f"only a message of role {role!r} has it", param=name)
        if self.role == "tool" and self.tool_call_id is None:
            raise InvalidRequestError(
                "required with role 'tool'", param="tool_call_id", code="missing_required_parameter"
            )
        if self.content is None and not self.tool_calls:
            raise InvalidRequestError(
                "required; only an assistant's message with tool_calls can do without",
                param="content",
                code="missing_required_parameter",
            )
        return self

    def plain(self) -> dict[str, Any]:
        """The message in the API's own words, without what says nothing."""
        fields = self.model_dump(exclude_none=True)
        return {name: value for name, value in fields.items() if value != []} | {"content": fields.get("content")}


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), BOUNDED]


class FunctionDefinition(ApiModel):
    """A function that the model may ask to be called."""

    name: FunctionName
    description: Text | None = None
    parameters: ObjectSchema | None = Field(default=None, description="JSON Schema of an object.")
    strict: bool | None = Field(
        default=None,
        description="Arguments follow the schema, whatever the model would say; here they do whenever a tool must be"
        " called, and then always.",
    )


class FunctionTool(ApiModel):
    """A tool."""

    type: Literal["function"]
    function: FunctionDefinition


Tool = Annotated[FunctionTool, refuse_other_kinds("tools", "function")]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), BOUNDED_TOGETHER]


class ChosenFunction(ApiModel):
    """One of the tools, by its name."""

    name: FunctionName


class NamedToolChoice(ApiModel):
    """The tool that is to be called."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[NamedToolChoice, refuse_other_kinds("tool choices", "function"), Tag("<list>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<list>"),
]


def other_part(messages: list[ChatMessage]) -> tuple[str, str] | None:
    """See `Conversation.other_part`."""
    found = (
        (f"messages[{index}].content[{place}].type", part.type)
        for index, message in enumerate(messages)
        for place, part in enumerate(message.content if isinstance(message.content, list) else ())
        if part.type not in _TEXT_KINDS
    )
    return next(found, None)


def check_call_ids(messages: list[ChatMessage]) -> None:
    """Raise InvalidRequestError for a tool's message that answers no call before it."""
    known: set[str] = set()
    for index, message in enumerate(messages):
        known.update(call.id for call in message.tool_calls or ())
        if message.tool_call_id is not None and message.tool_call_id not in known:
            raise InvalidRequestError(
                f"no earlier message has a tool call of the id {message.tool_call_id!r}",
                param=f"messages[{index}].tool_call_id",
            )


def check_tools(tools: list[FunctionTool], choice: Any) -> None:
    """Raise InvalidRequestError for two tools of one name, and for a choice that none of them answers."""
    if choice == "required" and not tools:
        raise InvalidRequestError("'required' needs tools to choose from", param="tool_choice")
    forced = choice.function.name if isinstance(choice, NamedToolChoice) else None
    check_tool_names([tool.model_dump() for tool in tools], forced, choice_field="tool_choice.function.name")
