"""Grammars that make an answer call tools, in the way that its model writes calls.

In llguidance's dialect of Lark, where `<[7]>` is the token of that id. A special token is no text to it: marks that
are such tokens must be named by their ids.
"""

import json
import re
from collections.abc import Sequence

from localmoe.core.errors import InvalidRequestError
from localmoe.core.request import Grammar
from localmoe.text.answer_format import AnswerFormat
from localmoe.text.grammar_source import json_rule, written
from localmoe.text.tokenizer import Tokenizer
from localmoe.text.tool_calls import Tools

_HARMONY_THOUGHT = ("<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant")
_FINAL_HEADER = "<|channel|>final<|message|>"


def answer_grammar(
    format_: AnswerFormat,
    tokenizer: Tokenizer | None,
    *,
    prompt: str,
    tools: Tools,
    max_calls: int | None,
    content: Grammar | None,
) -> Grammar:
    """What an answer may be: reasoning, where the model is one that does it, and then calls or content.

    Args:
        tokenizer: the model's; None: the same with marks as text, which shows as well whether it can be compiled.
        prompt: the rendered one, which may have begun the reasoning.
        tools: of which there must be a call; none: no calls.
        max_calls: None: any number.
        content: what an answer without calls must be; None: there must be calls.

    Raises:
        InvalidRequestError: one grammar cannot say all of this.
    """
    if tools and content is not None and (format_.syntax.opening + format_.syntax.before_name).startswith("{"):
        # The two would have to be told apart within a JSON object.
        raise InvalidRequestError(
            "this model's tool calls are JSON, too; send tools or a response format, not both"
        )
    writer = _Writer(tokenizer, format_.marks + (format_.thought_marks or ()))
    rules: list[str] = []
    alternatives: list[str] = []
    if tools:
        alternatives.append("calls")
        rules += _call_rules(format_, writer, tools, max_calls)
    if content is not None:
        alternatives.append("content")
        rules += _content_rules(format_, writer, content)
    thought, thought_rules = _thought(format_, writer, prompt)
    start = f"start: {thought}({' | '.join(alternatives)})"
    return Grammar(kind="lark", source="\n".join([start, *thought_rules, *rules]) + "\n")


def _call_rules(format_: AnswerFormat, writer: "_Writer", tools: Tools, max_calls: int | None) -> list[str]:
    syntax = format_.syntax
    more = ""
    if syntax.separator is not None and max_calls is None:
        more = f"({writer.text(syntax.separator)} call)*"
    calls = f"calls: {writer.text(syntax.opening)} call {more} {writer.text(syntax.closing)}"
    call = "call: " + " | ".join(f"call_{index}" for index in range(len(tools)))
    return [
        calls,
        call,
        *(
            f"call_{index}: {writer.text(syntax.before_name + name + syntax.before_arguments)}"
            f" {json_rule(schema)} {writer.text(syntax.after_arguments)}"
            for index, (name, schema) in enumerate(tools.items())
        ),
    ]


def _content_rules(format_: AnswerFormat, writer: "_Writer", content: Grammar) -> list[str]:
    if content.kind == "lark":
        raise InvalidRequestError("a grammar of rules cannot be combined with tools, or with a model's reasoning")
    lines = [line for line in written(content).splitlines() if not line.startswith("%llguidance")]
    header = f"{writer.text(_FINAL_HEADER)} " if format_.parses_always else ""
    return [f"content: {header}body", *("\n".join(lines).replace("start:", "body:", 1)).splitlines()]


def _thought(format_: AnswerFormat, writer: "_Writer", prompt: str) -> tuple[str, list[str]]:
    """How an answer begins, and the rules for that."""
    if format_.parses_always:
        opening, closing, after = _HARMONY_THOUGHT
        rule = f"thought: {writer.text(opening)} {writer.up_to(closing)} {writer.text(after)}"
        return "thought? ", [rule, *writer.rules]
    if format_.thought_marks is None or prompt.rstrip().endswith(format_.thought_marks[1]):
        return "", []
    opening, closing = format_.thought_marks
    rest = f"{writer.up_to(closing)} /[ \\n]{{0,4}}/"
    if format_.is_thinking(prompt):
        return "thought ", [f"thought: {rest}", *writer.rules]
    return "thought? ", [f"thought: {writer.text(opening)} {rest}", *writer.rules]


class _Writer:
    """Texts as Lark, special tokens by their ids.

    Args:
        marks: what may be a special token.
    """

    def __init__(self, tokenizer: Tokenizer | None, marks: Sequence[str]) -> None:
        ids = {} if tokenizer is None else {mark: tokenizer.special_token_id(mark) for mark in marks}
        self._ids = {mark: token_id for mark, token_id in ids.items() if token_id is not None}
        self._pattern = re.compile("|".join(f"({re.escape(mark)})" for mark in self._ids) or "(?!)")
        self.rules: list[str] = []
        """That what was written refers to."""

    def text(self, text: str) -> str:
        """Exactly this; nothing for an empty one."""
        pieces = [piece for piece in self._pattern.split(text) if piece]
        return " ".join(f"<[{self._ids[piece]}]>" if piece in self._ids else json.dumps(piece) for piece in pieces)

    def up_to(self, mark: str) -> str:
        """Anything as far as the mark, and the mark."""
        if mark in self._ids:
            return f"/(?s:.*)/ {self.text(mark)}"
        self.rules.append(f"rest[lazy]: /(?s:.*){re.escape(mark).replace('/', chr(92) + '/')}/")
        return "rest"
