"""An answer as a sequence of segments: thoughts, content and tool calls, one after the other.

OpenAI's chat API sends them side by side in one message. Others number them, and say where each begins and ends.
"""

from enum import Enum, auto

import msgspec

from localmoe.core.errors import EngineFaultError
from localmoe.core.request import ToolCallDelta
from localmoe.gateway.answering.generation import ChoiceDelta, ScoredToken


class SegmentKind(Enum):
    """What a segment is."""

    REASONING = auto()
    CONTENT = auto()
    TOOL_CALL = auto()


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """A segment begins."""

    kind: SegmentKind
    call_id: str = ""
    """Of a tool call, as is its name."""
    name: str = ""


class Grow(msgspec.Struct, frozen=True, kw_only=True):
    """It goes on."""

    kind: SegmentKind
    text: str
    """Of a tool call, the next characters of its arguments."""
    scored: list[ScoredToken]
    """Tokens of content, where log-probabilities were asked for."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """It is complete."""

    kind: SegmentKind
    text: str
    """All of it."""


Step = Begin | Grow | End


class Segmenter:
    """Cuts one answer into segments.

    White space at a content's beginning waits for more. So what models write between thoughts and tool calls is no
    segment of its own, which clients would send back, and not all servers accept.

    Args:
        shows_reasoning: otherwise thoughts are left out.
    """

    def __init__(self, *, shows_reasoning: bool) -> None:
        self._shows_reasoning = shows_reasoning
        self._kind: SegmentKind | None = None
        self._call: int | None = None
        self._texts: list[str] = []
        self._space = ""
        self._scored: list[ScoredToken] = []
        self._is_empty = True

    def push(self, delta: ChoiceDelta) -> list[Step]:
        """What the delta adds. It ends the last segment if it ends the answer."""
        steps: list[Step] = []
        if not (delta.reasoning or delta.tool_calls):
            self._scored += delta.scored
        if delta.reasoning and self._shows_reasoning:
            if self._kind is not SegmentKind.REASONING:
                steps += self._begin(Begin(kind=SegmentKind.REASONING))
            steps.append(self._grow(delta.reasoning))
        if delta.text:
            steps += self._push_content(delta.text)
        for call in delta.tool_calls:
            steps += self._push_call(call)
        if delta.finish_reason is not None:
            if self._is_empty and self._space:
                space = self._space
                steps += self._begin(Begin(kind=SegmentKind.CONTENT))
                steps.append(self._grow(space))
            if self._kind is SegmentKind.CONTENT and self._scored:
                steps.append(self._grow(""))
            steps += self._end()
        return steps

    def _push_content(self, text: str) -> list[Step]:
        steps: list[Step] = []
        if self._kind is not SegmentKind.CONTENT:
            text = self._space + text
            if text.isspace():
                self._space = text
                return []
            steps += self._begin(Begin(kind=SegmentKind.CONTENT))
        steps.append(self._grow(text))
        return steps

    def _push_call(self, call: ToolCallDelta) -> list[Step]:
        steps: list[Step] = []
        if call.index != self._call:
            # A server elsewhere may not send its calls one after the other.
            if call.id is None or call.name is None:
                raise EngineFaultError("the engine went on with a tool call after it had begun another")
            steps += self._begin(Begin(kind=SegmentKind.TOOL_CALL, call_id=call.id, name=call.name))
            self._call = call.index
        if call.arguments:
            steps.append(self._grow(call.arguments))
        return steps

    def _begin(self, begin: Begin) -> list[Step]:
        steps = self._end()
        self._kind, self._is_empty, self._space = begin.kind, False, ""
        return [*steps, begin]

    def _grow(self, text: str) -> Grow:
        assert self._kind is not None
        self._texts.append(text)
        scored: list[ScoredToken] = []
        if self._kind is SegmentKind.CONTENT:
            scored, self._scored = self._scored, []
        return Grow(kind=self._kind, text=text, scored=scored)

    def _end(self) -> list[Step]:
        if self._kind is None:
            return []
        end = End(kind=self._kind, text="".join(self._texts))
        self._kind = self._call = None
        self._texts.clear()
        return [end]
