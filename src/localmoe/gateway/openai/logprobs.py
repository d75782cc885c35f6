"""Log-probabilities in the shapes of the two OpenAI APIs.

A request may ask for a million of them. So they are made ready for the wire as they come, which leaves little to do
at an answer's end, and how a token is written is found out once.
"""

from collections.abc import Iterable, Sequence

import msgspec

from localmoe.core.request import TokenLogprob
from localmoe.gateway.answering.generation import ScoredToken
from localmoe.gateway.context import ServedModel
from localmoe.text.detokenizer import IncrementalDetokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say."""

_encoder = msgspec.json.Encoder()


class _Top(msgspec.Struct, gc=False):
    """A `TopLogprob`."""

    token: str
    logprob: float
    bytes: msgspec.Raw


class _Entry(_Top, gc=False):
    """A `TokenLogprobEntry`."""

    top_logprobs: list[_Top]


class CompletionScores(msgspec.Struct, frozen=True):
    """A `CompletionLogprobs`, to which more can be added."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]

    def add(self, more: "CompletionScores") -> None:
        """Put it after what is there."""
        self.tokens.extend(more.tokens)
        self.token_logprobs.extend(more.token_logprobs)
        self.top_logprobs.extend(more.top_logprobs)
        self.text_offset.extend(more.text_offset)


class Scorer:
    """Shows the log-probabilities of one answer.

    Raises:
        InvalidRequestError: (every method) the model's tokenizer is not here.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._shown: dict[int, tuple[str, msgspec.Raw]] = {}
        """By token id: its text and, as JSON, its bytes."""
        self._written: dict[int, str] = {}
        """By token id, as completions have it."""

    def entries(self, scored: Iterable[ScoredToken]) -> list[msgspec.Raw]:
        """A `TokenLogprobEntry` for each token, as JSON."""
        return [self._entry(item.logprob) for item in scored]

    def completion_scores(self, scored: Sequence[ScoredToken], *, base_offset: int) -> CompletionScores:
        """Lists over a completion's tokens; `base_offset` is where the answer begins in the choice's text."""
        return CompletionScores(
            tokens=[self._write(item.logprob.token_id) for item in scored],
            token_logprobs=[_finite(item.logprob.logprob) for item in scored],
            top_logprobs=[self._alternatives(item.logprob) for item in scored],
            text_offset=[base_offset + item.text_offset for item in scored],
        )

    def prompt_scores(
        self, prompt_ids: Sequence[int], scored: Sequence[TokenLogprob], *, num_prefix_tokens: int
    ) -> CompletionScores:
        """Lists over an echoed prompt.

        Args:
            scored: of the prompt's tokens but the first.
            num_prefix_tokens: tokens at the beginning that the tokenizer had added and the text does not show.
        """
        tokenizer = self._model.local_text.tokenizer
        detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False, at_start=True)
        offsets = []
        num_chars = 0
        for place, token_id in enumerate(prompt_ids):
            offsets.append(num_chars)
            if place >= num_prefix_tokens:
                num_chars += len(detokenizer.push(token_id))
        return CompletionScores(
            tokens=[self._write(token_id) for token_id in prompt_ids],
            token_logprobs=[None, *(_finite(item.logprob) for item in scored)],
            top_logprobs=[None, *(self._alternatives(item) for item in scored)],
            text_offset=offsets,
        )

    def _entry(self, item: TokenLogprob) -> msgspec.Raw:
        text, raw = self._show(item.token_id)
        top = [
            _Top(token, _finite(logprob), its_bytes)
            for token_id, logprob in item.top
            for token, its_bytes in (self._show(token_id),)
        ]
        return msgspec.Raw(_encoder.encode(_Entry(text, _finite(item.logprob), raw, top)))

    def _show(self, token_id: int) -> tuple[str, msgspec.Raw]:
        shown = self._shown.get(token_id)
        if shown is None:
            tokenizer = self._model.local_text.tokenizer
            raw = msgspec.Raw(_encoder.encode(list(tokenizer.token_bytes(token_id))))
            shown = self._shown[token_id] = tokenizer.token_text(token_id), raw
        return shown

    def _alternatives(self, item: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the token itself even if it is none of them. Of equal texts the likelier
        stays."""
        found: dict[str, float] = {}
        for token_id, logprob in item.top:
            found.setdefault(self._write(token_id), _finite(logprob))
        found.setdefault(self._write(item.token_id), _finite(item.logprob))
        return found

    def _write(self, token_id: int) -> str:
        written = self._written.get(token_id)
        if written is None:
            raw = self._model.local_text.tokenizer.token_bytes(token_id)
            try:
                written = raw.decode()
            except UnicodeDecodeError:
                written = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._written[token_id] = written
        return written


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
