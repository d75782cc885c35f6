"""What clients write as grammars, in llguidance's words, and whether it can be compiled.

llguidance compiles by recursion and grows what it compiles: a source can exhaust stack, memory and time, which its
own limits do not prevent. Lengths and nesting are bounded here. The rest is bounded where it is compiled first: a
process that may be lost (`grammar_trial`) tries each grammar, with little of everything, before an engine with more
of it gets it.

All grammars are compiled without forcing. Else llguidance follows what is certain to come to its end before each
token, which for `a{1000000}` takes seconds, and writes it in tokens of its own choice instead of the model's.
"""

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark

from localmoe.core.errors import InvalidRequestError
from localmoe.core.request import Grammar

MAX_SOURCE_BYTES = 1 << 17
MAX_REGEX_BYTES = 1 << 12
MAX_DEPTH = 64
"""Brackets within brackets."""
_JSON = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_PATTERN = re.compile(r"\\.|[()\[\]{}]", re.DOTALL)
"""Brackets, and what may have some in it that are none."""
_MAX_MESSAGE_CHARS = 300
_NOISE = re.compile(
    r"^ *\d+ \|.*(\n *\^)?|^at 1\(8\): |failed to compile JSON schema: |<non-verbose/>", re.MULTILINE
)
"""Excerpts, and where in the rules that we made of it a schema is."""
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_JSON_OPTIONS = {
    # Bounded, since a model that has lost its way writes spaces for ever.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}",
    "lenient": False,
}


def written(grammar: Grammar) -> str:
    """The source in llguidance's dialect of Lark.

    Raises:
        InvalidRequestError: it is too long or too deeply nested to be looked at, or of no use at first sight.
    """
    _check_bounds(grammar)
    source = grammar.source
    match grammar.kind:
        case "json_object":
            rules = f"start: {json_rule({'type': 'object'})}"
        case "json_schema":
            rules = f"start: {json_rule(_parsed(source))}"
        case "regex":
            rules = f"start: /{regex_to_lark(source)}/"
        case "lark":
            if "%llguidance" in source:
                raise InvalidRequestError("%llguidance is not supported")
            rules = source
        case "choice":
            texts = _parsed(source)
            if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
                raise InvalidRequestError("it must be a list of texts, one at least")
            # A terminal, since alternatives of a rule are kept apart, and there may be thousands.
            rules = f"start: TEXT\nTEXT: {' | '.join(map(json.dumps, texts))}"
    return rules + _OPTIONS


def json_rule(schema: Any) -> str:
    """A schema as a part of a rule.

    Raises:
        InvalidRequestError: it is no schema at first sight.
    """
    if not isinstance(schema, dict):
        raise InvalidRequestError("it must be a JSON object")
    if "x-guidance" in schema:
        raise InvalidRequestError("the keyword 'x-guidance' is not supported")
    try:
        return "%json " + json.dumps({"x-guidance": _JSON_OPTIONS, **schema}, allow_nan=False)
    except ValueError:
        raise InvalidRequestError("it has a number that is not finite") from None


def compiled(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    """A matcher at the beginning of an answer.

    Raises:
        InvalidRequestError: it cannot be compiled.
    """
    matcher = LLMatcher(tokenizer, written(grammar), log_level=0, limits=_limits())
    if not matcher.is_error():
        # Much of what a grammar takes shows with the first token only.
        matcher.compute_bitmask()
    if matcher.is_error():
        raise InvalidRequestError(presentable(matcher.get_error()))
    return matcher


def presentable(message: str) -> str:
    """What llguidance says in one line, short, and without the source, which the client knows."""
    message = _NOISE.sub("", message)
    message = " ".join(message.split())
    if message == "NoExtensionBias":
        message = "there is no text of it"
    return message if len(message) <= _MAX_MESSAGE_CHARS else message[:_MAX_MESSAGE_CHARS] + "…"


def _limits() -> LLParserLimits:
    return LLParserLimits(max_lexer_states=20_000, precompute_large_lexemes=False, verbose_errors=False)


def _parsed(source: str) -> Any:
    try:
        return json.loads(source)
    except ValueError as error:
        raise InvalidRequestError(f"it is no JSON: {error}") from None


def _check_bounds(grammar: Grammar) -> None:
    num_bytes, is_regex = len(grammar.source.encode()), grammar.kind == "regex"
    max_bytes = MAX_REGEX_BYTES if is_regex else MAX_SOURCE_BYTES
    if num_bytes > max_bytes:
        raise InvalidRequestError(f"it has {num_bytes} bytes; at most {max_bytes} are allowed")
    depth = 0
    for match in (_PATTERN if is_regex or grammar.kind == "lark" else _JSON).finditer(grammar.source):
        if match[0] in "([{":
            depth += 1
            if depth > MAX_DEPTH:
                raise InvalidRequestError(f"it is nested more than {MAX_DEPTH} deep")
        elif match[0] in ")]}":
            depth = max(0, depth - 1)
