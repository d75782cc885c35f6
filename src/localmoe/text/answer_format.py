"""How a model writes reasoning and tool calls: told from its chat template, parsed, and written."""

import secrets
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from localmoe.core.serving import AnswerFormatName
from localmoe.text.answer_parser import MakeParser, PlainParser
from localmoe.text.answer_scanner import Parts, Source, SteppedParser, Steps
from localmoe.text.reasoning import HARMONY_MARKERS, harmony, marks_of, thought
from localmoe.text.tokenizer import Tokenizer
from localmoe.text.tool_calls import (
    ARGS,
    CALL_BEGIN,
    CALL_END,
    CALL_ID,
    CALL_SEP,
    CALLS_BEGIN,
    CALLS_END,
    PYTHON_TAG,
    TOOL_CALL,
    TOOL_CALL_END,
    TOOL_CALLS,
    ParseCalls,
    Tools,
    deepseek,
    hermes,
    llama3,
    mistral,
    qwen3_coder,
)

_SHORT_ID = string.ascii_letters + string.digits


@dataclass(frozen=True, kw_only=True)
class CallSyntax:
    """What a model writes around the names and arguments of its calls."""

    opening: str = ""
    """Before the first call."""
    before_name: str
    before_arguments: str
    """Between the name and the arguments, which are the JSON of an object."""
    after_arguments: str = ""
    separator: str | None = ""
    """Between two calls; None: an answer has one at most."""
    closing: str = ""
    """After the last call."""

    def write(self, calls: list[tuple[str, str]]) -> str:
        """Calls of these names and arguments as the model would write them."""
        written = [
            f"{self.before_name}{name}{self.before_arguments}{arguments}{self.after_arguments}"
            for name, arguments in calls
        ]
        return self.opening + (self.separator or "").join(written) + self.closing


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _new_short_id() -> str:
    """Mistral's templates ask for ids of nine letters and digits."""
    return "".join(secrets.choice(_SHORT_ID) for _ in range(9))


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """One way of writing answers."""

    name: AnswerFormatName
    """What a model's setting calls it."""
    parse: ParseCalls
    syntax: CallSyntax
    marks: tuple[str, ...]
    """What `parse` looks for. Where they are special tokens, they must be shown to it."""
    parses_always: bool = False
    """Not only where there are tools to call."""
    thought_marks: tuple[str, str] | None = None
    """Between which it reasons before it answers; None: it does not, or `parse` sees to it."""
    new_id: Callable[[], str] = _new_id

    def make_parser(self, *, tools: Tools, prompt: str, max_calls: int | None = None) -> MakeParser:
        """Of parsers for one request's answers.

        Args:
            tools: that may be called; without any, what looks like a call is content.
            prompt: the rendered one, which may have begun the reasoning.
            max_calls: an answer ends where one more begins; None: any number.
        """
        with_calls = bool(tools) or self.parses_always
        if not with_calls and self.thought_marks is None:
            return PlainParser

        has_begun = self.is_thinking(prompt)  # the prompt itself is not kept for as long as the answer takes

        def parse(source: Source, parts: Parts) -> Steps[None]:
            if self.thought_marks is not None:
                yield from thought(source, parts, marks=self.thought_marks, has_begun=has_begun)
            if with_calls:
                yield from self.parse(source, parts, tools)
            else:
                yield from source.copy_until((), parts.content)

        return lambda: SteppedParser(parse, new_id=self.new_id, max_calls=max_calls)

    def is_thinking(self, prompt: str) -> bool:
        """Whether a prompt has begun the reasoning, so that the answer goes on with it."""
        return self.thought_marks is not None and prompt.rstrip().endswith(self.thought_marks[0])

    def shown_token_ids(self, tokenizer: Tokenizer, *, with_calls: bool) -> frozenset[int]:
        """Special tokens that are text to the parser."""
        marks = (self.marks if with_calls or self.parses_always else ()) + (self.thought_marks or ())
        ids = map(tokenizer.special_token_id, marks)
        return frozenset(token_id for token_id in ids if token_id is not None)


_JSON = CallSyntax(
    before_name=f'{TOOL_CALL}\n{{"name": "',
    before_arguments='", "arguments": ',
    after_arguments=f"}}\n{TOOL_CALL_END}",
    separator="\n",
)
HERMES = AnswerFormat(name="hermes", parse=hermes, syntax=_JSON, marks=(TOOL_CALL, TOOL_CALL_END))
_QWEN3_CODER = replace(HERMES, name="qwen3_coder", parse=qwen3_coder)
_MISTRAL = AnswerFormat(
    name="mistral",
    parse=mistral,
    syntax=CallSyntax(
        opening=f"{TOOL_CALLS} [",
        before_name='{"name": "',
        before_arguments='", "arguments": ',
        after_arguments="}",
        separator=", ",
        closing="]",
    ),
    marks=(TOOL_CALLS, CALL_ID, ARGS),
    new_id=_new_short_id,
)
_MISTRAL_ARGS = replace(
    _MISTRAL, name="mistral_args", syntax=CallSyntax(before_name=TOOL_CALLS, before_arguments=ARGS)
)
_LLAMA3 = AnswerFormat(
    name="llama3",
    parse=llama3,
    syntax=CallSyntax(
        before_name='{"name": "', before_arguments='", "parameters": ', after_arguments="}", separator="; "
    ),
    marks=(PYTHON_TAG,),
)
_DEEPSEEK = AnswerFormat(
    name="deepseek",
    parse=deepseek,
    syntax=CallSyntax(
        opening=CALLS_BEGIN,
        before_name=f"{CALL_BEGIN}function{CALL_SEP}",
        before_arguments="\n```json\n",
        after_arguments=f"\n```{CALL_END}",
        separator="\n",
        closing=CALLS_END,
    ),
    marks=(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, CALL_SEP),
)
_DEEPSEEK_V31 = replace(
    _DEEPSEEK,
    name="deepseek_v31",
    syntax=CallSyntax(
        opening=CALLS_BEGIN,
        before_name=CALL_BEGIN,
        before_arguments=CALL_SEP,
        after_arguments=CALL_END,
        closing=CALLS_END,
    ),
)
_HARMONY = AnswerFormat(
    name="harmony",
    parse=harmony,
    syntax=CallSyntax(
        before_name="<|channel|>commentary to=functions.",
        before_arguments=" <|constrain|>json<|message|>",
        separator=None,
    ),
    marks=HARMONY_MARKERS,
    parses_always=True,
)
FORMATS: Mapping[AnswerFormatName, AnswerFormat] = {
    format_.name: format_
    for format_ in (
        HERMES,
        _QWEN3_CODER,
        _MISTRAL,
        _MISTRAL_ARGS,
        _LLAMA3,
        _DEEPSEEK,
        _DEEPSEEK_V31,
        _HARMONY,
    )
}

_SIGNS: tuple[tuple[tuple[str, ...], AnswerFormat], ...] = (
    (("<|channel|>", "<|message|>"), _HARMONY),
    ((CALLS_BEGIN, "```json"), _DEEPSEEK),
    ((CALLS_BEGIN,), _DEEPSEEK_V31),
    ((TOOL_CALL, "<function="), _QWEN3_CODER),
    ((TOOL_CALL,), HERMES),
    ((TOOL_CALLS, ARGS), _MISTRAL_ARGS),
    ((TOOL_CALLS,), _MISTRAL),
    ((PYTHON_TAG,), _LLAMA3),
    (('"parameters": dictionary of argument name',), _LLAMA3),
)
"""What the templates of those models have in them; the first of which all is found counts."""


def answer_format(template: str | None, name: AnswerFormatName | None = None) -> AnswerFormat:
    """How a model writes, as its chat template shows. Where it shows nothing of calls, calls are as in `hermes`.

    Args:
        template: None: it has none.
        name: in place of what the template shows; what marks reasoning is seen there all the same.
    """
    template = template or ""
    found = next((format_ for signs, format_ in _SIGNS if all(sign in template for sign in signs)), HERMES)
    chosen = found if name is None else FORMATS[name]
    return chosen if chosen.parses_always else replace(chosen, thought_marks=marks_of(template))
