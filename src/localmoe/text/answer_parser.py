"""An answer's text to its parts: content, reasoning and tool calls."""

from collections.abc import Callable
from typing import Protocol

import msgspec

from localmoe.core.request import ToolCallDelta


class Parsed(msgspec.Struct, frozen=True, kw_only=True):
    """What a piece of text has added."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    is_complete: bool = False
    """The answer ends here; what follows is not wanted."""


NOTHING = Parsed()


class AnswerParser(Protocol):
    """Parses one answer. The parts do not depend on how its text is cut into pieces."""

    def push(self, text: str) -> Parsed:
        """What is certain now. Text that cannot be parsed is content; nothing is raised."""
        ...

    def flush(self) -> Parsed:
        """The rest, when nothing follows."""
        ...


MakeParser = Callable[[], AnswerParser]


class PlainParser:
    """All is content."""

    def push(self, text: str) -> Parsed:
        """See `AnswerParser.push`."""
        return Parsed(content=text) if text else NOTHING

    def flush(self) -> Parsed:
        """See `AnswerParser.flush`."""
        return NOTHING
