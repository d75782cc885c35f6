"""Stands in for whatever crashes."""

import logging

from starlette.types import ASGIApp, Receive, Scope, Send

from localmoe.gateway.errors import INTERNAL_ERROR
from localmoe.gateway.exchange import current_exchange

logger = logging.getLogger(__name__)


class CrashMiddleware:
    """Makes every crash a plain 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = current_exchange()
        if scope["type"] != "http" or exchange is None:
            await self._app(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception:
            logger.exception("request %s failed", exchange.request_id)
            has_begun, exchange.status = exchange.status is not None, 500
            if has_begun:
                raise  # the server cuts the connection: an answer broken in half must not look whole
            await INTERNAL_ERROR.response()(scope, receive, send)
