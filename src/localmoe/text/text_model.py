"""Everything textual about one served model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from localmoe.core.errors import CheckpointError, InvalidRequestError
from localmoe.core.serving import AnswerFormatName
from localmoe.formats.files import read_optional_json_object
from localmoe.text.answer_format import AnswerFormat, answer_format
from localmoe.text.chat_template import ChatTemplate
from localmoe.text.described_tools import with_calls_written, with_tools_described
from localmoe.text.fill_in_middle import FillInMiddle
from localmoe.text.generation_defaults import GenerationDefaults
from localmoe.text.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """Tokenizer, template and defaults as a model directory has them."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None for a model that was not made for chat."""
    answer_format: AnswerFormat
    """How it writes reasoning and tool calls."""
    defaults: GenerationDefaults
    fill_in_middle: FillInMiddle | None
    """None for a model that was not made for it."""
    vocab_size: int
    """Token ids that the model knows are below this; it may have rows that no token uses."""
    has_own_template: bool = True
    """Whether the chat template is the model's; engines elsewhere know no other."""

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        format_name: AnswerFormatName | None = None,
        template_path: Path | None = None,
    ) -> "TextModel":
        """Read the tokenizer's and generation's files of a model directory.

        Args:
            template_path: a chat template in place of the model's own.
            format_name: of how it writes tool calls; None: as its chat template shows.

        Raises:
            CheckpointError: a file is missing or damaged; the message begins with its path.
            ConfigError: there is no template at `template_path`.
        """
        tokenizer = Tokenizer.load(directory)
        config_path = directory / "config.json"
        vocab_size = read_optional_json_object(config_path).get("vocab_size", tokenizer.vocab_size)
        if type(vocab_size) is not int or vocab_size < 1:
            raise CheckpointError(f"{config_path}: vocab_size is {vocab_size!r}; it must be a positive integer")
        template = (
            ChatTemplate.load(directory, special_tokens=tokenizer.special_tokens)
            if template_path is None
            else ChatTemplate.read(template_path, special_tokens=tokenizer.special_tokens)
        )
        return cls(
            tokenizer=tokenizer,
            chat_template=template,
            answer_format=answer_format(template.source if template else None, format_name),
            defaults=GenerationDefaults.load(directory, tokenizer),
            fill_in_middle=FillInMiddle.find(tokenizer),
            vocab_size=vocab_size,
            has_own_template=template_path is None,
        )

    def close(self) -> None:
        """Let go of what does not end by itself; see `ChatTemplate.close`."""
        if self.chat_template is not None:
            self.chat_template.close()

    async def in_turn(self, work: Callable[..., T], *args: Any) -> T:
        """Do work that renders a chat, while nobody waits who wants something else; see `ChatTemplate.in_turn`."""
        return work(*args) if self.chat_template is None else await self.chat_template.in_turn(work, *args)

    def template_mentions(self, name: str) -> bool:
        """See `ChatTemplate.mentions`."""
        return self.chat_template is not None and self.chat_template.mentions(name)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] = (),
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt by the template, with its own beginning token; see `ChatTemplate.render`.

        A template that knows nothing of tools is told of them in the system message; one that knows nothing of calls
        sees them as text, as the model would write them.

        Raises:
            InvalidRequestError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template; send a prompt to /v1/completions instead",
                param="messages",
                code="chat_template_missing",
            )
        if not self.template_mentions("tool_calls"):
            messages = with_calls_written(messages, self.answer_format.syntax)
        if tools and not self.template_mentions("tools"):
            messages = with_tools_described(messages, tools, self.answer_format.syntax)
        if self.template_mentions("message.thinking"):
            messages = [_with_thinking(message) for message in messages]
        return self.chat_template.render(messages, tools=tools, documents=documents, arguments=arguments)


def _with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """What an assistant thought by the name that gpt-oss's template has for it. Beside calls that takes thoughts or
    content, and shows both as thoughts."""
    if "reasoning_content" not in message:
        return message
    renamed = {"thinking" if name == "reasoning_content" else name: value for name, value in message.items()}
    if not message.get("tool_calls"):
        return renamed
    thought = "\n\n".join(text for text in (renamed["thinking"], message.get("content")) if text)
    return {**renamed, "thinking": thought, "content": None}
