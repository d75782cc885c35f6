"""Parsing an answer that comes in pieces, written as if it were there as a whole.

A parser is a generator. It asks `Source` for what it needs next and puts what it finds into `Parts`; where the text
does not reach, it is suspended until more comes. So nothing in it knows how the text was cut, and what is found
cannot depend on it.
"""

import json
import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from localmoe.core.request import ToolCallDelta
from localmoe.text.answer_parser import Part, add_part
from localmoe.text.stop_strings import possible_start

T = TypeVar("T")

_BREAK = "\n\n"
Steps = Generator[None, None, T]
"""A part of a parser. It yields where it waits for text."""
Emit = Callable[[str], None]

MAX_ATTEMPT_CHARS = 2048
"""What could become a tool call is held back for so long, which also bounds what many beginnings cost."""
_SPACE = " \t\r\n"
_WORD = re.compile(r"[A-Za-z0-9_.:-]*")
_STRUCTURE = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,}\]]")


class NoMatch(Exception):  # noqa: N818 (it tells no failure)
    """The text is not what is looked for here."""


class Source:
    """The answer's text as far as it has come."""

    def __init__(self) -> None:
        self.position = 0
        """Characters that were taken."""
        self._text = ""
        self._is_whole = False
        self._is_attempt = False
        self._taken: list[str] = []
        """In the attempt that is under way, so that it can be put back."""
        self._num_taken = 0

    def feed(self, text: str) -> None:
        """More has come."""
        self._text += text

    def end(self) -> None:
        """Nothing follows."""
        self._is_whole = True

    def attempt(self, steps: Steps[None]) -> Steps[bool]:
        """Do these steps or none of them: where they raise NoMatch, the text is as it was before, unless they have
        committed to it. Whether they succeeded or committed."""
        self._is_attempt, self._taken, self._num_taken = True, [], 0
        try:
            yield from steps
        except NoMatch:
            if self._is_attempt:
                taken = "".join(self._taken)
                self._text = taken + self._text
                self.position -= len(taken)
                return False
        finally:
            self.commit()
        return True

    def commit(self) -> None:
        """Go through with the attempt that is under way."""
        self._is_attempt, self._taken = False, []

    def peek(self) -> Steps[str]:
        """The next character; empty at the end."""
        while not self._text and (yield from self._more()):
            pass
        return self._text[:1]

    def accept(self, literal: str) -> Steps[bool]:
        """Take these very characters if they come next."""
        while not self._text.startswith(literal):
            if not literal.startswith(self._text) or not (yield from self._more()):
                return False
        self._take(len(literal))
        return True

    def expect(self, literal: str) -> Steps[None]:
        """Take these very characters; raises NoMatch where others come."""
        if not (yield from self.accept(literal)):
            raise NoMatch

    def skip_space(self) -> Steps[None]:
        """Take whitespace."""
        while True:
            self._take(len(self._text) - len(self._text.lstrip(_SPACE)))
            if self._text or not (yield from self._more()):
                return

    def word(self) -> Steps[str]:
        """Take a name, such as functions have; raises NoMatch where there is none."""
        while True:
            match = _WORD.match(self._text)
            assert match is not None
            length = match.end()
            if length < len(self._text) or length > MAX_ATTEMPT_CHARS or not (yield from self._more()):
                break
        if length == 0:
            raise NoMatch
        return self._take(length)

    def accept_rest(self, pattern: re.Pattern[str], *, after: str) -> bool:
        """Take all that is left if nothing follows it and, with what was taken before, it is of this form."""
        if not (self._is_whole and pattern.fullmatch(after + self._text)):
            return False
        self._take(len(self._text))
        return True

    def copy_until(self, markers: Sequence[str], emit: Emit) -> Steps[str | None]:
        """Pass text on as far as the first of the markers, which is taken and returned; None at the end.

        Args:
            markers: none is part of another.
        """
        firsts = {marker[0] for marker in markers}
        while True:
            text = self._text
            if firsts.isdisjoint(text):  # as most pieces are
                emit(self._take(len(text)))
            else:
                found = min(((at, marker) for marker in markers if (at := text.find(marker)) >= 0), default=None)
                if found is not None:
                    emit(self._take(found[0]))
                    return self._take(len(found[1]))
                emit(self._take(min(possible_start(text, marker) for marker in markers)))
            if not (yield from self._more()):
                emit(self._take(len(self._text)))
                return None

    def text_until(self, marker: str) -> Steps[str]:
        """Take text and the marker after it; raises NoMatch where it does not come."""
        pieces: list[str] = []
        if (yield from self.copy_until((marker,), pieces.append)) is None:
            raise NoMatch
        return "".join(pieces)

    def copy_json(self, emit: Emit) -> Steps[bool]:
        """Pass one JSON value on; how it is nested is looked at, and nothing else. False where it breaks off."""
        first = yield from self.peek()
        if first not in ("{", "[", '"'):
            return (yield from self._copy_scalar(emit))
        depth = 0
        in_string = is_escaped = False
        while True:
            text = self._text
            at = 1 if is_escaped and text else 0
            is_escaped = is_escaped and not text
            while match := (_IN_STRING if in_string else _STRUCTURE).search(text, at):
                at = match.end()
                char = match[0]
                if char == "\\":
                    is_escaped = at == len(text)
                    at = min(at + 1, len(text))
                elif char == '"':
                    in_string = not in_string
                else:
                    depth += 1 if char in "{[" else -1
                if depth == 0 and not in_string:
                    emit(self._take(at))
                    return True
            emit(self._take(len(text)))
            if not (yield from self._more()):
                return False

    def json_string(self) -> Steps[str]:
        """Take a JSON string and return its value; raises NoMatch for anything else."""
        if (yield from self.peek()) != '"':
            raise NoMatch
        pieces: list[str] = []
        yield from self.copy_json(pieces.append)
        try:
            value = json.loads("".join(pieces), strict=False)
        except ValueError:
            raise NoMatch from None
        assert isinstance(value, str)
        return value.encode(errors="replace").decode()  # half of a surrogate pair is no text

    def _copy_scalar(self, emit: Emit) -> Steps[bool]:
        while True:
            match = _SCALAR_END.search(self._text)
            if match is not None:
                emit(self._take(match.start()))
                return True
            emit(self._take(len(self._text)))
            if not (yield from self._more()):
                return False

    def _more(self) -> Steps[bool]:
        if self._is_whole:
            return False
        yield
        return True

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        self.position += len(taken)
        if self._is_attempt and taken:
            self._taken.append(taken)
            self._num_taken += length
            if self._num_taken > MAX_ATTEMPT_CHARS:
                raise NoMatch
        return taken


class _Complete(Exception):  # noqa: N818 (it tells no failure)
    """Nothing that follows counts."""


class Parts:
    """What was found so far. Whitespace around reasoning and tool calls is left out.

    Args:
        source: of which it is found; all that was taken of it when a part is added.
        new_id: makes the ids of tool calls.
        max_calls: where another one begins, the answer ends; None: any number.
    """

    def __init__(self, source: Source, new_id: Callable[[], str], max_calls: int | None) -> None:
        self._source = source
        self._new_id = new_id
        self._max_calls = max_calls
        self._num_calls = 0
        self._content = _Section()
        self._reasoning = _Section()
        self._ready: list[Part] = []

    def begin_content(self) -> None:
        """What follows of the content is a paragraph of its own."""
        self._content.cut()

    def begin_reasoning(self) -> None:
        """What follows of the reasoning is a paragraph of its own, and likewise what follows it."""
        self._content.cut()
        self._reasoning.cut()

    def content(self, text: str) -> None:
        """More of the content."""
        is_paragraph = self._content.is_new_paragraph
        if shown := self._content.add(text):
            end = self._source.position - self._content.num_held
            if is_paragraph:
                add_part(self._ready, Part(content=_BREAK, end=end - len(shown), is_break=True))
            add_part(self._ready, Part(content=shown, end=end))

    def reasoning(self, text: str) -> None:
        """More of the reasoning."""
        before = _BREAK if self._reasoning.is_new_paragraph else ""
        if shown := self._reasoning.add(text):
            add_part(self._ready, Part(reasoning=before + shown, end=self._source.position))

    def call(self, name: str) -> None:
        """A tool call begins."""
        if self._num_calls == self._max_calls:
            raise _Complete
        self._content.cut()
        self._add(ToolCallDelta(index=self._num_calls, id=self._new_id(), name=name))
        self._num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            self._add(ToolCallDelta(index=self._num_calls - 1, arguments=text))

    def end(self) -> None:
        """Nothing follows."""
        if rest := self._content.rest():
            add_part(self._ready, Part(content=rest, end=self._source.position))

    def take(self) -> list[Part]:
        """What has come since it was last asked."""
        ready, self._ready = self._ready, []
        return ready

    def _add(self, call: ToolCallDelta) -> None:
        add_part(self._ready, Part(tool_calls=(call,), end=self._source.position))


class _Section:
    """Text whose trailing whitespace is held back, since it may be cut off."""

    def __init__(self) -> None:
        self._space = ""
        self._is_cut = False
        """Leading whitespace is left out."""
        self._has_begun = False

    @property
    def is_new_paragraph(self) -> bool:
        """Whether what comes next is apart from what was before it."""
        return self._is_cut and self._has_begun

    @property
    def num_held(self) -> int:
        """Characters that are held back, of the text that was added last where some of that was not."""
        return len(self._space)

    def add(self, text: str) -> str:
        """What is certain to be in it now."""
        text = text.lstrip(_SPACE) if self._is_cut else text
        stripped = text.rstrip(_SPACE)
        ready = ""
        if stripped:
            ready = self._space + stripped
            self._space = ""
            self._is_cut = False
            self._has_begun = True
        self._space += text[len(stripped) :]
        return ready

    def cut(self) -> None:
        self._space = ""
        self._is_cut = True

    def rest(self) -> str:
        """What is in it besides when nothing follows."""
        return "" if self._is_cut else self._space


Parse = Callable[[Source, Parts], Steps[None]]


class SteppedParser:
    """An `AnswerParser` of a generator.

    Args:
        parse: takes the whole text.
        new_id, max_calls: see `Parts`.
    """

    def __init__(self, parse: Parse, *, new_id: Callable[[], str], max_calls: int | None = None) -> None:
        self._source = Source()
        self._parts = Parts(self._source, new_id, max_calls)
        self._steps = parse(self._source, self._parts)
        self.is_complete = False
        """See `AnswerParser.is_complete`."""
        self._step()

    def push(self, text: str) -> Sequence[Part]:
        """See `AnswerParser.push`."""
        if not text or self.is_complete:
            return ()
        self._source.feed(text)
        self._step()
        return self._parts.take()

    def flush(self) -> Sequence[Part]:
        """See `AnswerParser.flush`."""
        self._source.end()
        if not self.is_complete:
            self._step()
        if not self.is_complete:
            self._parts.end()
        return self._parts.take()

    def _step(self) -> None:
        try:
            next(self._steps, None)
        except _Complete:
            self.is_complete = True
