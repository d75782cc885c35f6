"""Prompts for text between a prefix and a suffix, in the tokens that a model was trained with.

Bavarian et al., 2022, "Efficient Training of Language Models to Fill in the Middle". Models write the three parts in
orders and with tokens of their own; a model without such tokens was not trained for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from localmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class _Style:
    """How one family of models writes it, by the spelling of its tokens."""

    prefix: str
    suffix: str
    middle: str | None
    """Put where the answer begins; None: it begins after the prefix, which is last then."""
    ends: tuple[str, ...] = ()
    """An answer ends at any of these, too."""
    file: str | None = None
    """Put before a file's name."""


_STYLES = (
    # Qwen2.5-Coder and Qwen3-Coder, CodeGemma
    _Style(
        prefix="<|fim_prefix|>",
        suffix="<|fim_suffix|>",
        middle="<|fim_middle|>",
        ends=("<|endoftext|>", "<|fim_pad|>", "<|file_sep|>", "<|file_separator|>", "<|repo_name|>"),
        file="<|file_sep|>",
    ),
    # StarCoder, SantaCoder, Granite
    _Style(
        prefix="<fim_prefix>",
        suffix="<fim_suffix>",
        middle="<fim_middle>",
        ends=("<|endoftext|>", "<fim_pad>", "<file_sep>", "<repo_name>"),
        file="<file_sep>",
    ),
    # DeepSeek-Coder: the hole is where the suffix begins, its end where the answer does
    _Style(prefix="<｜fim▁begin｜>", suffix="<｜fim▁hole｜>", middle="<｜fim▁end｜>"),
    # Code Llama
    _Style(prefix="▁<PRE>", suffix="▁<SUF>", middle="▁<MID>", ends=("▁<EOT>",)),
    # Codestral
    _Style(prefix="[PREFIX]", suffix="[SUFFIX]", middle=None),
    # GLM-4
    _Style(prefix="<|code_prefix|>", suffix="<|code_suffix|>", middle="<|code_middle|>"),
)


@dataclass(frozen=True, kw_only=True)
class OtherFile:
    """A file that helps to understand the one in question."""

    name: str
    text: str


class FillInMiddle:
    """Makes such prompts for one model. Found by `find`."""

    def __init__(self, tokenizer: Tokenizer, style: _Style) -> None:
        self._tokenizer = tokenizer
        self._style = style
        ends = (tokenizer.token_id(token) for token in style.ends)
        self.stop_token_ids: tuple[int, ...] = tuple(token_id for token_id in ends if token_id is not None)
        """The answer ends at these, beside the model's own."""

    @classmethod
    def find(cls, tokenizer: Tokenizer) -> "FillInMiddle | None":
        """None for a model that was not trained for it."""
        for style in _STYLES:
            needed = [token for token in (style.prefix, style.suffix, style.middle) if token is not None]
            if all(tokenizer.token_id(token) is not None for token in needed):
                return cls(tokenizer, style)
        return None

    @property
    def takes_files(self) -> bool:
        """Whether the model knows of other files."""
        return self._style.file is not None and self._tokenizer.token_id(self._style.file) is not None

    def prompt_ids(self, prefix: str, suffix: str, others: Sequence[OtherFile] = ()) -> list[int]:
        """Token ids of a prompt, with the model's beginning token where it has one.

        Args:
            others: only for a model that takes files.
        """
        ids = self._tokenizer.encode("", add_special_tokens=True)[: self._tokenizer.num_prefix_tokens]
        for other in others:
            assert self._style.file is not None
            ids += [*self._mark(self._style.file), *self._encode(f"{other.name}\n{other.text}\n")]
        before = [*self._mark(self._style.prefix), *self._encode(prefix)]
        after = [*self._mark(self._style.suffix), *self._encode(suffix)]
        if self._style.middle is None:
            return [*ids, *after, *before]
        return [*ids, *before, *after, *self._mark(self._style.middle)]

    def _mark(self, token: str) -> list[int]:
        token_id = self._tokenizer.token_id(token)
        assert token_id is not None, "looked for when it was found"
        return [token_id]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []
