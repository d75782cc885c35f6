"""Chat messages to a prompt, by the Jinja template that comes with a model.

The environment is the one that templates are written for (transformers' `chat_template_utils`). Templates come
from the model's directory, never from clients, but see clients' text; so they run in the immutable sandbox, and
their output is bounded. The bounds are looked at where a template puts something out: a loop that puts out nothing
runs to its end, which is why no template is rendered on an event loop's thread.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from localmoe.core.errors import CheckpointError, InvalidRequestError
from localmoe.formats.files import read_optional_json_object, read_text

MAX_TEMPLATE_BYTES = 2**20
MAX_PROMPT_CHARS = 64 * 2**20
MAX_RENDER_S = 10.0


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


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike Jinja's own filter, leaves <, > and & alone."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format_: now().strftime(format_)
    environment.globals["namespace"] = _SafeNamespace
    return environment


class ChatTemplate:
    """One model's template.

    Args:
        source: Jinja.
        special_tokens: `bos_token` and its like, visible to the template by name.
        now: the clock behind `strftime_now`.

    Raises:
        ValueError: `source` is not a template.
    """

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str], now: Callable[[], datetime] = datetime.now
    ) -> None:
        try:
            self._template = _environment(now).from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._knows_developer = "developer" in source

    @classmethod
    def load(cls, directory: Path, *, special_tokens: Mapping[str, str]) -> "ChatTemplate | None":
        """Read `chat_template.jinja`, else `chat_template` of `tokenizer_config.json`; None if there is neither.

        Raises:
            CheckpointError: a file is damaged, or its template does not compile.
        """
        path = directory / "chat_template.jinja"
        source: Any
        if path.exists():
            source = read_text(path, max_bytes=MAX_TEMPLATE_BYTES)
        else:
            path = directory / "tokenizer_config.json"
            source = read_optional_json_object(path).get("chat_template")
            if isinstance(source, list):
                named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
                source = named.get("default")
            if source is None:
                return None
        if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: chat_template is not a text of at most {MAX_TEMPLATE_BYTES} bytes")
        try:
            return cls(source, special_tokens=special_tokens)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt that asks for the next assistant message.

        A `developer` message is given to a template that has no word of that role as `system`, its older name.
        How long this takes is the template's to say; call it in a thread of its own.

        Args:
            messages: each with `role` and `content`.

        Raises:
            InvalidRequestError: the template refuses these messages, or its output is over the bounds.
        """
        if not self._knows_developer:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        deadline = time.monotonic() + MAX_RENDER_S
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            ):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_PROMPT_CHARS or time.monotonic() > deadline:
                    raise InvalidRequestError(
                        f"the chat template's result is over {MAX_PROMPT_CHARS} characters"
                        f" or took over {MAX_RENDER_S:g} s",
                        param="messages",
                    )
        except InvalidRequestError:
            raise
        except Exception as error:  # a template may fail in as many ways as a program
            raise InvalidRequestError(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error
        return "".join(pieces)
