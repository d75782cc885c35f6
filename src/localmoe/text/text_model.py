"""Everything textual about one served model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localmoe.core.errors import CheckpointError, InvalidRequestError
from localmoe.formats.files import read_optional_json_object
from localmoe.text.chat_template import ChatTemplate
from localmoe.text.generation_defaults import GenerationDefaults
from localmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """Tokenizer, template and defaults as a model directory has them."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    """None for a model that was not made for chat."""
    defaults: GenerationDefaults
    vocab_size: int
    """Token ids that the model knows are below this; it may have rows that no token uses."""

    @classmethod
    def load(cls, directory: Path) -> "TextModel":
        """Read the tokenizer's and generation's files of a model directory.

        Raises:
            CheckpointError: a file is missing or damaged; the message begins with its path.
        """
        tokenizer = Tokenizer.load(directory)
        config_path = directory / "config.json"
        vocab_size = read_optional_json_object(config_path).get("vocab_size", tokenizer.vocab_size)
        if type(vocab_size) is not int or vocab_size < 1:
            raise CheckpointError(f"{config_path}: vocab_size is {vocab_size!r}; it must be a positive integer")
        return cls(
            tokenizer=tokenizer,
            chat_template=ChatTemplate.load(directory, special_tokens=tokenizer.special_tokens),
            defaults=GenerationDefaults.load(directory, tokenizer),
            vocab_size=vocab_size,
        )

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt by the template, with its own beginning token; see `ChatTemplate.render`.

        Raises:
            InvalidRequestError: the model has no template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise InvalidRequestError(
                "the model has no chat template; send a prompt to /v1/completions instead",
                param="messages",
                code="chat_template_missing",
            )
        return self.chat_template.render(messages)
