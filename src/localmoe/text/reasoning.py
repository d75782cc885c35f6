"""Finds the reasoning that goes before an answer."""

import re
from collections.abc import Sequence

from localmoe.text.answer_scanner import Parts, Source, Steps
from localmoe.text.tool_calls import Tools, copy_arguments_until, is_tool_name

HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|constrain|>", "<|call|>")
_BODY_ENDS = ("<|end|>", "<|call|>", "<|start|>")
_RECIPIENT = re.compile(r"\bto=functions\.([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_BROKEN_HEADER = re.compile(
    r"(?=\s*<\||\s+to=)"
    r"\s*(?:<\|start\|>\w*)?(?:\s*to=[^\s<]*)?\s*(?:<\|channel\|>[^<]*(?:<\|constrain\|>[^<]*)?)?"
)


def thought(source: Source, parts: Parts, *, marks: tuple[str, str], has_begun: bool) -> Steps[None]:
    """Reasoning between two marks at the beginning of an answer.

    Args:
        has_begun: the prompt ends with the first mark.
    """
    opening, closing = marks
    if has_begun or (yield from source.attempt(_opened(source, opening))):
        parts.begin_reasoning()
        yield from source.copy_until((closing,), parts.reasoning)


def _opened(source: Source, opening: str) -> Steps[None]:
    yield from source.skip_space()
    yield from source.expect(opening)


def harmony(source: Source, parts: Parts, tools: Tools) -> Steps[None]:
    """Messages in channels, as gpt-oss writes them (OpenAI's harmony response format).

    What it analyses is reasoning, what it says to a function is a tool call, and all else is content. A header that
    breaks off with the answer is nothing.
    """
    ended: str | None = None
    while (yield from source.peek()):
        header: list[str] = []
        if not (yield from source.attempt(_header(source, header))):
            if source.accept_rest(_BROKEN_HEADER, after="<|start|>" if ended == "<|start|>" else ""):
                return
            # Text without a header: as it is, up to where one may begin.
            begun = yield from source.copy_until(("<|start|>",), parts.content)
            if begun is None:
                return
            if not (yield from source.attempt(_header(source, header))):
                if source.accept_rest(_BROKEN_HEADER, after=begun):
                    return
                parts.content(begun)
                ended = None
                continue
        recipient, channel = _RECIPIENT.search(header[0]), _CHANNEL.search(header[0])
        if recipient and tools and is_tool_name(recipient[1]):
            parts.call(recipient[1])
            ended = yield from copy_arguments_until(source, parts, _BODY_ENDS)
        elif channel and channel[1] == "analysis":
            parts.begin_reasoning()
            ended = yield from source.copy_until(_BODY_ENDS, parts.reasoning)
        else:
            parts.begin_content()
            ended = yield from source.copy_until(_BODY_ENDS, parts.content)


def _header(source: Source, found: list[str]) -> Steps[None]:
    yield from source.skip_space()
    yield from source.accept("<|start|>")
    yield from source.accept("assistant")
    yield from source.skip_space()
    to = " to=" + (yield from source.word()) if (yield from source.accept("to=")) else ""
    yield from source.expect("<|channel|>")
    found[:] = [to + "<|channel|>" + (yield from source.text_until("<|message|>"))]


def marks_of(template: str) -> tuple[str, str] | None:
    """Between which marks a model reasons, by its chat template; None: it does not, or not between marks."""
    known: Sequence[tuple[str, str]] = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
    return next((marks for marks in known if marks[0] in template or marks[1] in template), None)
