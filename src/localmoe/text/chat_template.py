"""Chat messages to a prompt, by the Jinja template that comes with a model.

Templates come from the model's directory or from whoever serves it, never from clients, but see clients' text. They
are programs of others, so a process that may be lost compiles and renders them (`template_process`), and Jinja is not
even loaded here.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from localmoe.core.errors import (
    BackendUnavailableError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    OverloadedError,
)
from localmoe.formats.files import read_optional_json_object, read_text
from localmoe.text.sandbox_process import DONE, REFUSED, SandboxProcess

T = TypeVar("T")

MAX_TEMPLATE_BYTES = 2**20
_MAX_RENDER_S = 5.0
"""Of real time; the processor's is bounded by `template_process.MAX_CPU_S`."""
_MAX_ANSWER_BYTES = 2**27
_MAX_WAITING = 256
_TOO_MUCH = "it takes too much time or memory"


class ChatTemplate:
    """One model's template, with a process of its own.

    Args:
        source: Jinja.
        special_tokens: `bos_token` and its like, visible to the template by name.

    Raises:
        ValueError: `source` is not a template, or takes too much to compile.
        OverloadedError: no process can be started.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        self._special_tokens = dict(special_tokens)
        self._source = source
        self._process = SandboxProcess(
            "localmoe.text.template_process",
            opening=source.encode(errors="replace"),
            timeout_s=_MAX_RENDER_S,
            max_answer_bytes=_MAX_ANSWER_BYTES,
        )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chat-template")
        self._num_waiting = 0
        complaint = _complaint(self._process.open())
        if complaint is not None:
            raise ValueError(f"the chat template is not valid: {complaint}")

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

    @classmethod
    def read(cls, path: Path, *, special_tokens: Mapping[str, str]) -> "ChatTemplate":
        """A file of somebody who wants it in place of the model's own.

        Raises:
            ConfigError: it cannot be read, or is no template.
        """
        try:
            return cls(read_text(path, max_bytes=MAX_TEMPLATE_BYTES), special_tokens=special_tokens)
        except (CheckpointError, ValueError) as error:
            said = str(error).removeprefix(f"{path}: ")
            raise ConfigError(
                f"chat_template is {str(path)!r}: {said}; name a file with a Jinja template"
            ) from error

    def close(self) -> None:
        """Render no more: the process ends, which else would when this is garbage. May wait."""
        self._thread.shutdown(wait=False)
        self._process.close()

    @property
    def source(self) -> str:
        """The Jinja text."""
        return self._source

    def mentions(self, name: str) -> bool:
        """Whether it has this word; what a template has no word for it makes no use of."""
        return name in self._source

    async def in_turn(self, work: Callable[..., T], *args: Any) -> T:
        """Do work that renders, in the thread that waits for this template's process: so that one that is slow
        keeps nobody waiting who has to do with another.

        Raises:
            OverloadedError: too many wait for it already.
            BackendUnavailableError: it is closed.
        """
        if self._num_waiting >= _MAX_WAITING:
            raise OverloadedError("too many conversations wait for this model's chat template; try again later")
        self._num_waiting += 1
        try:
            try:
                done = asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
            except RuntimeError as error:  # the thread takes no more
                raise BackendUnavailableError("the model is served no more") from error
            return await done
        finally:
            self._num_waiting -= 1

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt that asks for the next assistant message.

        A `developer` message is given to a template that has no word of that role as `system`, its older name. It may
        take a second; call it in a thread, such as that of `in_turn`.

        Args:
            messages: each with `role` and `content`.
            tools: functions in the words of the OpenAI API.
            documents: texts to answer from.
            arguments: further names.

        Raises:
            InvalidRequestError: the template refuses these messages, or takes too much time or memory over them.
            OverloadedError: its process cannot be started, or is busy for too long.
            BackendUnavailableError: it is closed.
        """
        if not self.mentions("developer"):
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in messages
            ]
        question = {
            **self._special_tokens,
            **(arguments or {}),
            "messages": messages,
            "tools": list(tools) or None,
            "documents": list(documents) or None,
        }
        try:
            answer = self._process.ask(json.dumps(question).encode())
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, or nested too deeply
            answer = REFUSED + str(error).encode()
        if (complaint := _complaint(answer)) is not None:
            raise InvalidRequestError(
                f"the model's chat template does not take these messages: {complaint}", param="messages"
            )
        assert answer is not None
        return answer[len(DONE) :].decode()


def _complaint(answer: bytes | None) -> str | None:
    """What the process has against something; None: nothing."""
    if answer is None:
        return _TOO_MUCH
    return None if answer.startswith(DONE) else answer[len(REFUSED) :].decode(errors="replace")
