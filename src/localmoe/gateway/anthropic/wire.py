"""What Anthropic's Messages API sends: messages, events of a stream and errors.

msgspec structs, since they are encoded once per event. Each has its `type` on the wire as a tag.
"""

from typing import Any

import msgspec


class TextBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="text"):
    """Content of the answer."""

    text: str
    citations: None = None


class ThinkingBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking"):
    """What the model thought before it answered."""

    thinking: str
    signature: str
    """A digest of the whole text. Clients send it back with the block; nothing depends on it."""


class ToolUseBlock(msgspec.Struct, kw_only=True, tag_field="type", tag="tool_use"):
    """A tool that the client is to call."""

    id: str
    name: str
    input: dict[str, Any]


ContentBlock = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, kw_only=True):
    """Token counts; the prompt's tokens are the sum of the first three."""

    input_tokens: int
    """Of the prompt, those that were computed."""
    cache_creation_input_tokens: int
    """Always 0: what is computed is kept without being asked to, and counts as `input_tokens`."""
    cache_read_input_tokens: int
    """Of the prompt, those found in the prefix cache."""
    output_tokens: int


class Message(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """The answer."""

    id: str
    role: str
    model: str
    content: list[ContentBlock]
    stop_reason: str | None
    """`end_turn`, `max_tokens`, `stop_sequence` or `tool_use`; null in a stream's first event."""
    stop_sequence: str | None
    """The one that ended the answer."""
    usage: MessageUsage


class MessageStart(msgspec.Struct, kw_only=True, tag_field="type", tag="message_start"):
    """Begins a stream, with a message that has no content yet."""

    message: Message


class ContentBlockStart(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_start"):
    """Begins a block, as yet empty."""

    index: int
    content_block: ContentBlock


class TextDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="text_delta"):
    """More of a text block."""

    text: str


class ThinkingDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="thinking_delta"):
    """More of a thinking block."""

    thinking: str


class SignatureDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="signature_delta"):
    """The signature, when a thinking block is complete."""

    signature: str


class InputJsonDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="input_json_delta"):
    """More of the JSON text of a tool's input."""

    partial_json: str


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputJsonDelta


class ContentBlockDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: BlockDelta


class ContentBlockStop(msgspec.Struct, kw_only=True, tag_field="type", tag="content_block_stop"):
    """Ends a block."""

    index: int


class StopDelta(msgspec.Struct, kw_only=True):
    """How the message ended."""

    stop_reason: str
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, kw_only=True, tag_field="type", tag="message_delta"):
    """How the message ended, and its token counts."""

    delta: StopDelta
    usage: MessageUsage


class MessageStop(msgspec.Struct, kw_only=True, tag_field="type", tag="message_stop"):
    """Ends a stream."""


class Ping(msgspec.Struct, kw_only=True, tag_field="type", tag="ping"):
    """Sent where there is silence."""


class MessageErrorDetail(msgspec.Struct, kw_only=True):
    """What was wrong: `type` for programs, `message` for people."""

    type: str
    message: str


class ErrorMessage(msgspec.Struct, kw_only=True, tag_field="type", tag="error"):
    """The body of every answer that is not a success, and the event that a stream breaks off with."""

    error: MessageErrorDetail
    request_id: str | None = None


MessageStreamEvent = (
    MessageStart
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
    | Ping
    | ErrorMessage
)


class TokenCount(msgspec.Struct, kw_only=True):
    """How many tokens the prompt of a message would have."""

    input_tokens: int
