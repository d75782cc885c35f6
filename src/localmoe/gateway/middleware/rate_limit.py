"""Keeps everybody within their limits."""

import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from localmoe.core.errors import RateLimitedError
from localmoe.gateway.errors import to_api_error
from localmoe.gateway.exchange import current_exchange
from localmoe.gateway.limits.limiter import Limiter, anthropic_headers

_ANTHROPIC = "/v1/messages"


class RateLimitMiddleware:
    """Counts requests, and says with each answer how many are left."""

    def __init__(self, app: ASGIApp, *, limiter: Limiter) -> None:
        self._app = app
        self._limiter = limiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = current_exchange()
        if exchange is None or not exchange.rule.is_counted:  # None: it is no HTTP request
            await self._app(scope, receive, send)
            return

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = await self._limiter.headers(exchange.principal)
                if exchange.rule.route.startswith(_ANTHROPIC):
                    headers |= anthropic_headers(headers, time.time())
                MutableHeaders(scope=message).update(headers)
            await send(message)

        try:
            exchange.ticket = await self._limiter.begin(exchange.principal, is_inner=exchange.is_inner)
        except RateLimitedError as error:
            await to_api_error(error).response()(scope, receive, send_with_limits)
            return
        try:
            await self._app(scope, receive, send_with_limits)
        finally:
            exchange.ticket.end()
