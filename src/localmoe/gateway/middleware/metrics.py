"""Tells of each answer, for whoever counts."""

from starlette.types import ASGIApp, Receive, Scope, Send

from localmoe.core.events import EventBus, HttpAnswered
from localmoe.gateway.exchange import current_exchange


class MetricsMiddleware:
    """Publishes `HttpAnswered` for each request. What clients may make up, methods and paths, is not told apart: each
    would be a series of its own for good."""

    def __init__(self, app: ASGIApp, *, bus: EventBus) -> None:
        self._app = app
        self._bus = bus

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = current_exchange()
        try:
            await self._app(scope, receive, send)
        finally:
            if exchange is not None:
                self._bus.publish(
                    HttpAnswered(
                        method=exchange.rule.method,
                        route=exchange.rule.route,
                        status=exchange.final_status,
                        duration_s=exchange.duration_s,
                    )
                )
