"""Finds tool calls in an answer, one function for each way of writing them.

What does not parse is content. A call is announced as soon as its name is known; from there on its arguments are
passed on as they come, and no more is made of them than JSON's nesting says.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from localmoe.text.answer_scanner import Emit, NoMatch, Parts, Source, Steps

Tools = Mapping[str, Mapping[str, Any]]
"""The schema of the arguments of each tool that may be called, by name."""
ParseCalls = Callable[[Source, Parts, Tools], Steps[None]]

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
PYTHON_TAG = "<|python_tag|>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END, CALL_SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_ARGUMENTS = ("arguments", "parameters")
_PYTHON_VALUES = {"True": "true", "False": "false", "None": "null"}
_QUOTE = re.compile('"')
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_PAIR = r"\\u[dD][89abAB][\da-fA-F]{2}\\u[dD][c-fC-F][\da-fA-F]{2}"
_ESCAPE = re.compile(
    _PAIR + r"|(?P<half>\\u[dD][89a-fA-F][\da-fA-F]{2})" + r"""|\\(?:["\\/bfnrt]|u[\da-fA-F]{4})"""
)
_UNFINISHED_ESCAPE = re.compile(
    r"\\(?:u[\da-fA-F]{0,3}|u[dD][89abAB][\da-fA-F]{2}(?:\\(?:u(?:[dD](?:[c-fC-F][\da-fA-F]?)?)?)?)?)?"
)


def is_tool_name(text: str) -> bool:
    """Whether it could be one. Of which tool is not asked: who called for something else is better told so."""
    return _NAME.fullmatch(text) is not None


def hermes(source: Source, parts: Parts, tools: Tools) -> Steps[None]:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes and Qwen write it."""
    while (yield from source.copy_until((TOOL_CALL,), parts.content)):
        if (yield from source.attempt(_json_call(source, parts))):
            yield from source.skip_space()
            yield from source.accept(TOOL_CALL_END)
        else:
            parts.content(TOOL_CALL)


def qwen3_coder(source: Source, parts: Parts, tools: Tools) -> Steps[None]:
    """`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`, the outer tag sometimes
    left out; a value is text, and the tool's schema says of what. JSON as in `hermes` is taken too."""
    while marker := (yield from source.copy_until((TOOL_CALL, _FUNCTION), parts.content)):
        is_inside = marker == _FUNCTION
        if (yield from source.attempt(_tagged_call(source, parts, tools, is_inside=is_inside))) or (
            not is_inside and (yield from source.attempt(_json_call(source, parts)))
        ):
            yield from source.skip_space()
            yield from source.accept(TOOL_CALL_END)
        else:
            parts.content(marker)


def mistral(source: Source, parts: Parts, tools: Tools) -> Steps[None]:
    """`[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]`, or newer, `[TOOL_CALLS]name[ARGS]{…}` for each call."""
    while (yield from source.copy_until((TOOL_CALLS,), parts.content)):
        if (yield from source.attempt(_listed_call(source, parts))):
            while (yield from source.attempt(_next_call(source, parts, ","))):
                pass
            yield from source.skip_space()
            yield from source.accept("]")
        elif not (yield from source.attempt(_named_call(source, parts))):
            parts.content(TOOL_CALLS)


def llama3(source: Source, parts: Parts, tools: Tools) -> Steps[None]:
    """`{"name": …, "parameters": {…}}` as the whole answer, or after `<|python_tag|>`; several are separated by `;`.

    Without the tag it must be of a tool that there is, because an answer may be JSON.
    """
    begins = source.attempt(_json_call(source, parts, among=tools.keys()))
    while (yield from begins):
        begins = source.attempt(_next_call(source, parts, ";", among=tools.keys()))
    while (yield from source.copy_until((PYTHON_TAG,), parts.content)):
        if not (yield from source.attempt(_json_call(source, parts))):
            parts.content(PYTHON_TAG)
        else:
            while (yield from source.attempt(_next_call(source, parts, ";"))):
                pass


def deepseek(source: Source, parts: Parts, tools: Tools) -> Steps[None]:
    """Calls between DeepSeek's marks: of V3 and R1 with `function`, the name and a fenced block, of V3.1 with the
    name and bare JSON."""
    while marker := (yield from source.copy_until((CALLS_BEGIN, CALL_BEGIN), parts.content)):
        if not (yield from source.attempt(_marked_call(source, parts, is_inside=marker == CALL_BEGIN))):
            parts.content(marker)
            continue
        while (yield from source.attempt(_marked_call(source, parts, is_inside=False))):
            pass
        yield from source.skip_space()
        yield from source.accept(CALLS_END)


def _json_call(source: Source, parts: Parts, among: Iterable[str] | None = None) -> Steps[None]:
    """One call as a JSON object, its members in any order.

    Args:
        among: it must be of one of these tools, and have arguments, before anything is believed; None: any name will
            do.
    """
    yield from source.skip_space()
    yield from source.expect("{")
    name: str | None = None
    early: list[str] = []
    has_begun = has_arguments = False
    while not (yield from _accept_spaced(source, "}")):
        key = yield from source.json_string()
        if not (yield from _accept_spaced(source, ":")):
            raise NoMatch
        yield from source.skip_space()
        if key == "name" and name is None:
            name = yield from source.json_string()
            if not is_tool_name(name) or (among is not None and name not in among):
                raise NoMatch
        elif key in _ARGUMENTS and not has_arguments:
            has_arguments = True
            if name is not None and not has_begun:
                has_begun = _begin(source, parts, name)
            yield from _copy_arguments(source, parts.arguments if has_begun else early.append)
        elif among is not None and key not in ("type", "id"):
            raise NoMatch
        else:
            yield from source.copy_json(lambda _: None)
        if name is not None and not has_begun and (among is None or has_arguments):
            has_begun = _begin(source, parts, name)
            parts.arguments("".join(early))
        if not (yield from _accept_spaced(source, ",")):
            if not (yield from _accept_spaced(source, "}")):
                raise NoMatch
            break
    if not has_begun:
        raise NoMatch
    if not has_arguments:
        parts.arguments("{}")


def _begin(source: Source, parts: Parts, name: str) -> bool:
    source.commit()
    parts.call(name)
    return True


def _next_call(source: Source, parts: Parts, separator: str, among: Iterable[str] | None = None) -> Steps[None]:
    if not (yield from _accept_spaced(source, separator)):
        raise NoMatch
    yield from _json_call(source, parts, among)


def _listed_call(source: Source, parts: Parts) -> Steps[None]:
    """The first of a list of calls, or a call without a list."""
    yield from _accept_spaced(source, "[")
    yield from _json_call(source, parts)


def _named_call(source: Source, parts: Parts) -> Steps[None]:
    yield from source.skip_space()
    name = yield from source.word()
    if (yield from source.accept(CALL_ID)):
        yield from source.word()
    if not (yield from source.accept(ARGS)) and (yield from source.peek()) != "{":
        raise NoMatch
    if not is_tool_name(name):
        raise NoMatch
    _begin(source, parts, name)
    yield from source.skip_space()
    yield from _copy_arguments(source, parts.arguments)


def _marked_call(source: Source, parts: Parts, *, is_inside: bool) -> Steps[None]:
    if not is_inside:
        yield from source.skip_space()
        yield from source.expect(CALL_BEGIN)
    name = (yield from source.text_until(CALL_SEP)).strip()
    if is_fenced := name == "function":
        name = yield from source.word()
        yield from source.skip_space()
        yield from source.accept("```json")
    if not is_tool_name(name):
        raise NoMatch
    _begin(source, parts, name)
    yield from source.skip_space()
    yield from _copy_arguments(source, parts.arguments)
    yield from source.skip_space()
    if is_fenced:
        yield from source.accept("```")
    yield from source.accept(CALL_END)


def _tagged_call(source: Source, parts: Parts, tools: Tools, *, is_inside: bool) -> Steps[None]:
    if not is_inside:
        yield from source.skip_space()
        yield from source.expect(_FUNCTION)
    name = (yield from source.text_until(">")).strip()
    if not is_tool_name(name):
        raise NoMatch
    _begin(source, parts, name)
    properties = tools.get(name, {}).get("properties")
    schemas = properties if isinstance(properties, Mapping) else {}
    before = "{"
    while (yield from _accept_spaced(source, _PARAMETER)):
        key = (yield from source.text_until(">")).strip()
        parts.arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        before = ", "
        if not (yield from _copy_value(source, parts.arguments, _types(schemas.get(key)))):
            return  # it broke off, and so do the arguments
    # Some models leave the inner end out, or both; only where nothing follows it may have broken off.
    if (
        (yield from _accept_spaced(source, _FUNCTION_END))
        or (yield from source.accept(TOOL_CALL_END))
        or (yield from source.peek())
    ):
        parts.arguments("{}" if before == "{" else "}")


def _copy_value(source: Source, emit: Emit, types: frozenset[str]) -> Steps[bool]:
    """Pass one parameter's text on as JSON; strings as they come."""
    lines = _Unframed()
    if types <= {"string"}:
        emit('"')

        def emit_escaped(text: str) -> None:
            emit(_escaped(lines.push(text)))

        is_whole = (yield from source.copy_until((_PARAMETER_END,), emit_escaped)) is not None
        if is_whole:
            emit('"')
        return is_whole
    pieces: list[str] = []
    if (yield from source.copy_until((_PARAMETER_END,), pieces.append)) is None:
        return False
    text = lines.push("".join(pieces))
    literal = _PYTHON_VALUES.get(text.strip(), text.strip())
    is_text = types <= {"string", "null"} and literal != "null"
    emit(_Mended().push(literal) if not is_text and _is_json(literal) else f'"{_escaped(text)}"')
    return True


class _Unframed:
    """Takes off one line break at the beginning of a text and one at its end."""

    def __init__(self) -> None:
        self._is_first = True
        self._held = ""

    def push(self, text: str) -> str:
        text = self._held + text
        if self._is_first and text:
            self._is_first = False
            text = text.removeprefix("\n")
        self._held = "\n" if text.endswith("\n") else ""
        return text.removesuffix("\n")


def _types(schema: Any) -> frozenset[str]:
    """The JSON types that a parameter may have; none where its schema does not say so, which is taken for text."""
    if not isinstance(schema, Mapping):
        return frozenset()
    found = schema.get("type")
    types = {found} if isinstance(found, str) else {kind for kind in found or () if isinstance(kind, str)}
    for alternative in schema.get("anyOf") or schema.get("oneOf") or ():
        types |= _types(alternative) if isinstance(alternative, Mapping) else set()
    if not types and ("$ref" in schema or "enum" in schema or "allOf" in schema):
        types.add("any")
    return frozenset(types)


def copy_arguments_until(source: Source, parts: Parts, markers: Sequence[str]) -> Steps[str | None]:
    """Pass on as a call's arguments what is before the first of these markers; see `Source.copy_until`. Where there
    is nothing, they are an object without members."""
    mended = _Mended()
    is_empty = True

    def emit(text: str) -> None:
        nonlocal is_empty
        text = text.lstrip() if is_empty else text
        is_empty = is_empty and not text
        parts.arguments(mended.push(text))

    marker = yield from source.copy_until(markers, emit)
    if is_empty:
        parts.arguments("{}")
    return marker


def _copy_arguments(source: Source, emit: Emit) -> Steps[None]:
    """Pass arguments on, as the JSON of an object wherever the model meant one."""
    mended = _Mended()
    first = yield from source.peek()
    if first == '"':  # an object's JSON within a string
        text = (yield from source.json_string()).strip()
        emit(mended.push(text) if text.startswith("{") else json.dumps(text, ensure_ascii=False))
    elif first in ("{", "["):
        yield from source.copy_json(lambda text: emit(mended.push(text)))
    else:
        pieces: list[str] = []
        yield from source.copy_json(pieces.append)
        value = "".join(pieces)
        emit("{}" if value in ("", "null") else value)


class _Mended:
    """JSON as it comes, its strings as clients can read them: models write code as it is, with its line breaks and
    backslashes, and halves of the pairs of escapes that one character takes."""

    def __init__(self) -> None:
        self._in_string = False
        self._held = ""

    def push(self, text: str) -> str:
        """The next of it; an escape that is not complete waits, and is left out if nothing follows."""
        text, self._held = self._held + text, ""
        pieces: list[str] = []
        at = 0
        while (match := (_IN_STRING if self._in_string else _QUOTE).search(text, at)) is not None:
            start = match.start()
            pieces.append(text[at:start])
            at = match.end()
            if match[0] == '"':
                self._in_string = not self._in_string
                pieces.append('"')
            elif match[0] != "\\":
                pieces.append(_escaped(match[0]))
            elif _UNFINISHED_ESCAPE.fullmatch(text, start):
                self._held, at = text[start:], len(text)
            else:
                escape = _ESCAPE.match(text, start)
                if escape is None:
                    pieces.append("\\\\")  # it was meant as it is, as in a regular expression or a path
                else:
                    pieces.append("\\ufffd" if escape["half"] else escape[0])
                    at = escape.end()
        return "".join(pieces) + text[at:]


def _accept_spaced(source: Source, literal: str) -> Steps[bool]:
    yield from source.skip_space()
    return (yield from source.accept(literal))


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
