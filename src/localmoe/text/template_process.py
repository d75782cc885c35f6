"""Renders one model's chat template, in a process of its own: see `sandbox_process`.

The environment is the one that templates are written for (transformers' `chat_template_utils`). Templates come with
models, and see clients' text; so they run in Jinja's immutable sandbox, which keeps them from everything but
arithmetic. With that alone they can take any time and memory, already when they are compiled, since constants are
folded; so the whole of Jinja is here, and nowhere else.
"""

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from localmoe.text.sandbox_process import DONE, REFUSED, serve

MAX_CPU_S = 0.8
"""To compile a template, or to render one prompt."""
MAX_PROMPT_CHARS = 2**25
MAX_BYTES = 2**29
"""Of memory, for all of it."""
_MAX_COMPLAINT_CHARS = 500


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here its body is just rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _SafeNamespace(Namespace):
    """Refuses underscore names, with which a template could disguise an object from the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


class _Arguments(dict[str, Any]):
    """Arguments of a call for templates of both kinds: those that take an object, and those that take its JSON, which
    they put out or add to a string.

    Args:
        text: the JSON, as the model wrote it.
    """

    def __init__(self, value: dict[str, Any], text: str) -> None:
        super().__init__(value)
        self._text = text

    def __str__(self) -> str:
        return self._text

    def __radd__(self, text: str) -> str:
        return text + str(self)

    def __add__(self, text: str) -> str:
        return str(self) + text


def _arguments(said: Any) -> Any:
    """What a model once wrote; where that is no object, as it is."""
    if not isinstance(said, str):
        return said
    text = said or "{}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return said
    return _Arguments(value, text) if isinstance(value, dict) else said


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    for call in message.get("tool_calls") or ():
        function = call.get("function", {})
        if "arguments" in function:
            function["arguments"] = _arguments(function["arguments"])
    return message


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter, leaves <, > and & alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format_: datetime.now().strftime(format_)
    environment.globals["namespace"] = _SafeNamespace
    return environment


def _render(template: jinja2.Template, question: Mapping[str, Any]) -> bytes:
    messages = [_with_arguments(message) for message in question["messages"]]
    pieces: list[str] = []
    num_chars = 0
    for piece in template.generate({**question, "messages": messages, "add_generation_prompt": True}):
        pieces.append(piece)
        num_chars += len(piece)
        if num_chars > MAX_PROMPT_CHARS:
            raise ValueError(f"the prompt has more than {MAX_PROMPT_CHARS} characters")
    return "".join(pieces).encode()


def _refused(error: Exception) -> bytes:
    said = str(error) or ("it takes too much memory" if isinstance(error, MemoryError) else type(error).__name__)
    return REFUSED + said[:_MAX_COMPLAINT_CHARS].encode(errors="replace")


class TemplateRenderer:
    """Answers the first question, which is the template's source, with an empty prompt or what is wrong with it; and
    those after it, which are the template's variables as a JSON object, with the prompt or a complaint."""

    def __init__(self) -> None:
        self._answer: Callable[[bytes], bytes] = self._compile

    def __call__(self, question: bytes) -> bytes:
        """The answer."""
        try:
            return DONE + self._answer(question)
        except Exception as error:  # a template may fail in as many ways as a program
            return _refused(error)

    def _compile(self, question: bytes) -> bytes:
        template = _environment().from_string(question.decode())
        self._answer = lambda question: _render(template, json.loads(question))
        return b""


if __name__ == "__main__":
    serve(TemplateRenderer(), cpu_s=MAX_CPU_S, memory_bytes=MAX_BYTES)
