"""Prompts of one principal apart from those of others.

Engines keep keys and values of prompts for the next one that begins alike, and tell how much of it they had. Whoever
sends guesses would learn from that, or from the time that it takes, what others have asked (vLLM CVE-2025-46570).
"""

import hashlib
from collections.abc import AsyncGenerator, Callable

import msgspec

from localmoe.core.protocols import Generator
from localmoe.core.request import Request, TokenChunk


class ScopedGenerator:
    """A model whose engines use again what they have computed for the same scope only.

    Args:
        scope: of whoever asks now.
    """

    def __init__(self, inner: Generator, *, scope: Callable[[], str]) -> None:
        self._inner = inner
        self._scope = scope

    @property
    def is_ready(self) -> bool:
        """See `Generator.is_ready`."""
        return self._inner.is_ready

    def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """See `Generator.generate`."""
        # A digest, since engines may be elsewhere, and who asks is nothing to them.
        cache_scope = hashlib.sha256(self._scope().encode()).hexdigest()
        return self._inner.generate(msgspec.structs.replace(request, cache_scope=cache_scope))
