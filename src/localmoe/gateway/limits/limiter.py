"""How much everybody may ask for: requests and tokens per minute, and requests at a time.

Requests and tokens are counted in sliding windows of a minute, by `limits`: the last minute's count is the present
window's and of the one before as large a share as still lies within a minute. Tokens are charged when a request is
admitted: its prompt's, and as many as its principal's answers had lately; when it has ended, the account is put
right. So the requests of a burst count before they are answered, and what an answer took too many is owed.

With Redis several gateways count together. When it does not answer, each counts for itself, and asks it again a
second later: nobody waits for it for long, and nobody is let do anything that they may not.
"""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from limits.aio.storage import MemoryStorage, RedisStorage
from msgspec.structs import replace
from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from localmoe.core.current import Current
from localmoe.core.errors import RateLimitedError
from localmoe.core.identity import Principal, RateLimits
from localmoe.gateway.config import GatewayConfig

logger = logging.getLogger(__name__)

T = TypeVar("T")

WINDOW_S = 60
_MOMENT_S = 0.001
_ANY_LIMIT = 2**52
_REDIS_TIMEOUT_S = 0.25
_REDIS_RETRY_S = 1.0
_MAX_ACCOUNTS = 10_000
_LEARN = 0.2
"""How much the last answer counts for how long the next is expected to be."""


@dataclass(frozen=True)
class Window:
    """A count over the last minute."""

    previous: int
    previous_left_s: float
    """Until nothing of it counts any more."""
    current: int
    current_left_s: float
    """Likewise."""

    @property
    def used(self) -> int:
        """What counts now."""
        return max(0, math.floor(self.previous * self.previous_left_s / WINDOW_S + self.current))

    @property
    def reset_s(self) -> float:
        """Until nothing counts any more."""
        return self.current_left_s if self.current > 0 else self.previous_left_s if self.previous > 0 else 0.0

    def free_after_s(self, limit: int, amount: int) -> float:
        """Until there is room for this amount, if nothing else comes."""
        room = limit - amount + 1  # which `used` must be below, rounded down as it is
        if self.current < room:  # when enough of the previous window has gone by
            if self.previous * self.previous_left_s / WINDOW_S + self.current < room:
                return 0.0
            return self.previous_left_s - (room - self.current) * WINDOW_S / self.previous + _MOMENT_S
        # The present window is the previous one by then, and enough of it must have gone by.
        return self.current_left_s - room * WINDOW_S / self.current + _MOMENT_S


class _Counters:
    """Windows by name, in Redis or, where there is none or it does not answer, in this process."""

    def __init__(self, redis_url: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = MemoryStorage()
        self._redis: RedisStorage | None = None
        self._pool: ConnectionPool | None = None
        if redis_url is not None:
            self._pool = _connections(redis_url)
            self._redis = RedisStorage(
                f"async+{redis_url}",
                implementation="redispy",
                key_prefix="localmoe:limits",
                connection_pool=self._pool,  # type: ignore[arg-type]  # passed on to redis-py as it is
            )
        self._clock = clock
        self._ask_redis_at_s = 0.0
        self._is_degraded = False

    async def take(self, name: str, amount: int, *, limit: int) -> bool:
        """Count an amount, which may be negative, unless that would be over the limit."""
        return await self._ask(lambda at: at.acquire_sliding_window_entry(name, limit, WINDOW_S, amount))

    async def window(self, name: str) -> Window:
        """As it is now."""
        return Window(*await self._ask(lambda at: at.get_sliding_window(name, WINDOW_S)))

    async def _ask(self, question: Callable[[MemoryStorage | RedisStorage], Awaitable[T]]) -> T:
        now_s = self._clock()
        if self._redis is None or now_s < self._ask_redis_at_s:
            return await question(self._memory)
        if self._is_degraded:
            self._ask_redis_at_s = now_s + _REDIS_RETRY_S  # one tries, and others do not wait for that
        try:
            async with asyncio.timeout(_REDIS_TIMEOUT_S):
                answer = await question(self._redis)
        except (RedisError, OSError) as error:  # a timeout is an OSError
            self._ask_redis_at_s = self._clock() + _REDIS_RETRY_S
            if not self._is_degraded:
                logger.warning("limits: Redis does not answer (%s); each gateway counts for itself", error)
            self._is_degraded = True
            return await question(self._memory)
        if self._is_degraded:
            logger.warning("limits: Redis answers again; gateways count together")
        self._is_degraded, self._ask_redis_at_s = False, 0.0
        return answer

    async def aclose(self) -> None:
        """Close connections."""
        if self._pool is not None:
            await self._pool.aclose()


def _connections(url: str) -> ConnectionPool:
    return ConnectionPool.from_url(
        url,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
        retry=Retry(NoBackoff(), 1),  # a connection may have been lost since it was used last
    )


@dataclass(slots=True)
class _Account:
    """What is not counted in windows."""

    num_running: int = 0
    usual_answer_tokens: float = 0.0
    """Of lately."""


class Limiter:
    """Counts for all principals.

    Args:
        config: in effect now; of a new one all but `redis_url` is taken up.
    """

    def __init__(self, config: Current[GatewayConfig]) -> None:
        self._config = config
        self._counters = _Counters(config.now.limits.redis_url)
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._settling: set[asyncio.Task[bool]] = set()

    async def begin(self, principal: Principal, *, is_inner: bool = False) -> "Ticket":
        """Admit a request, which is to be ended.

        Args:
            is_inner: it is one of our own in their name, of which only the tokens are counted: whoever sends it does
                no more than so many at a time.

        Raises:
            RateLimitedError: there are too many already.
        """
        limits = self._config.now.limits.of(principal.role, principal.limits)
        if is_inner:
            limits = replace(limits, requests_per_minute=None, concurrent_requests=None)
        account = self._account(principal.id)
        most = limits.concurrent_requests
        if most is not None and account.num_running >= most:
            message = f"{account.num_running} of your requests are being answered, as many as may be at a time"
            raise RateLimitedError(message, kind="concurrent_requests", retry_after_s=1.0)
        account.num_running += 1
        ticket = Ticket(self, principal.id, limits, account)
        try:
            await ticket.take_request()
        except BaseException:
            ticket.end()
            raise
        return ticket

    async def headers(self, principal: Principal) -> dict[str, str]:
        """What somebody is told of their limits with each answer."""
        limits = self._config.now.limits.of(principal.role, principal.limits)
        headers: dict[str, str] = {}
        for kind, limit in (("requests", limits.requests_per_minute), ("tokens", limits.tokens_per_minute)):
            if limit is not None:
                window = await self._counters.window(f"{kind}:{principal.id}")
                headers |= {
                    f"x-ratelimit-limit-{kind}": str(limit),
                    f"x-ratelimit-remaining-{kind}": str(max(0, limit - window.used)),
                    f"x-ratelimit-reset-{kind}": f"{math.ceil(window.reset_s)}s",
                }
        return headers

    async def take(self, kind: str, principal_id: str, amount: int, limit: int) -> None:
        """Count an amount. Raises RateLimitedError."""
        name = f"{kind}:{principal_id}"
        if await self._counters.take(name, amount, limit=limit):
            return
        window = await self._counters.window(name)
        wait_s = window.free_after_s(limit, amount)
        message = (
            f"you may ask for {limit} {kind} a minute; {window.used} were in the last one, and this would be "
            f"{amount} more; try again in {math.ceil(wait_s)} s"
        )
        raise RateLimitedError(message, kind=kind, retry_after_s=wait_s)

    def settle(self, principal_id: str, amount: int) -> None:
        """Count tokens, or take them back, whatever the limit; does not wait for it."""
        if amount:
            counted = self._counters.take(f"tokens:{principal_id}", amount, limit=_ANY_LIMIT)
            task = asyncio.create_task(counted)
            self._settling.add(task)
            task.add_done_callback(self._settling.discard)

    async def drain(self) -> None:
        """Wait until everything is counted."""
        await asyncio.gather(*self._settling)

    async def aclose(self) -> None:
        """Count what is to be counted, and close connections."""
        await self.drain()
        await self._counters.aclose()

    def _account(self, principal_id: str) -> _Account:
        account = self._accounts.setdefault(principal_id, _Account())
        self._accounts.move_to_end(principal_id)
        if len(self._accounts) > _MAX_ACCOUNTS:
            idle = next((one for one, account in self._accounts.items() if not account.num_running), None)
            if idle is not None:
                del self._accounts[idle]
        return account


class Ticket:
    """One request's account."""

    def __init__(self, limiter: Limiter, principal_id: str, limits: RateLimits, account: _Account) -> None:
        self._limiter = limiter
        self._principal_id = principal_id
        self._limits = limits
        self._account = account
        self._num_holders = 1

    async def take_request(self) -> None:
        """Count the request itself. Raises RateLimitedError."""
        limit = self._limits.requests_per_minute
        if limit is not None:
            await self._limiter.take("requests", self._principal_id, 1, limit)

    async def charge(self, prompt_tokens: int, most_answer_tokens: int) -> int:
        """Count what an answer will take, as far as that can be told; returns what was counted.

        Raises:
            RateLimitedError: there were too many tokens lately.
        """
        limit = self._limits.tokens_per_minute
        if limit is None:
            return 0
        if prompt_tokens > limit:
            message = f"the prompt has {prompt_tokens} tokens, and you may ask for {limit} a minute: it never fits"
            raise RateLimitedError(message, kind="tokens", retry_after_s=None)
        answer_tokens = round(min(most_answer_tokens, self._account.usual_answer_tokens))
        charged = min(limit, prompt_tokens + answer_tokens)
        await self._limiter.take("tokens", self._principal_id, charged, limit)
        return charged

    def settle(self, charged: int, *, prompt_tokens: int, answer_tokens: int) -> None:
        """Put right what was charged, now that it is known."""
        if self._limits.tokens_per_minute is None:
            return
        account = self._account
        if answer_tokens:  # an embedding has none, and says nothing of answers
            account.usual_answer_tokens += _LEARN * (answer_tokens - account.usual_answer_tokens)
        self._limiter.settle(self._principal_id, prompt_tokens + answer_tokens - charged)

    def hold(self) -> None:
        """Work goes on when the request has been answered, which is to be said with one `end` more."""
        self._num_holders += 1

    def end(self) -> None:
        """The request has been answered."""
        self._num_holders -= 1
        if self._num_holders == 0:
            self._account.num_running -= 1


def anthropic_headers(headers: Mapping[str, str], now_s: float) -> dict[str, str]:
    """The same in the words of Anthropic's API, with times in place of spans."""
    told: dict[str, str] = {}
    for name, value in headers.items():
        what, kind = name.removeprefix("x-ratelimit-").split("-")
        if what == "reset":
            at = time.gmtime(now_s + float(value.removesuffix("s")))
            value = time.strftime("%Y-%m-%dT%H:%M:%SZ", at)
        told[f"anthropic-ratelimit-{kind}-{what}"] = value
    return told
