"""Token ids to text as they come."""

import codecs
from collections.abc import Container

from localmoe.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns one sequence into text token by token; a character split over tokens waits for its last byte.

    The pieces put together equal `Tokenizer.decode` of the whole sequence.

    Args:
        tokenizer: gives each token's bytes.
        skip_special_tokens: leave special tokens out.
        shown_token_ids: but these.
        at_start: the sequence is a text of its own, so that spaces which the encoder puts before a text are taken
            off. False for an answer, which continues its prompt.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown_token_ids: Container[int] = (),
        at_start: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._shown_token_ids = shown_token_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaces_to_strip = tokenizer.num_leading_spaces if at_start else 0

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often none."""
        if (
            self._skip_special_tokens
            and self._tokenizer.is_special(token_id)
            and token_id not in self._shown_token_ids
        ):
            return ""
        return self._strip(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        """What an unfinished character at the end decodes to: U+FFFD, or nothing."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._spaces_to_strip and text:
            if text[0] != " ":
                self._spaces_to_strip = 0
                break
            text = text[1:]
            self._spaces_to_strip -= 1
        return text
