"""An answer's text to its parts: content, reasoning and tool calls."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from localmoe.core.request import ToolCallDelta


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What comes next in an answer; all of it is of one kind, since that is what keeps kinds in their order."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    end: int
    """Characters of the answer, as the model wrote it, up to the end of this."""
    is_break: bool = False
    """Whether it is content that the model has not written, between paragraphs that were apart."""


class AnswerParser(Protocol):
    """Parses one answer. The parts do not depend on how its text is cut into pieces."""

    @property
    def is_complete(self) -> bool:
        """The answer has ended before what was pushed last did; nothing more is wanted."""
        ...

    def push(self, text: str) -> Sequence[Part]:
        """What is certain now. Text that cannot be parsed is content; nothing is raised."""
        ...

    def flush(self) -> Sequence[Part]:
        """The rest, when nothing follows."""
        ...


MakeParser = Callable[[], AnswerParser]


class PlainParser:
    """All is content."""

    is_complete = False

    def __init__(self) -> None:
        self._num_chars = 0

    def push(self, text: str) -> Sequence[Part]:
        """See `AnswerParser.push`."""
        self._num_chars += len(text)
        return (Part(content=text, end=self._num_chars),) if text else ()

    def flush(self) -> Sequence[Part]:
        """See `AnswerParser.flush`."""
        return ()


def add_part(parts: list[Part], part: Part) -> None:
    """Put a part after the others. Neighbours of one kind become one, and so do pieces of one call."""
    last = parts[-1] if parts else None
    if last is None or _kind(last) != _kind(part):
        parts.append(part)
        return
    parts[-1] = Part(
        content=last.content + part.content,
        reasoning=last.reasoning + part.reasoning,
        tool_calls=_joined(last.tool_calls, part.tool_calls),
        end=part.end,
    )


def _kind(part: Part) -> tuple[bool, bool, bool]:
    return bool(part.content), bool(part.reasoning), part.is_break


def _joined(calls: tuple[ToolCallDelta, ...], following: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
    if not (calls and following) or following[0].name is not None or following[0].index != calls[-1].index:
        return calls + following
    grown = msgspec.structs.replace(calls[-1], arguments=calls[-1].arguments + following[0].arguments)
    return (*calls[:-1], grown, *following[1:])
