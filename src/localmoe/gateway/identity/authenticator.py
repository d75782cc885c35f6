"""Finds out who sends a request, by what its headers show.

Whose credentials are is remembered for a few seconds, by the SHA-256 of the whole: so the store is not asked for
every request, a key that is revoked opens nothing some seconds later, and no two tokens are taken for each other.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from localmoe.core.errors import AuthenticationError
from localmoe.core.identity import Principal
from localmoe.core.keys import KeyStore
from localmoe.gateway.identity.keys import digest_of, is_key, is_of
from localmoe.gateway.identity.tokens import TokenVerifier

logger = logging.getLogger(__name__)

REMEMBERED_S = 5.0
"""How long after it was revoked a key may still open something."""
_MAX_REMEMBERED = 4096
_TOUCH_INTERVAL_S = 60.0
_MAX_CREDENTIAL_CHARS = 16384
_HOW = "send an API key or a token as `Authorization: Bearer …` or `x-api-key: …`"

RawHeaders = Sequence[tuple[bytes, bytes]]
"""As ASGI has them: names in lower case."""


class Identity(Protocol):
    """Knows people."""

    async def identify(self, headers: RawHeaders) -> Principal:
        """Whoever sends a request of these headers.

        Raises:
            AuthenticationError: they do not say, or what they say is not true.
            PermissionDeniedError: they may do nothing here, or nobody has said what.
            StorageError, IssuerUnavailableError: that cannot be found out now.
        """
        ...


@dataclass(frozen=True)
class _Remembered:
    principal: Principal
    key_id: str | None
    """None: of a token."""
    until_s: float


class Authenticator:
    """Asks everybody for an API key or a token.

    Args:
        tokens: None: only keys are taken.
        clock: Unix time.
    """

    def __init__(
        self, keys: KeyStore, tokens: TokenVerifier | None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._keys = keys
        self._tokens = tokens
        self._clock = clock
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._used_s: dict[str, float] = {}
        self._next_touch_s = 0.0
        self._touching: asyncio.Task[None] | None = None

    async def identify(self, headers: RawHeaders) -> Principal:
        """See `Identity`."""
        credential = _credential(headers)
        digest, now_s = digest_of(credential), self._clock()
        found = self._remembered.get(digest)
        if found is None or now_s >= found.until_s:
            found = await self._look_up(credential, digest, now_s)
            self._remember(digest, found)
        if found.key_id is not None:
            self._touch(found.key_id, now_s)
        return found.principal

    async def aclose(self) -> None:
        """Record what has not been yet."""
        if self._touching is not None:
            await self._touching
        if self._used_s:
            await self._write_touches()

    async def _look_up(self, credential: str, digest: bytes, now_s: float) -> _Remembered:
        until_s = now_s + REMEMBERED_S
        if is_key(credential):
            record = await self._keys.find(digest)
            if record is None or not is_of(credential, record):
                raise AuthenticationError("the API key is not known here")
            if not record.is_valid(now_s):
                is_revoked = record.revoked_s is not None and now_s >= record.revoked_s
                raise AuthenticationError(f"the API key {'was revoked' if is_revoked else 'has expired'}")
            ends_s = [end_s for end_s in (record.expires_s, record.revoked_s) if end_s is not None]
            return _Remembered(record.principal, record.id, min([until_s, *ends_s]))
        if self._tokens is not None and credential.count(".") == 2:
            principal, token_until_s = await self._tokens.verify(credential)
            return _Remembered(principal, None, min(until_s, token_until_s))
        raise AuthenticationError("the API key is not one of this server's")

    def _remember(self, digest: bytes, found: _Remembered) -> None:
        self._remembered[digest] = found
        self._remembered.move_to_end(digest)
        if len(self._remembered) > _MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def _touch(self, key_id: str, now_s: float) -> None:
        """Take note of a key's use; all of them are written now and then."""
        self._used_s[key_id] = now_s
        if now_s >= self._next_touch_s and self._touching is None:
            self._next_touch_s = now_s + _TOUCH_INTERVAL_S
            self._touching = asyncio.create_task(self._write_touches())

    async def _write_touches(self) -> None:
        used_s, self._used_s = self._used_s, {}
        try:
            await self._keys.touch(used_s)
        except Exception:  # whatever it is, requests are not refused for it
            logger.exception("cannot record when API keys were used")
        finally:
            self._touching = None


def _credential(headers: RawHeaders) -> str:
    """The one that these headers show. Raises AuthenticationError."""
    found = set()
    for name, value in headers:
        if name == b"x-api-key":
            found.add(value.strip())
        elif name == b"authorization":
            scheme, _, shown = value.strip().partition(b" ")
            if scheme.lower() != b"bearer":
                raise AuthenticationError(f"the scheme of `Authorization` must be Bearer; {_HOW}")
            found.add(shown.strip())
    found.discard(b"")
    if not found:
        raise AuthenticationError(f"you did not say who you are; {_HOW}")
    if len(found) > 1:
        raise AuthenticationError(f"there are several different credentials; {_HOW}, once")
    credential = found.pop().decode("latin-1")
    if len(credential) > _MAX_CREDENTIAL_CHARS:
        raise AuthenticationError(f"the credentials are longer than {_MAX_CREDENTIAL_CHARS} characters")
    return credential
