"""Which engine has computed the beginning of a prompt before, and so may still hold its keys and values."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import xxhash

_BLOCK_TOKENS = 64
_MAX_BLOCKS = 20_000


class PrefixMap:
    """Remembers blocks of prompts by engine, the latest 20,000."""

    def __init__(self) -> None:
        self._engines: OrderedDict[bytes, set[str]] = OrderedDict()

    def record(self, prompt_ids: Sequence[int], engine: str, *, scope: str = "") -> None:
        """An engine has computed this prompt, for use within the scope."""
        # The beginning last, so that it is forgotten last: without it, nothing after it is found.
        for name in reversed(list(_block_names(prompt_ids, scope))):
            self._engines.setdefault(name, set()).add(engine)
            self._engines.move_to_end(name)
        while len(self._engines) > _MAX_BLOCKS:
            self._engines.popitem(last=False)

    def forget(self, engine: str) -> None:
        """An engine was restarted: it has nothing any more."""
        for engines in self._engines.values():
            engines.discard(engine)

    def known_tokens(self, prompt_ids: Sequence[int], *, scope: str = "") -> dict[str, int]:
        """By engine, how many of the prompt's first tokens it has computed before."""
        known: dict[str, int] = {}
        for index, name in enumerate(_block_names(prompt_ids, scope)):
            engines = self._engines.get(name)
            if not engines:
                break
            for engine in engines:
                if known.get(engine, 0) == index * _BLOCK_TOKENS:
                    known[engine] = (index + 1) * _BLOCK_TOKENS
        return known


def _block_names(prompt_ids: Sequence[int], scope: str) -> Iterator[bytes]:
    """A name for each whole block and all before it."""
    digest = xxhash.xxh3_128(scope.encode())
    for start in range(0, len(prompt_ids) - _BLOCK_TOKENS + 1, _BLOCK_TOKENS):
        digest.update(array("I", prompt_ids[start : start + _BLOCK_TOKENS]).tobytes())
        yield digest.digest()
