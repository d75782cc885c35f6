"""An answer as Anthropic's Messages API sends it: content blocks, in one piece or as a stream of named events."""

import hashlib
import uuid
from typing import Any

import msgspec
from pydantic_core import from_json

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import FinishReason
from localmoe.gateway.answering.generation import ChoiceDelta
from localmoe.gateway.answering.segments import Begin, End, Grow, Segmenter, SegmentKind, Step
from localmoe.gateway.answering.streaming import encode_tagged
from localmoe.gateway.anthropic.wire import (
    BlockDelta,
    ContentBlock,
    ContentBlockDelta,
    ContentBlockStart,
    ContentBlockStop,
    InputJsonDelta,
    Message,
    MessageDelta,
    MessageStart,
    MessageStop,
    MessageStreamEvent,
    MessageUsage,
    SignatureDelta,
    StopDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)


class MessageAnswer:
    """One request's answer, in the making.

    Args:
        model_id: the model that answers.
        shows_thinking: whether thoughts are blocks of the answer; else they are left out.
        shows_thoughts: whether those blocks have their text.
    """

    def __init__(self, model_id: str, *, shows_thinking: bool, shows_thoughts: bool) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._model_id = model_id
        self._blocks = _Blocks(shows_thinking=shows_thinking, shows_thoughts=shows_thoughts)
        self._has_begun = False
        self._last: ChoiceDelta | None = None

    def events(self, delta: ChoiceDelta) -> bytes:
        """See `Answer.events`: the message's beginning at first, then those of blocks."""
        events: list[MessageStreamEvent] = []
        if not self._has_begun:
            self._has_begun = True
            usage = msgspec.structs.replace(_usage(delta), output_tokens=0)
            events.append(MessageStart(message=self._message([], usage)))
        events += self._blocks.push(delta)
        self._last = delta
        return b"".join(map(encode_tagged, events))

    def end(self) -> bytes:
        """See `Answer.end`. Raises as `whole`."""
        assert self._last is not None
        self._check_calls(self._last)
        stop = StopDelta(stop_reason=self._stop_reason(self._last), stop_sequence=self._last.stop_string)
        return encode_tagged(MessageDelta(delta=stop, usage=_usage(self._last))) + encode_tagged(MessageStop())

    def add(self, delta: ChoiceDelta) -> None:
        """See `Answer.add`."""
        self._blocks.push(delta)
        self._last = delta

    def whole(self) -> bytes:
        """See `Answer.whole`.

        Raises:
            EngineFaultError: the model called a tool with what cannot be shown, and to call it with less would be to
                say something else.
        """
        assert self._last is not None
        self._check_calls(self._last)
        message = self._message(self._blocks.whole, _usage(self._last))
        message.stop_reason, message.stop_sequence = self._stop_reason(self._last), self._last.stop_string
        return msgspec.json.encode(message)

    def _check_calls(self, last: ChoiceDelta) -> None:
        unreadable = self._blocks.unreadable
        if last.finish_reason == FinishReason.LENGTH:
            unreadable = [index for index in unreadable if index < len(self._blocks.whole) - 1]
        if unreadable:
            block = self._blocks.whole[unreadable[0]]
            assert isinstance(block, ToolUseBlock)
            raise EngineFaultError(f"the model called {block.name!r} with arguments that are no JSON object")

    def _message(self, content: list[ContentBlock], usage: MessageUsage) -> Message:
        return Message(
            id=self.id,
            role="assistant",
            model=self._model_id,
            content=content,
            stop_reason=None,
            stop_sequence=None,
            usage=usage,
        )

    def _stop_reason(self, last: ChoiceDelta) -> str:
        if last.finish_reason == FinishReason.LENGTH:
            return "max_tokens"
        if last.stop_string is not None:
            return "stop_sequence"
        return "tool_use" if self._blocks.has_tool_use else "end_turn"


class _Blocks:
    """Content blocks, one after the other, and the events that tell of them."""

    def __init__(self, *, shows_thinking: bool, shows_thoughts: bool) -> None:
        self._segmenter = Segmenter(shows_reasoning=shows_thinking)
        self._shows_thoughts = shows_thoughts
        self._call = Begin(kind=SegmentKind.TOOL_CALL)
        self.whole: list[ContentBlock] = []
        """Those that are complete."""
        self.has_tool_use = False
        self.unreadable: list[int] = []
        """Places of calls whose arguments are no JSON object, or not all of one."""

    def push(self, delta: ChoiceDelta) -> list[MessageStreamEvent]:
        """Take in a delta."""
        return [event for step in self._segmenter.push(delta) for event in self._events(step)]

    def _events(self, step: Step) -> list[MessageStreamEvent]:
        index = len(self.whole)
        match step:
            case Begin():
                return [ContentBlockStart(index=index, content_block=self._begin(step))]
            case Grow():
                more = self._more(step)
                return [] if more is None else [ContentBlockDelta(index=index, delta=more)]
            case End():
                block = self._end(step)
                self.whole.append(block)
                stop = ContentBlockStop(index=index)
                if not isinstance(block, ThinkingBlock):
                    return [stop]
                return [ContentBlockDelta(index=index, delta=SignatureDelta(signature=block.signature)), stop]

    def _begin(self, step: Begin) -> ContentBlock:
        match step.kind:
            case SegmentKind.CONTENT:
                return TextBlock(text="")
            case SegmentKind.REASONING:
                return ThinkingBlock(thinking="", signature="")
            case SegmentKind.TOOL_CALL:
                self._call, self.has_tool_use = step, True
                return ToolUseBlock(id=step.call_id, name=step.name, input={})

    def _more(self, step: Grow) -> BlockDelta | None:
        match step.kind:
            case SegmentKind.CONTENT:
                return TextDelta(text=step.text)
            case SegmentKind.REASONING:
                return ThinkingDelta(thinking=step.text) if self._shows_thoughts else None
            case SegmentKind.TOOL_CALL:
                return InputJsonDelta(partial_json=step.text)

    def _end(self, step: End) -> ContentBlock:
        match step.kind:
            case SegmentKind.CONTENT:
                return TextBlock(text=step.text)
            case SegmentKind.REASONING:
                signature = hashlib.sha256(step.text.encode()).hexdigest()
                return ThinkingBlock(thinking=step.text if self._shows_thoughts else "", signature=signature)
            case SegmentKind.TOOL_CALL:
                tool_input = _object(step.text, is_cut=False)
                if tool_input is None:
                    self.unreadable.append(len(self.whole))
                    # Of what was cut off by `max_tokens`, as much as there is: that is what clients make of a stream.
                    tool_input = _object(step.text, is_cut=True) or {}
                return ToolUseBlock(id=self._call.call_id, name=self._call.name, input=tool_input)


def _object(arguments: str, *, is_cut: bool) -> dict[str, Any] | None:
    """Of this JSON text; None where it is of no object. Some engines elsewhere write an empty one as nothing."""
    try:
        value = from_json(arguments or "{}", allow_inf_nan=False, allow_partial=is_cut)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _usage(delta: ChoiceDelta) -> MessageUsage:
    return MessageUsage(
        input_tokens=delta.prompt_tokens - delta.cached_tokens,
        cache_creation_input_tokens=0,
        cache_read_input_tokens=delta.cached_tokens,
        output_tokens=delta.completion_tokens,
    )
