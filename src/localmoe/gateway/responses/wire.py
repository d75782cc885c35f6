"""What OpenAI's Responses API sends and keeps: responses, their items, and events of a stream.

msgspec structs, since they are encoded once per event and decoded from the store. Each has its `type` on the wire as
a tag.
"""

from typing import Annotated, Any, Literal

import msgspec

Score = Annotated[msgspec.Raw, msgspec.Meta(extra_json_schema={"type": "object"})]
"""A `TokenLogprobEntry`, which is encoded once: it is in four events of a stream, and kept."""
ItemStatus = Literal["in_progress", "completed", "incomplete"]
ResponseStatus = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    """Text of a message."""

    text: str
    annotations: list[Any] = []
    logprobs: list[Score] = []
    """Of its tokens, where they were asked for."""


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """Thoughts."""

    text: str


class OutputMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """A message of the assistant."""

    id: str
    status: ItemStatus
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought."""

    id: str
    status: ItemStatus
    summary: list[Any] = []
    """Always empty: thoughts are shown as they are."""
    content: list[ReasoningText]


class FunctionCallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A function that the client is to call."""

    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    """JSON."""


OutputItem = OutputMessage | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct, kw_only=True):
    """Part of `ResponseUsage`."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, kw_only=True):
    """Part of `ResponseUsage`."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Token counts."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(msgspec.Struct, kw_only=True):
    """Why a response is not complete."""

    reason: Literal["max_output_tokens"]


class ResponseObject(msgspec.Struct, kw_only=True):
    """A response: what was asked for, and what came of it."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Unix time in seconds, as is `completed_at`."""
    status: ResponseStatus
    completed_at: int | None = None
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: None = None


class _Event(msgspec.Struct, kw_only=True, tag_field="type"):
    sequence_number: int


class _OfResponse(_Event, kw_only=True):
    response: ResponseObject


class ResponseCreated(_OfResponse, kw_only=True, tag="response.created"):
    """The first event."""


class ResponseInProgress(_OfResponse, kw_only=True, tag="response.in_progress"):
    """An engine has begun."""


class ResponseCompleted(_OfResponse, kw_only=True, tag="response.completed"):
    """The last event."""


class ResponseIncomplete(_OfResponse, kw_only=True, tag="response.incomplete"):
    """The last event of one that reached `max_output_tokens`."""


class ResponseFailed(_OfResponse, kw_only=True, tag="response.failed"):
    """The last event of one that failed."""


class _OfItem(_Event, kw_only=True):
    output_index: int
    item: OutputItem


class OutputItemAdded(_OfItem, kw_only=True, tag="response.output_item.added"):
    """An item begins, as yet empty."""


class OutputItemDone(_OfItem, kw_only=True, tag="response.output_item.done"):
    """An item is complete."""


class _InItem(_Event, kw_only=True):
    item_id: str
    output_index: int


class _OfPart(_InItem, kw_only=True):
    content_index: int
    part: OutputText | ReasoningText


class ContentPartAdded(_OfPart, kw_only=True, tag="response.content_part.added"):
    """A part of an item begins, as yet empty."""


class ContentPartDone(_OfPart, kw_only=True, tag="response.content_part.done"):
    """A part of an item is complete."""


class _InPart(_InItem, kw_only=True):
    content_index: int


class OutputTextDelta(_InPart, kw_only=True, tag="response.output_text.delta"):
    """More of a text."""

    delta: str
    logprobs: list[Score]


class OutputTextDone(_InPart, kw_only=True, tag="response.output_text.done"):
    """The whole text."""

    text: str
    logprobs: list[Score]


class ReasoningTextDelta(_InPart, kw_only=True, tag="response.reasoning_text.delta"):
    """More of the thoughts."""

    delta: str


class ReasoningTextDone(_InPart, kw_only=True, tag="response.reasoning_text.done"):
    """The whole thoughts."""

    text: str


class FunctionCallArgumentsDelta(_InItem, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of the arguments."""

    delta: str


class FunctionCallArgumentsDone(_InItem, kw_only=True, tag="response.function_call_arguments.done"):
    """The whole arguments."""

    name: str
    arguments: str


ResponseStreamEvent = (
    ResponseCreated
    | ResponseInProgress
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
    | OutputItemAdded
    | OutputItemDone
    | ContentPartAdded
    | ContentPartDone
    | OutputTextDelta
    | OutputTextDone
    | ReasoningTextDelta
    | ReasoningTextDone
    | FunctionCallArgumentsDelta
    | FunctionCallArgumentsDone
)


class ItemList(msgspec.Struct, kw_only=True):
    """Items of a response's input."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseDeleted(msgspec.Struct, kw_only=True):
    """It is there no more."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class StoredResponse(msgspec.Struct, kw_only=True):
    """What is kept of a response."""

    response: ResponseObject
    input: list[dict[str, Any]]
    """Its own items, in the order in which they were sent; those before are the previous response's."""
