"""What comes in at OpenAI's `/v1/responses`."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Required, Self

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator, with_config

from localmoe.core.errors import InvalidRequestError, UnsupportedFieldError
from localmoe.gateway.answering.conversation import MAX_TOOLS, check_tool_names
from localmoe.gateway.answering.structured import JsonObjectFormat, JsonSchemaSpec, TextFormat
from localmoe.gateway.fields import (
    BOUNDED,
    MAX_TOKENS,
    MAX_TOP_LOGPROBS,
    UNICODE,
    ApiModel,
    Metadata,
    ModelId,
    Text,
    is_list,
)
from localmoe.gateway.json_fields import BOUNDED_TOGETHER, ObjectSchema
from localmoe.gateway.kinds import check_kind, kind_of, refuse_other_kinds
from localmoe.gateway.openai.chat_messages import MAX_MESSAGES, MAX_PARTS, CalledName, CallId, FunctionName

LOGPROBS = "message.output_text.logprobs"
ResponseId = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^resp_[a-zA-Z0-9_-]+$")]


class InputText(ApiModel):
    """Text of a message, or of what a function gave back."""

    IGNORED = ("prompt_cache_breakpoint",)

    type: Literal["input_text"]
    text: Text


class OutputTextInput(ApiModel):
    """Text of an earlier answer."""

    IGNORED = ("annotations", "logprobs")

    type: Literal["output_text"]
    text: Text


class InputImage(ApiModel):
    """An image, for engines that take them."""

    IGNORED = ("prompt_cache_breakpoint",)
    REFUSED = {"file_id": ()}  # noqa: RUF012

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1), UNICODE]
    detail: Literal["auto", "low", "high", "original"] | None = None


InputPart = Annotated[
    Annotated[InputText, Tag("<input_text>")]
    | Annotated[OutputTextInput, Tag("<output_text>")]
    | Annotated[InputImage, Tag("<input_image>")],
    Discriminator(kind_of),
    refuse_other_kinds("content parts", "input_text", "output_text", "input_image"),
]
InputContent = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[InputPart], Field(max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    Discriminator(is_list),
]


class MessageItem(ApiModel):
    """A message of anybody; an answer's own comes back so."""

    IGNORED = ("id", "phase", "status")

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: InputContent


class FunctionCallInput(ApiModel):
    """A function that the assistant called."""

    IGNORED = ("caller", "id", "status")
    REFUSED = {"async": (False,), "namespace": ()}  # noqa: RUF012

    type: Literal["function_call"]
    call_id: CallId
    name: CalledName
    arguments: Text


class FunctionOutput(ApiModel):
    """What a function gave back."""

    IGNORED = ("caller", "id", "name", "status")
    REFUSED = {"namespace": ()}  # noqa: RUF012

    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent


class ReasoningPart(ApiModel):
    """A text of the assistant's thoughts."""

    type: Literal["reasoning_text"]
    text: Text


class ReasoningInput(ApiModel):
    """What the assistant thought, as an earlier answer said it."""

    IGNORED = ("encrypted_content", "id", "status", "summary")

    type: Literal["reasoning"]
    content: Annotated[list[ReasoningPart], Field(fail_fast=True)] | None = Field(
        default=None, max_length=MAX_PARTS
    )


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[FunctionCallInput, Tag("<function_call>")]
    | Annotated[FunctionOutput, Tag("<function_call_output>")]
    | Annotated[ReasoningInput, Tag("<reasoning>")],
    Discriminator(kind_of),
    refuse_other_kinds("input items", "message", "function_call", "function_call_output", "reasoning"),
]


class ResponseTool(ApiModel):
    """A function that the model may ask to be called."""

    REFUSED = {  # noqa: RUF012
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: ObjectSchema | None = Field(default=None, description="JSON Schema of an object.")
    strict: bool | None = Field(default=None, description="Calls follow the schema, whatever the model would say.")


Tool = Annotated[ResponseTool, refuse_other_kinds("tools", "function")]


class NamedFunction(ApiModel):
    """One function, by its name."""

    type: Literal["function"]
    name: FunctionName


class AllowedTools(ApiModel):
    """Some of the functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[
        list[Annotated[NamedFunction, refuse_other_kinds("tools", "function")]],
        Field(min_length=1, max_length=MAX_TOOLS, fail_fast=True),
    ]


def _check_choice(value: Any) -> Any:
    return value if isinstance(value, str) else check_kind(value, "tool choices", "function", "allowed_tools")


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")]
    | Annotated[NamedFunction, Tag("<function>")]
    | Annotated[AllowedTools, Tag("<allowed_tools>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else kind_of(value)),
    BeforeValidator(_check_choice),
]


class Reasoning(ApiModel):
    """How the model is to think."""

    IGNORED = ("context", "generate_summary", "summary")
    REFUSED = {"mode": ("standard",)}  # noqa: RUF012

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="How much to think, for models whose template knows that."
    )


@with_config(ConfigDict(strict=True, extra="forbid"))
class JsonSchemaText(JsonSchemaSpec, total=False):
    """JSON that is valid by a schema, `strict` or not."""

    type: Required[Literal["json_schema"]]


class TextConfig(ApiModel):
    """What the answer's text is to be like."""

    IGNORED = ("verbosity",)

    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaText, Tag("<json_schema>")],
            Discriminator(kind_of),
            refuse_other_kinds("formats", "text", "json_object", "json_schema"),
        ]
        | None
    ) = None


class ResponseStreamOptions(ApiModel):
    """Only with `stream: true`."""

    IGNORED = ("include_obfuscation",)


Includable = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]

FIELD_NAMES = {"reasoning_effort": "reasoning.effort", "tools.function.strict": "tools.strict"}
"""What fields of OpenAI's chat API are called here, of those that a model may make no use of."""


class ResponseRequest(ApiModel):
    """Asks for the next items of a conversation."""

    IGNORED = (
        "context_management",
        "max_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    )
    REFUSED = {  # noqa: RUF012
        "access_programs": (),
        "conversation": (),
        "image": (),
        "moderation": (),
        "prompt": (),
    }
    EXAMPLE = {  # noqa: RUF012
        "model": "smollm2-8x135m",
        "input": "Name three colours.",
        "max_output_tokens": 32,
        "temperature": 0,
    }

    model: ModelId = Field(description="A name from `/v1/models`.")
    input: Annotated[
        Annotated[Text, Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True), Tag("<list>")],
        Discriminator(is_list),
        BOUNDED,
    ]
    instructions: Text | None = Field(default=None, description="A system message before all others, this time.")
    previous_response_id: ResponseId | None = Field(default=None, description="The conversation to go on with.")
    store: bool | None = Field(default=None, description="Keep the response; true if omitted.")
    background: bool | None = Field(default=None, description="Answer at once, and generate meanwhile.")
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events.")
    stream_options: ResponseStreamOptions | None = None
    include: Annotated[list[Includable], Field(max_length=16, fail_fast=True)] | None = None
    max_output_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Longest answer; the rest of the context if omitted."
    )
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1, description="Nucleus sampling.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_TOP_LOGPROBS, description=f"Alternatives to report; needs `{LOGPROBS}`."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), BOUNDED_TOGETHER] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(default=None, description="Whether calls may be several.")
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = Field(default=None, description="Prompts are never cut.")
    metadata: Metadata | None = Field(default=None, description="Kept with the response.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_truncation(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("truncation") == "auto":
            raise UnsupportedFieldError(
                "'auto' is not supported by this server: prompts are never cut", param="truncation"
            )
        return data

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("only allowed with stream: true", param="stream_options")
        if self.background and self.stream:
            raise UnsupportedFieldError("not supported together with stream: ask for it later", param="background")
        if self.background and self.store is False:
            raise InvalidRequestError(
                "not allowed with store: false, as nobody could ask for it", param="background"
            )
        if self.top_logprobs is not None and not self.wants_logprobs:
            raise InvalidRequestError(f"only allowed with {LOGPROBS!r} in include", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        choice = self.tool_choice
        forced = choice.name if isinstance(choice, NamedFunction) else None
        named = [{"function": {"name": tool.name}} for tool in self.tools or ()]
        check_tool_names(named, forced, choice_field="tool_choice.name")
        if choice == "required" and not named:
            raise InvalidRequestError("'required' needs tools to choose from", param="tool_choice")
        for index, tool in enumerate(choice.tools if isinstance(choice, AllowedTools) else ()):
            check_tool_names(named, tool.name, choice_field=f"tool_choice.tools[{index}].name")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log-probability is to be reported."""
        return LOGPROBS in (self.include or ())

    @property
    def format(self) -> TextFormat | JsonObjectFormat | JsonSchemaText:
        """What content must be."""
        return (self.text and self.text.format) or TextFormat(type="text")

    @property
    def items(self) -> list[InputItem]:
        """The input, whichever way it was written."""
        return self.input if isinstance(self.input, list) else [MessageItem(role="user", content=self.input)]

    def ignored_fields(self) -> Iterator[str]:
        """See `ApiModel.ignored_fields`. That what was an answer has an id and a status is no news."""
        yield from (name for name in super().ignored_fields() if name not in ("input.id", "input.status"))
        yield from (f"include[{name}]" for name in self.include or () if name != LOGPROBS)
