"""The level in Redis, which several gateways may share.

Requests never wait for it longer than for a moment: after one failure it is left alone until a task of our own, not
somebody's request, has found it well again.
"""

import asyncio
import logging
import time

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from localmoe.gateway.cache.sealed import SEAL_BYTES, seal, unseal

logger = logging.getLogger(__name__)

_PREFIX = b"localmoe:cache:"
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0
_PROBE_TIMEOUT_S = 5.0
_NUM_CONNECTIONS = 16


class RedisLevel:
    """Keeps entries in Redis.

    Args:
        timeout_s: of anything that a request waits for.
        max_entry_bytes: larger ones are not read.
    """

    name = "redis"

    def __init__(self, url: str, *, ttl_s: float, timeout_s: float, max_entry_bytes: int) -> None:
        pool = BlockingConnectionPool.from_url(  # when all connections are in use, that is no failure
            url,
            max_connections=_NUM_CONNECTIONS,
            timeout=_PROBE_TIMEOUT_S,
            socket_timeout=_PROBE_TIMEOUT_S,
            socket_connect_timeout=_PROBE_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # a connection may have been lost since it was used last
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._ttl_s = ttl_s
        self._timeout_s = timeout_s
        self._max_bytes = max_entry_bytes + SEAL_BYTES
        self._probing: asyncio.Task[None] | None = None
        self.is_well = False

    async def start(self) -> None:
        """Begin to look for it."""
        self._probing = asyncio.create_task(self._probe())

    async def stop(self) -> None:
        """Let go of it."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.gather(self._probing, return_exceptions=True)
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await self._redis.aclose()
        except Exception as error:
            logger.debug("the connections to Redis were not closed: %s", error)

    async def get(self, key: bytes) -> bytes | None:
        """What is kept under the key; None also where Redis cannot say."""
        if not self.is_well:
            return None
        try:
            async with asyncio.timeout(self._timeout_s):
                sealed = await self._redis.getrange(_PREFIX + key, 0, self._max_bytes)
                assert isinstance(sealed, bytes)
        except ResponseError:  # it is well, and says no
            return None
        except Exception as error:  # whatever it is, it is no reason for a request to fail
            self._failed(error)
            return None
        return unseal(sealed, now_s=time.time(), ttl_s=self._ttl_s)

    async def put(self, key: bytes, data: bytes) -> None:
        """Keep it, if Redis can."""
        if not self.is_well:
            return
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):  # nobody waits
                await self._redis.set(_PREFIX + key, seal(data, time.time()), px=int(self._ttl_s * 1000))
        except ResponseError as error:  # most likely it is full
            logger.debug("Redis keeps nothing: %s", error)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if self.is_well:
            self.is_well = False
            logger.warning("the cache does without Redis: %s", str(error) or type(error).__name__)
            self._probing = asyncio.create_task(self._probe())

    async def _probe(self) -> None:
        """Find out when it is well."""
        pause_s = _FIRST_PAUSE_S
        is_first = True
        while True:
            try:
                async with asyncio.timeout(_PROBE_TIMEOUT_S):
                    await self._redis.ping()
                self.is_well = True
                logger.info("the cache uses Redis")
                return
            except Exception as error:
                if is_first:
                    logger.warning("the cache waits for Redis: %s", str(error) or type(error).__name__)
                is_first = False
            await asyncio.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)
