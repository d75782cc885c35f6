"""The public keys of whoever issues tokens, as published for OpenID Connect (RFC 7517).

They are fetched when they are first needed, and again when they are old or one is asked for that is not among them,
as after the issuer has begun to sign with another. That is done once at a time and not more often than every ten
seconds, whatever tokens strangers make up. Keys that are known stay in use while the issuer cannot be reached.
"""

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import jwt

from localmoe.core.errors import IssuerUnavailableError

logger = logging.getLogger(__name__)

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
"""All have a public key, none has a secret: or whoever knows a public key could sign with it."""
_MAX_AGE_S = 3600.0
_MIN_INTERVAL_S = 10.0
_TIMEOUT_S = 5.0
_MAX_BYTES = 1 << 20


class PublicKeys:
    """The keys at one URL.

    Args:
        fetch: gets a document; raises OSError or ValueError.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        fetch: Callable[[str], Awaitable[bytes]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._fetch = fetch or fetch_document
        self._clock = clock
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fresh_until_s = 0.0
        self._next_fetch_s = float("-inf")
        self._is_failing = False
        self._fetching: asyncio.Task[None] | None = None

    async def find(self, key_id: str | None) -> jwt.PyJWK | None:
        """The key of this id; without an id, the only one there is. None: the issuer has none such.

        Raises:
            IssuerUnavailableError: that cannot be known now.
        """
        found = self._keys.get(key_id)
        if found is not None:
            if self._clock() >= self._fresh_until_s:
                self._begin_refresh()
            return found
        await self._refresh()
        if key_id not in self._keys and self._is_failing:
            raise IssuerUnavailableError("the keys that tokens are verified with cannot be fetched now")
        return self._keys.get(key_id)

    async def aclose(self) -> None:
        """Give up what is being fetched."""
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)

    async def _refresh(self) -> None:
        self._begin_refresh()
        if self._fetching is not None:
            # Others wait for it, too, when this request is cancelled.
            await asyncio.shield(self._fetching)

    def _begin_refresh(self) -> None:
        now_s = self._clock()
        if self._fetching is None and now_s >= self._next_fetch_s:
            self._next_fetch_s = now_s + _MIN_INTERVAL_S
            self._fetching = asyncio.create_task(self._replace())

    async def _replace(self) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                document = await self._fetch(self._url)
            self._keys = _usable_keys(document)
            self._fresh_until_s = self._clock() + _MAX_AGE_S
            self._is_failing = False
        except (OSError, ValueError) as error:
            self._is_failing = True
            logger.warning("cannot fetch the keys that tokens are verified with from %s: %s", self._url, error)
        finally:
            self._fetching = None


def _usable_keys(document: bytes) -> dict[str | None, jwt.PyJWK]:
    """By id. Raises ValueError."""
    try:
        listed = list(json.loads(document)["keys"])
    except (LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"it is no set of keys: {type(error).__name__}") from error
    usable = [key for one in listed if (key := _usable_key(one)) is not None]
    if not usable:
        raise ValueError(f"none of its keys is for signatures of a kind that is accepted: {', '.join(ALGORITHMS)}")
    keys: dict[str | None, jwt.PyJWK] = {key.key_id: key for key in usable if isinstance(key.key_id, str)}
    if len(usable) == 1:
        keys[None] = usable[0]
    return keys


def _usable_key(one: Any) -> jwt.PyJWK | None:
    """None for what is no key, or is for something else; others of the same set are not worse for it."""
    is_meant = isinstance(one, dict) and one.get("use") in (None, "sig") and one.get("alg") in (None, *ALGORITHMS)
    if not is_meant:
        return None
    try:
        key = jwt.PyJWK(one)
    except (jwt.PyJWTError, TypeError, ValueError, AttributeError):
        return None
    return key if key.algorithm_name in ALGORITHMS else None


async def fetch_document(url: str) -> bytes:
    """A small document from the web, whatever time that takes. Raises OSError or ValueError."""
    import aiohttp  # here: servers that take no such tokens start without it

    try:
        async with (
            aiohttp.ClientSession() as session,
            session.get(url, allow_redirects=False) as answer,
        ):
            if answer.status != 200:
                raise ValueError(f"the answer's status is {answer.status}")
            document = bytearray()
            async for piece in answer.content.iter_any():
                document += piece
                if len(document) > _MAX_BYTES:
                    raise ValueError(f"the document is larger than {_MAX_BYTES} bytes")
            return bytes(document)
    except aiohttp.ClientError as error:
        raise OSError(str(error) or type(error).__name__) from error
