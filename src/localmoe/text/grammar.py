"""Grammars compiled for one model's tokens, and answers that follow them.

A grammar is matched against the bytes of tokens, which are those that the detokenizer puts together, so what a model
generates decodes to a text of the grammar. Where a text may end, the request's stop tokens may come; where it must,
the answer is complete. llguidance says both with an end token. It is given one more token than the model has for
that, so that stop tokens are the request's own business.
"""

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from localmoe.core.errors import EngineFaultError, InvalidRequestError
from localmoe.core.request import Grammar
from localmoe.text.grammar_source import compiled, presentable
from localmoe.text.tokenizer import Tokenizer

_MAX_COMPILED = 16
"""Grammars kept for further requests with them; most take less than a megabyte."""


class GrammarCompiler:
    """Compiles grammars for one model. May be called from any thread; compiling lets others run.

    Args:
        tokenizer: the model's.
        vocab_size: of the model, which may have ids that no token has.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._end_id = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)))
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def matcher(
        self, grammar: Grammar, *, stop_token_ids: Sequence[int] = (), resumed_ids: Sequence[int] = ()
    ) -> "GrammarMatcher":
        """Follows one answer.

        Args:
            stop_token_ids: may come where the answer may end.
            resumed_ids: that the answer begins with.

        Raises:
            InvalidRequestError: the grammar cannot be compiled.
            EngineFaultError: the answer's beginning is not of the grammar.
        """
        matcher = GrammarMatcher(self._compile(grammar), self._end_id, stop_token_ids)
        matcher.take(resumed_ids)
        return matcher

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """At the beginning of an answer. Copies share what they find out about their grammar, under a lock."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found.deep_copy()
        made = compiled(grammar, self._tokenizer)
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
            return made.deep_copy()


class GrammarMatcher:
    """See `core.protocols.TokenMatcher`. For one thread at a time."""

    def __init__(self, matcher: LLMatcher, end_id: int, stop_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_byte, self._end_bit = end_id >> 3, 1 << (end_id & 7)
        self._stop_token_ids = frozenset(stop_token_ids)

    @property
    def is_complete(self) -> bool:
        """See `TokenMatcher.is_complete`."""
        return self._matcher.is_stopped()

    def take(self, token_ids: Sequence[int]) -> None:
        """See `TokenMatcher.take`."""
        if not self._matcher.consume_tokens(list(token_ids)):
            raise self._has_left()

    def count_viable(self, draft_ids: Sequence[int]) -> int:
        """See `TokenMatcher.count_viable`."""
        num_taken = count = self._matcher.try_consume_tokens(list(draft_ids))
        if count and self._matcher.is_stopped():
            count -= 1
        self._matcher.rollback(num_taken)
        return count

    def allowed(self, draft_ids: Sequence[int]) -> list[bytes]:
        """See `TokenMatcher.allowed`."""
        masks = [self._mask()]
        for draft_id in draft_ids:
            self.take([draft_id])
            masks.append(self._mask())
        self._matcher.rollback(len(draft_ids))
        return masks

    def _mask(self) -> bytes:
        if self._matcher.is_error():
            raise self._has_left()
        mask = bytearray(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            why = presentable(self._matcher.get_error())
            raise InvalidRequestError(f"the answer's grammar cannot be followed to an end: {why}")
        if mask[self._end_byte] & self._end_bit:
            mask[self._end_byte] ^= self._end_bit
            for token_id in self._stop_token_ids:
                mask[token_id >> 3] |= 1 << (token_id & 7)
        if mask.count(0) == len(mask):
            raise InvalidRequestError("the answer's grammar asks for what no token of the model is")
        return bytes(mask)

    def _has_left(self) -> EngineFaultError:
        return EngineFaultError(f"the answer is not of its grammar: {presentable(self._matcher.get_error())}")


class _Vocabulary:
    """A model's tokens as llguidance asks for them, and one for the end."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = [*map(tokenizer.token_bytes, range(vocab_size)), b""]
        self.special_token_ids = [i for i in range(vocab_size) if tokenizer.is_special(i)]
        self.eos_token_id = vocab_size
        self.bos_token_id = None

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
